"""Batch sizes as forms, on a GPU: which are tried, for how long they grow, and what is measured and chosen then."""

from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from headrace.core.model import Signature
from headrace_backends.optimize.batch_forms import (
    LARGER_ROWS,
    Growing,
    larger_rows,
    measured_rows,
    with_kernels_for_its_best_size,
)
from headrace_backends.optimize.finals import best_of
from headrace_backends.optimize.findings import Fate, Hardware, Point, Row
from headrace_backends.optimize.form import Form
from headrace_backends.optimize.goal import Goal
from headrace_backends.optimize.listener import SilentListener
from headrace_backends.optimize.search import Search
from headrace_backends.optimize.subject import Subject
from headrace_backends.optimize.workshop import Workshop

THROUGHPUT, IN_TIME = Goal(aim="throughput"), Goal(aim="throughput", p99_ms=20.0)
ENGINE = Form("tensorrt", parameters={"precision": "fp16", "cuda_graphs": True})
LARGE = msgspec.structs.replace(ENGINE, max_batch_size=64)


def subject(device="gpu:0", max_batch_size=None, **parameters):
    path = Path("m.onnx")
    return Subject("m", "1", path, "tensorrt", Path(), parameters, max_batch_size=max_batch_size, device=device)


@pytest.mark.parametrize(
    ("goal", "where", "most", "expected"),
    [
        (THROUGHPUT, subject(), 32, LARGER_ROWS),
        (IN_TIME, subject(), 32, LARGER_ROWS),
        (Goal(), subject(), 32, ()),  # one row is what counts
        (THROUGHPUT, subject("cpu"), 32, ()),
        (THROUGHPUT, subject(max_batch_size=32), 32, ()),  # the owner's word
        (THROUGHPUT, subject(), 24, ()),  # the model's own bound
        (THROUGHPUT, subject(), 0, ()),
    ],
)
def test_larger_batches_are_tried_where_they_may_pay(goal, where, most, expected):
    assert larger_rows(goal, where, most) == expected


def row(form, speedup, fate=Fate.KEPT, **milliseconds):
    points = tuple(Point(int(rows[1:]), ms, ms) for rows, ms in milliseconds.items())
    return Row(form, fate, speedup=speedup, curve=points)


def grown(*told):
    """The batch sizes that are tried where these come of them, and the one that is best."""
    growing, tried = Growing(row(ENGINE, 4.0), LARGER_ROWS), []
    for speedup, fate in told:
        form = growing.next_form()
        tried.append(form.max_batch_size)
        assert form.parameters == ENGINE.parameters
        growing.tell(row(form, speedup, fate))
    assert growing.next_form() is None
    return tried, growing.best.form.max_batch_size


def test_batches_grow_as_long_as_it_pays():
    kept = Fate.KEPT
    assert grown((5.0, kept), (6.0, kept), (7.0, kept)) == ([64, 128, 256], 256)
    assert grown((5.0, kept), (5.1, kept)) == ([64, 128], 64)
    assert grown((3.0, kept)) == ([64], None)
    assert grown((9.0, Fate.REFUSED)) == ([64], None)
    assert grown((None, Fate.FAILED)) == ([64], None)
    nothing = Growing(row(ENGINE, 1.0), ())
    assert nothing.next_form() is None
    assert nothing.best.form == ENGINE


CURVE = {"r1": 1.0, "r4": 2.0, "r8": 9.0, "r32": 40.0}  # the most rows a second at 4, the most within 20 ms too


@pytest.mark.parametrize(
    ("one", "goal", "where", "most", "expected"),
    [
        (row(ENGINE, 2.0, r1=1.0), Goal(), subject(), 32, "1"),
        (row(ENGINE, 2.0, **CURVE), IN_TIME, subject(), 32, "4"),
        (row(ENGINE, 2.0, r1=1.0, r32=2.0), THROUGHPUT, subject(), 32, None),  # they are chosen for the largest anyway
        (row(LARGE, 2.0, r32=2.0, r64=9.0), THROUGHPUT, subject(), 32, "32"),
        (row(ENGINE, 2.0, r1=1.0), Goal(), subject(), 0, None),  # nothing is merged
        (row(ENGINE, 2.0, r1=99.0), IN_TIME, subject(), 32, None),  # no size suits the goal
        (row(ENGINE, 2.0, r1=1.0), Goal(), subject(batch_profiles="1, 8"), 32, None),
        (row(Form("tensorrt", parameters={"cuda_graphs": True}), 2.0, r1=1.0), Goal(), subject(), 32, None),  # built
        (row(Form("torch", parameters={"cuda_graphs": True}), 2.0, r1=1.0), Goal(), subject(), 32, None),
    ],
)  # fmt: skip
def test_kernels_are_chosen_for_the_size_that_serves_the_goal_best(one, goal, where, most, expected):
    form = with_kernels_for_its_best_size(one, goal, where, most)
    if expected is None:
        assert form is None
    else:
        assert form.parameters == {**ENGINE.parameters, "batch_profiles": expected}
        assert form.max_batch_size == one.form.max_batch_size


def test_a_form_is_measured_in_its_largest_batch_too():
    forms = [Form("torch"), Form("torch", max_batch_size=128), Form("tensorrt", max_batch_size=64)]
    assert measured_rows((1, 4, 32), forms) == (1, 4, 32, 64, 128)
    assert measured_rows((1,), forms[:1]) == (1,)
    assert measured_rows((1, 16), [Form("torch", max_batch_size=16), Form("torch", max_batch_size=0)]) == (1, 16)


def test_forms_of_other_batches_have_other_names_and_the_smaller_is_chosen_where_they_are_even():
    names = {Form("torch", max_batch_size=rows).name for rows in (None, 0, 64, 128)}
    assert names == {"torch", "torch + max_batch_size=64", "torch + max_batch_size=128"}
    even = [row(Form("torch", max_batch_size=rows), speedup) for rows, speedup in ((128, 2.02), (64, 2.0), (None, 1.0))]
    assert best_of(even).form.max_batch_size == 64


class Scripted(Search):
    """Each size beyond 32 is 1.5 times as fast as the one before, up to 128."""

    def _try(self, contest, form, earlier):
        self._rows.append(row(form, {64: 3.0, 128: 4.5}.get(form.max_batch_size, 4.0), r1=1.0, r32=2.0, r128=9.0))
        return self._rows[-1]


def tried(tmp_path, goal, where, *kept):
    """What is tried after these forms."""
    workshop = Workshop(tmp_path, where, 1)
    search = Scripted(where, goal, None, workshop, SilentListener(), 1, Hardware("cpu", 1, ()), {})
    search._rows = [row(Form("torch"), 9.0, Fate.REFUSED), *kept]
    search._try_batches(SimpleNamespace(signature=Signature((), (), 32)), row(Form("onnxruntime"), 1.0, r1=1.0))
    return [one.form.name for one in search._rows[1 + len(kept) :]]


def test_the_best_few_are_tried_in_other_batches(tmp_path):
    plain = [row(Form("torch", parameters={"n": n}), 1.0 + n / 10, r1=1.0) for n in (1, 2, 3)]
    engine = row(ENGINE, 2.0, r1=1.0, r32=2.0)
    rest = "cuda_graphs=True + precision=fp16"
    name = f"tensorrt + {rest}"
    assert tried(tmp_path, THROUGHPUT, subject("cpu"), *plain) == []
    assert tried(tmp_path, Goal(), subject(), *plain) == []
    assert tried(tmp_path, Goal(), subject(), *plain, engine) == [f"tensorrt + batch_profiles=1 + {rest}"]
    found = tried(tmp_path, THROUGHPUT, subject(), *plain, engine)
    assert found[:4] == [
        *(f"{name} + max_batch_size={rows}" for rows in LARGER_ROWS),
        f"tensorrt + batch_profiles=32 + {rest} + max_batch_size=128",
    ]
    assert found[4:] == [f"torch + n={n} + max_batch_size={rows}" for n in (3, 2) for rows in LARGER_ROWS]

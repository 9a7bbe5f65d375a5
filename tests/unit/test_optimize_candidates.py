"""Which forms are tried, in what order, and how many layers are left alone."""

from types import SimpleNamespace

import pytest

from headrace_backends.optimize.accuracy import Budget, Errors
from headrace_backends.optimize.candidates import Facts, candidates, kept_in_full, milder
from headrace_backends.optimize.clocking import Laps, speedup
from headrace_backends.optimize.examples import Examples
from headrace_backends.optimize.findings import Hardware
from headrace_backends.optimize.form import Form, Step, Technique, steps_key
from headrace_backends.optimize.goal import Goal
from headrace_backends.optimize.listener import SilentListener
from headrace_backends.optimize.mixing import MOST_TRIES, Mixing
from headrace_backends.optimize.search import Search
from headrace_backends.optimize.subject import Subject
from headrace_backends.optimize.workshop import Workshop

ALL = frozenset(Technique)


def forms_of(facts):
    return [candidate.form for candidate in candidates(facts)]


def names(facts):
    return [form.name for form in forms_of(facts)]


@pytest.mark.parametrize("ending", [".onnx", ".pt2", ".pt", ".xml"])
@pytest.mark.parametrize("kind", ["convolutional", "transformer", "dense"])
def test_without_permission_only_faithful_forms_are_tried(ending, kind):
    backend = {".onnx": "onnxruntime", ".xml": "openvino"}.get(ending, "torch")
    found = forms_of(Facts(ending, backend, kind, trains=True))
    assert all(form.faithful for form in found)


@pytest.mark.parametrize("kind", ["convolutional", "transformer", "dense"])
def test_faithful_forms_come_first_and_none_comes_twice(kind):
    found = forms_of(Facts(".pt2", "torch", kind, ALL, trains=True))
    faithful = [form.faithful for form in found]
    assert faithful == sorted(faithful, reverse=True)
    assert len({form.name for form in found}) == len(found)
    assert Form("torch") not in found


def test_every_step_is_known():
    from headrace_backends.optimize.steps import registry

    found = forms_of(Facts(".pt2", "torch", "transformer", ALL, trains=True, exhaustive=True))
    kinds = {step.kind for form in found for step in form.steps}
    assert kinds <= set(registry._STEPS)


def test_convolutions_are_quantised_statically_first_and_matrix_products_also_dynamically():
    conv = names(Facts(".onnx", "onnxruntime", "convolutional", ALL))
    assert conv.index("onnxruntime + int8_static") < conv.index("onnxruntime + int8_dynamic")
    transformer = names(Facts(".onnx", "onnxruntime", "transformer", ALL))
    dynamic = next(place for place, name in enumerate(transformer) if "int8_dynamic" in name)
    assert dynamic < transformer.index("onnxruntime + int8_static")


def test_forms_with_one_scale_for_a_whole_batch_have_no_batches():
    found = forms_of(Facts(".pt2", "torch", "dense", ALL, trains=True))
    scaled = [form for form in found if any(step.kind == "int8_dynamic" for step in form.steps)]
    assert len(scaled) > 1
    assert all(one.max_batch_size == 1 for form in scaled for one in (form, *milder(form)))


def test_ncnn_is_tried_for_convolutions_alone():
    ncnn = ["ncnn + ncnn", "ncnn + ncnn + precision=bf16", "ncnn + prune(share=0.5) + ncnn"]
    found = names(Facts(".onnx", "onnxruntime", "convolutional", ALL, trains=True))
    assert set(ncnn) <= set(found)
    faithful = names(Facts(".pt2", "torch", "convolutional"))
    assert [name for name in faithful if name.startswith("ncnn")] == ["ncnn + export_onnx + ncnn"]
    for facts in (
        Facts(".onnx", "onnxruntime", "transformer", ALL, trains=True),
        Facts(".onnx", "onnxruntime", "convolutional", ALL, on_gpu=True),
        Facts(".tflite", "litert", "convolutional", ALL),
    ):
        assert not any("ncnn" in name for name in names(facts))


def test_a_program_is_compiled_ahead_of_its_loads_unless_its_owner_forbids_machine_code():
    package = "torch + aot_inductor + allow_native_code=True"
    assert package in names(Facts(".pt2", "torch", "dense"))
    assert package in names(Facts(".pt2", "torch", "dense", on_gpu=True))
    assert package not in names(Facts(".pt", "torch", "dense"))
    for on_gpu in (False, True):
        found = names(Facts(".pt2", "torch", "dense", ALL, on_gpu=on_gpu, native_code=False))
        assert not any("native_code" in name for name in found)


class Dense(Search):
    def _kind(self, contest):
        return "dense"


@pytest.mark.parametrize(("said", "allowed"), [({}, True), ({"allow_native_code": True}, True),
                                               ({"allow_native_code": "false"}, False)])  # fmt: skip
def test_the_owners_word_on_machine_code_is_heard(tmp_path, said, allowed):
    subject = Subject("m", "1", tmp_path / "m.pt2", "torch", tmp_path, said)
    workshop = Workshop(tmp_path, subject, 1)
    search = Dense(subject, Goal(), None, workshop, SilentListener(), 1, Hardware("cpu", 1, ()), {})
    facts = search._facts(SimpleNamespace(first=SimpleNamespace(examples=Examples((), (), ""))))
    assert (facts.native_code, facts.on_gpu) == (allowed, False)


def test_what_is_trained_may_be_quantised_too():
    found = names(
        Facts(".pt2", "torch", "convolutional", frozenset({Technique.PRUNE, Technique.INT8_STATIC}), trains=True)
    )
    assert "onnxruntime + prune(share=0.5) + int8_static" in found
    assert not any("distill" in name for name in found)
    assert not any("prune" in name for name in names(Facts(".pt2", "torch", "convolutional", ALL)))


def test_techniques_of_a_form_are_all_that_was_needed():
    found = forms_of(Facts(".pt2", "torch", "dense", frozenset({Technique.PRUNE, Technique.INT8_STATIC}), trains=True))
    both = next(form for form in found if form.name.endswith("prune(share=0.5) + int8_static"))
    assert set(both.techniques) == {Technique.PRUNE, Technique.INT8_STATIC}


def test_layers_are_kept_by_the_step_that_quantises():
    form = Form("onnxruntime", (Step("export_onnx"), Step("int8_static", {"calibrate": "minmax"})))
    mixed = kept_in_full(form, ["a", "b", "c"], 2)
    assert mixed.steps[1].options == {"calibrate": "minmax", "keep_first": 2, "keep_last": 1}
    assert steps_key(mixed.steps) != steps_key(form.steps)
    named = kept_in_full(Form("openvino", (Step("openvino_int8"),)), ["a", "b", "c"], 2)
    assert named.steps[0].options == {"keep": ["a", "b"]}
    assert kept_in_full(Form("onnxruntime"), ["a"], 1) is None


def test_a_milder_form_differs_in_options_alone():
    form = Form("onnxruntime", (Step("export_onnx"), Step("int8_static")))
    (other,) = milder(form)
    assert [step.kind for step in other.steps] == ["export_onnx", "int8_static"]
    assert other.steps[1].options == {"calibrate": "percentile"}
    assert milder(other) == []
    assert milder(Form("onnxruntime")) == []


@pytest.mark.parametrize("needed", [0, 1, 3, 4, 9, 17, 40, 48])
def test_a_bisection_ends_near_what_is_needed(needed):
    mixing = Mixing(48)
    tried = []
    while (count := mixing.next_count()) is not None:
        assert count not in tried
        tried.append(count)
        mixing.tell(count, within=count >= needed)
    assert len(tried) <= MOST_TRIES
    assert mixing.within is not None
    assert needed <= mixing.within <= max(8, needed * 1.5)


def test_a_bisection_gives_up_when_even_all_are_not_enough():
    mixing = Mixing(10)
    while (count := mixing.next_count()) is not None:
        mixing.tell(count, within=False)
    assert mixing.within is None
    assert mixing.refused == 10


def test_without_layers_there_is_nothing_to_keep():
    assert Mixing(0).next_count() is None


def laps(instances=1, **milliseconds):
    """Three equal rounds; each batch size by its name."""
    return Laps(instances, {int(rows[1:]): ((int(ms * 1e6),) * 3,) * 3 for rows, ms in milliseconds.items()})


def test_the_rate_is_that_of_the_best_batch_within_the_bound():
    one = laps(r1=2.0, r8=8.0, r32=30.0)
    assert one.rates(Goal(aim="throughput")) == pytest.approx([32 / 30e-3] * 3)
    assert one.rates(Goal(aim="throughput", p99_ms=20.0)) == pytest.approx([1000] * 3)
    assert one.rates(Goal(aim="throughput", p99_ms=3.0)) == [0.0] * 3
    assert one.rates(Goal(aim="latency")) == pytest.approx([500] * 3)


def test_a_form_is_faster_by_the_median_of_the_rounds():
    slow, fast = laps(r1=2.0), Laps(1, {1: ((10**6,), (10**6,), (10**9,))})  # somebody else was busy in one
    assert speedup(fast, slow, Goal()) == pytest.approx(2.0)
    assert speedup(laps(2, r1=2.0), slow, Goal()) == pytest.approx(2.0)  # two instances
    assert speedup(laps(r1=2.0, r8=4.0), laps(r1=1.0), Goal(aim="throughput")) == pytest.approx(2.0)
    assert speedup(slow, fast, Goal(aim="throughput", p99_ms=0.1)) == 0.0


def test_batch_sizes_are_those_that_may_be_merged():
    assert Goal(aim="latency").rows(32) == (1,)
    assert Goal(aim="throughput").rows(0) == (1,)
    assert Goal(aim="throughput").rows(6) == (1, 4, 6)
    assert Goal(aim="throughput").rows(64)[-1] == 32


def test_without_a_budget_only_float_noise_is_allowed():
    assert Goal().problem(Errors(4, max_abs=1e-6, max_rel=1e-6)) is None
    assert "no budget" in Goal().problem(Errors(4, max_abs=0.1, max_rel=0.1))
    assert Goal(Budget("cosine", min=0.9)).problem(Errors(4, max_rel=0.1, cosine=0.95)) is None


def test_gains_are_over_the_reference():
    of_torch, of_onnx = (
        {one.form.name.replace("export_onnx + ", ""): one.gain for one in candidates(Facts(ending, backend, "dense"))}
        for ending, backend in ((".pt2", "torch"), (".onnx", "onnxruntime"))
    )
    assert of_torch["openvino + openvino"] > 2 * of_onnx["openvino + openvino"] > 1.5


def test_where_the_reference_misses_the_bound_those_that_keep_it_are_told_apart():
    """Else all of them would be as good, and the one that changes least be chosen, however slow it is."""
    goal = Goal(aim="throughput", p99_ms=20.0)
    reference, slow, fast = laps(r1=15.0, r8=40.0), laps(r1=5.0, r8=9.0), laps(r1=1.0, r8=3.0)
    assert speedup(reference, reference, goal) == 0.0
    assert speedup(slow, reference, goal) == pytest.approx(8 / 9 * 15)
    assert speedup(fast, reference, goal) == pytest.approx(8 / 3 * 15)
    assert speedup(reference, fast, goal) == 0.0


def test_a_tensorflow_lite_file_is_tried_on_openvino_too():
    faithful = names(Facts(".tflite", "litert", "dense"))
    assert faithful == ["openvino + openvino"]
    every = names(Facts(".tflite", "litert", "dense", ALL))
    assert every[0] == "openvino + openvino"
    assert "openvino + openvino_int8" in every
    assert "openvino + openvino + precision=bf16" in every
    assert names(Facts(".tflite", "openvino", "dense")) == []
    assert "openvino + precision=bf16" in names(Facts(".xml", "openvino", "dense", ALL))

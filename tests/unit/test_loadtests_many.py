"""The load test of many models: what it serves, expects and tells."""

import json

import numpy as np
import onnxruntime
import pytest
from loadtests.latency import summarize
from loadtests.many_models import Footprint, Plan, Result, load_alone, tables, write
from loadtests.small_models import answer, model_name, place_models, row

PLAN = Plan(3, 40, 0.5, 2, 100.0, 1.0, 1.0)


@pytest.fixture
def repository(tmp_path):
    place_models(tmp_path / "repository", PLAN.models, PLAN.weight_kib)
    return tmp_path / "repository"


def test_each_model_gives_the_answer_that_is_expected_of_it(repository):
    answers = []
    for number in range(3):
        session = onnxruntime.InferenceSession(repository / model_name(number) / "1/model.onnx")
        (y,) = session.run(None, {"x": row(number)[np.newaxis]})
        answers.append(answer(number, PLAN.weight_kib))
        assert y[0].tolist() == answers[-1]
    assert len({tuple(one) for one in answers}) == 3, "a mix-up would show"


def test_the_files_have_the_size_that_was_asked_for(repository):
    sizes = [(repository / model_name(number) / "1/model.onnx").stat().st_size for number in range(3)]
    assert all(40 * 1024 <= size < 41 * 1024 for size in sizes)
    assert PLAN.resident_bytes == 60 * 1024


def test_loads_alone_are_timed_one_by_one(repository):
    summary = load_alone(repository, [0, 2])
    assert summary.count == 2
    assert 0 < summary.p50_ms <= summary.max_ms


def test_what_is_told_and_written(tmp_path):
    rest = Footprint(2.5, 70.0, 600.0, 16, 0.4)
    one = summarize([1_000_000, 2_000_000])
    result = Result(rest, rest, 2, one, one, one, summarize([9_000_000]), one, one, ())
    shown = [list(table.columns[0].cells) for table in tables(PLAN, result)]
    assert shown[0] == ["all in memory", "2 in 0 MiB"]
    assert "cold" in shown[1]
    write(tmp_path / "local" / "result.json", PLAN, result)
    document = json.loads((tmp_path / "local" / "result.json").read_text())
    assert document["plan"]["resident_bytes"] == 60 * 1024
    assert document["result"]["cold"]["p50_ms"] == 9.0

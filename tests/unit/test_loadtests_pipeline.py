"""The load tests of pipelines, streams and sequences: what they compute, what they serve, what they take for wrong."""

import asyncio
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from loadtests import pipeline_drive, pipeline_models, pipeline_report, stream_clients, streams
from loadtests.http_message import BadResponse
from loadtests.http_response import Response
from loadtests.latency import summarize
from loadtests.pipeline import Plan
from loadtests.pipeline_drive import Cell, Job, Measured, Way
from loadtests.pipeline_models import Cost
from loadtests.pipeline_report import Run
from loadtests.stream_clients import Tally
from loadtests.streams import Footprint, Gate, Phase

from headrace.repository.model_config import parse_config
from headrace_backends.python import InputError

PLAN = Plan(("resnet50", "mobilenet"), (1, 4), repeats=2, seconds=1, warmup_s=0, steps_s=1, threads=2)
CELL = Cell("mobilenet", 4, Way.ENSEMBLE_HTTP)


# Order and arithmetic


def test_every_repeat_has_every_cell_and_begins_elsewhere():
    repeats = [PLAN.cells(repeat) for repeat in range(4)]
    assert {len(cells) for cells in repeats} == {2 * 2 * len(Way)}
    assert len({frozenset(cells) for cells in repeats}) == 1
    assert len({cells[0] for cells in repeats}) == 4
    assert repeats[1] == repeats[0][::-1]


def measured(server_us=1200.0, client_us=100.0, rate=50.0, latency_ms=20, rows=2.0, errors=None):
    latency = summarize([int(latency_ms * 1e6)])
    batches = {"decode": 1.0, "mobilenet": rows, "best": 1.0}
    return Measured(100, rate, latency, errors or {}, server_us, client_us, batches, 0)


COSTS = (Cost(1, 1, 1100, None, 9), Cost(1, 2, 1150, None, 9), Cost(2, 1, 1000, None, 9), Cost(2, 2, 1050, None, 9))


def test_a_batch_is_held_against_steps_in_batches_of_its_size():
    assert [pipeline_report.reached_rows(measured(rows=rows), "mobilenet") for rows in (None, 0.4, 1.4, 1.6, 7.9)] == [
        *(1, 1, 1, 2, 8)
    ]
    assert pipeline_report.cost_of(COSTS, 2) == 1000
    assert pipeline_report.cost_of(COSTS, 1) == 1100
    assert pipeline_report.cost_of(COSTS, 2, together=True) == 1050


def test_a_ratio_is_made_within_a_repeat_before_the_median():
    """The machine became twice as slow, and the ratio stayed what it was."""
    slower = tuple(replace(cost, cpu_us=cost.cpu_us * 2) for cost in COSTS)
    runs = [
        Run(CELL, 0, measured(1200), COSTS),
        Run(CELL, 1, measured(2400, errors={"oh": 3}), slower),
        Run(CELL, 2, measured(1100), COSTS),
        Run(CELL, 3, problem="broke"),
        Run(replace(CELL, concurrency=1), 0, measured(9999), COSTS),
    ]
    row = pipeline_report.summarize_cell(CELL, runs)
    assert row.ratio == pytest.approx(1.2)
    assert row.ratio_single == pytest.approx(1200 / 1100)
    assert row.ratio_together == pytest.approx(1200 / 1050)
    assert (row.server_cpu_us, row.steps_cpu_us, row.batch_rows, row.errors) == (1200, 1000, 2.0, 3)
    assert pipeline_report.summarize_cell(CELL, runs[3:4]) is None


def test_the_ensemble_is_held_against_the_calls_of_the_same_repeat():
    calls = replace(CELL, way=Way.CLIENT_HTTP)
    runs = [
        Run(CELL, 0, measured(1000, 100, rate=60, latency_ms=10)),
        Run(calls, 0, measured(1500, 700, rate=40, latency_ms=20)),
        Run(CELL, 1, measured(1, 1, rate=1)),
        Run(calls, 1, problem="broke"),
    ]
    one = pipeline_report.compare("mobilenet", 4, runs)
    assert (one.requests_per_s, one.p50, one.p99, one.server_cpu, one.all_cpu) == (1.5, 0.5, 0.5, 1000 / 1500, 0.5)
    assert pipeline_report.compare("mobilenet", 4, runs[2:]) is None
    assert pipeline_report.compare("resnet50", 4, runs) is None


def test_verdicts_say_what_was_reached(tmp_path):
    runs = [Run(CELL, 0, measured(1150), COSTS), Run(replace(CELL, way=Way.ENSEMBLE_GRPC), 0, measured(1160), COSTS)]
    runs.append(Run(replace(CELL, way=Way.CLIENT_HTTP), 0, measured(1160, rate=49, latency_ms=21), COSTS))
    rows = [pipeline_report.summarize_cell(run.cell, runs) for run in runs]
    better = pipeline_report.compare("mobilenet", 4, runs)
    lines = pipeline_report.verdicts(rows, [better, replace(better, p99=1.01)])
    assert [line.rpartition(" ")[2] for line in lines] == ["met", "missed", "met", "missed"]
    path = tmp_path / "plot.png"
    pipeline_report.plot(rows, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert pipeline_report.table(rows).row_count == 3


# Answers


def answer(status=200, more=b"", length=None):
    outputs = [
        {"name": "classes", "datatype": "INT64", "shape": [1, 1], "parameters": {"binary_data_size": 8}},
        {"name": "scores", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": 8}},
    ]
    header = json.dumps({"outputs": outputs}).encode()
    head = b"HTTP/1.1 200 OK"
    if length is not False:
        head += b"\r\ninference-header-content-length: %d" % len(header)
    body = header + np.array([7], np.int64).tobytes() + np.array([0.5, 0.25], np.float32).tobytes()
    return Response(status, head, body + more)


def test_outputs_are_cut_out_of_a_binary_answer():
    outputs = pipeline_drive.outputs_of(answer())
    assert list(outputs) == ["classes", "scores"]
    assert outputs["scores"].shape == (1, 2)
    assert np.frombuffer(outputs["scores"].data, np.float32).tolist() == [0.5, 0.25]
    for bad, message in (
        (answer(status=503), "status 503"),
        (answer(length=False), "status 200"),
        (answer(more=b"x"), "its outputs tell of"),
    ):
        with pytest.raises(BadResponse, match=message):
            pipeline_drive.outputs_of(bad)


async def test_only_right_scores_are_no_error():
    scores = np.array([[1.0, 0.5], [2.0, 1.5]], np.float32)
    job = Job(CELL, 0, 0, 0, 0, 0, 0, (b"", b""), scores)
    asked = []

    def ask_giving(change):
        async def ask(picture):
            asked.append(picture)
            await asyncio.sleep(0)
            return change(scores[picture : picture + 1])

        return ask

    good = ask_giving(lambda right: right + np.float32(1e-5))
    tally = await pipeline_drive._phase(job, [good, good], 0.02)
    assert not tally.errors
    assert set(asked) == {0, 1}
    assert len(tally.latencies_ns) == len(asked)
    for change in (lambda right: right + np.float32(0.01), lambda _: scores[:, :1], lambda _: scores):
        tally = await pipeline_drive._phase(job, [ask_giving(change)], 0.01)
        assert sum(tally.errors.values()) == len(tally.latencies_ns)

    async def refused(_):
        raise BadResponse("no")

    tally = await pipeline_drive._phase(job, [refused], 0.01)
    assert list(tally.errors) == ["BadResponse: no"]
    assert not tally.latencies_ns


# The pipeline's models


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline_models.place_pipeline(folder, ["mobilenet"], 2)
    return folder


@pytest.fixture(scope="module")
def pictures():
    return pipeline_models.make_pictures(3)


def test_pictures_are_the_same_each_time_and_no_two_alike(pictures):
    image = pytest.importorskip("PIL.Image")
    assert pictures == pipeline_models.make_pictures(3)
    assert len(set(pictures)) == 3
    for file in pictures:
        assert 20_000 < len(file) < 100_000  # what a photo of that size has
    import io

    with image.open(io.BytesIO(pictures[0])) as picture:
        assert (picture.format, picture.size) == ("JPEG", pipeline_models.PICTURE_SIZE)


def test_what_is_served_is_one_pipeline(repository):
    names = {"decode", "mobilenet", "best", "mobilenet_ensemble", "mobilenet_caller"}
    assert {path.name for path in repository.iterdir()} == names
    configs = {path.parent.name: parse_config(path.read_text()) for path in repository.glob("*/config.yaml")}
    assert [step.model for step in configs["mobilenet_ensemble"].ensemble] == ["decode", "mobilenet", "best"]
    assert configs["mobilenet"].parameters == {"intra_op_threads": 2}
    caller = (repository / "mobilenet_caller" / "1" / "model.py").read_text()
    assert '"mobilenet", {"data": pixels}' in caller
    with pytest.raises(ValueError, match="no net resnet; there are resnet50, mobilenet"):
        pipeline_models.place_pipeline(repository, ["resnet"], 2)


def test_steps_give_the_best_classes_whatever_the_batch(repository, pictures):
    steps = pipeline_models.Steps(repository, "mobilenet", 1)
    together, classes, times = steps.run(pictures)
    assert together.shape == classes.shape == (3, 5)
    assert (np.diff(together) <= 0).all()
    assert len(times) == len(pipeline_models.STEPS)
    assert all(time_ns > 0 for time_ns in times)
    alone = pipeline_models.expected_scores(repository, "mobilenet", 1, pictures)
    np.testing.assert_allclose(together, alone, rtol=0, atol=pipeline_models.TOLERANCE)
    with pytest.raises(ValueError, match="two pictures have the same scores"):
        pipeline_models.expected_scores(repository, "mobilenet", 1, [pictures[0], pictures[0]])
    with pytest.raises(InputError, match="'file' is no picture"):
        steps.run([b"no picture"])


def test_pixels_are_centred_and_normalized(repository):
    image = pytest.importorskip("PIL.Image")
    import io

    file = io.BytesIO()
    picture = image.new("RGB", (500, 375), (255, 0, 128))
    picture.paste((0, 0, 0), (0, 0, 60, 375))  # outside of the square that is cut out
    picture.save(file, "PNG")
    decode = pipeline_models.Steps(repository, "mobilenet", 1)._decode
    pixels = decode({"file": np.array([[file.getvalue()]], np.object_)})["pixels"]
    assert (pixels.dtype, pixels.shape) == (np.float32, (1, 3, 224, 224))
    expected = [(255 - 123.675) / 58.395, -116.28 / 57.12, (128 - 103.53) / 57.375]
    np.testing.assert_allclose(pixels.min(axis=(0, 2, 3)), expected, rtol=1e-5)
    np.testing.assert_allclose(pixels.max(axis=(0, 2, 3)), expected, rtol=1e-5)


def test_costs_are_told_for_each_size_and_number_of_callers(repository, pictures):
    costs = pipeline_models.measure_steps(repository, "mobilenet", 1, pictures, [1, 2], 2, 0.01)
    assert [(cost.batch_rows, cost.callers) for cost in costs] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    for cost in costs:
        assert cost.cpu_us > 0
        if cost.callers == 1:
            assert 0 < sum(cost.step_us) <= cost.cpu_us
        else:
            assert cost.step_us is None


# Streams and sequences


async def read_events(*parts, end=b"0\r\n\r\n"):
    reader = asyncio.StreamReader()
    for part in parts:
        reader.feed_data(b"%x\r\n%b\r\n" % (len(part), part))
    reader.feed_data(end)
    reader.feed_eof()
    return [event async for event in stream_clients.events(reader)]


async def test_events_come_out_of_chunks_however_they_are_cut():
    expected = [{"index": 0}, {"index": 1}]
    assert await read_events(b'data: {"index": 0}\n\n', b'data: {"index": 1}\n\n') == expected
    assert await read_events(b'data: {"ind', b'ex": 0}\n', b'\ndata: {"index": 1}\n\n') == expected
    assert await read_events() == []


async def test_a_stream_that_breaks_is_no_stream_that_ends():
    with pytest.raises(asyncio.IncompleteReadError):
        await read_events(b'data: {"index": 0}\n\n', end=b"")
    with pytest.raises(BadResponse, match="in the middle of an event"):
        await read_events(b'data: {"index": 0}')
    with pytest.raises(BadResponse, match="expected it to start with"):
        await read_events(b'{"index": 0}\n\n')


async def test_the_gate_opens_when_all_have_arrived_or_left():
    gate = Gate(3)
    first = asyncio.ensure_future(gate.arrive(0))
    second = asyncio.ensure_future(gate.arrive(1))
    await asyncio.sleep(0)
    gate.leave(0)  # who has arrived does not count twice
    await asyncio.sleep(0)
    assert not first.done()
    gate.leave(2)
    await asyncio.gather(first, second)
    assert gate.arrived == 2


async def test_a_client_that_fails_is_counted_and_keeps_nobody_waiting():
    gate, tally = Gate(2), Tally()

    async def good(arrive, tally):
        tally.expect(1, 1, "it")
        await arrive()
        tally.expect(2, 2, "it")

    async def bad(arrive, tally):
        tally.expect(5, 6, "the index of a response")

    await asyncio.gather(streams._one(good, 0, gate, tally), streams._one(bad, 1, gate, tally))
    assert tally.responses == 2
    assert tally.errors == {"BadResponse: the index of a response is wrong": 1}


def test_sequences_send_what_no_other_would(tmp_path):
    sums = {tuple(np.cumsum(stream_clients.steps_of(sequence, 20)).tolist()) for sequence in range(1, 1001)}
    assert len(sums) == 1000
    assert min(map(min, sums)) < 0 < max(map(max, sums))


def test_the_models_count_and_add(tmp_path):
    streams.place_models(tmp_path, 1000)
    config = parse_config((tmp_path / "adder" / "config.yaml").read_text())
    assert (config.sequence.strategy, config.sequence.max_candidates) == ("oldest", 1000)
    session = onnxruntime.InferenceSession(tmp_path / "adder" / "1" / "model.onnx")
    feed = {"x": np.array([[2], [3]], np.int32), "before": np.array([[40], [-3]], np.int32)}
    for output in ("sum", config.sequence.states[0].output):
        (values,) = session.run([output], feed)
        assert values.tolist() == [[42], [0]]
    scope = {}
    exec((tmp_path / "counter" / "1" / "model.py").read_text(), scope)
    yielded = scope["Model"]().infer({"count": np.array([3], np.int32)})
    assert [response["index"].tolist() for response in yielded] == [[0], [1], [2]]


def phase(number, rss_mib, name="sequences"):
    none = Footprint(0, 0)
    return Phase(name, number, 2, 10, 5.0, {}, none, none, Footprint(rss_mib, 9))


def test_memory_is_compared_between_the_last_two_rounds_and_never_with_the_first():
    rounds = [phase(1, 100), phase(2, 150, "streams http"), phase(2, 160), phase(3, 155, "streams http")]
    assert streams.grown_mib(rounds[:3]) is None
    assert streams.grown_mib([*rounds, phase(3, 163)]) == 3
    assert streams.grown_mib([]) is None
    assert streams.table(rounds).row_count == 4


def test_a_footprint_has_open_descriptors():
    before = streams.footprint(os.getpid())
    with Path(os.devnull).open(), Path(os.devnull).open():
        after = streams.footprint(os.getpid())
    assert after.descriptors == before.descriptors + 2
    assert 5 < after.rss_mib < 100_000

"""What is traced, how it is noted, and the files that hold it."""

import json
import logging
import math
import os
import threading

import ml_dtypes
import numpy as np
import pytest

from headrace import trace_file, tracing
from headrace.core.errors import InvalidRequest, Unsupported
from headrace.core.tensor import DataType, Tensor, pack_bytes, to_wire
from headrace.trace_file import ArrayFile
from headrace.tracing import Tracer, TraceSettings, settings_at_start

POINTS = (
    "REQUEST_START",
    "QUEUE_START",
    "COMPUTE_START",
    "COMPUTE_INPUT_END",
    "COMPUTE_OUTPUT_START",
    "COMPUTE_END",
    "REQUEST_END",
)
BOTH = ("TIMESTAMPS", "TENSORS")


@pytest.fixture
def make(tmp_path):
    """A function that makes a tracer over ``trace.json`` of the test's folder."""
    made = []

    def make(**settings):
        settings = {"trace_level": ("TIMESTAMPS",), "trace_rate": 1, **settings}
        made.append(Tracer(TraceSettings(trace_file=str(tmp_path / "trace.json"), **settings)))
        return made[-1]

    yield make
    for one in made:
        one.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "traces"]


@pytest.fixture
def read(tmp_path):
    """A function that parses one of the written files."""
    return lambda name="trace.json": json.loads((tmp_path / name).read_bytes())


def sampled(tracer, model="m", requests=1):
    """Which of that many requests are traced, counted from 1; their traces are ended."""
    numbers = []
    for number in range(1, requests + 1):
        trace = tracer.sample(model, "1", "") if tracer.active else None
        if trace is not None:
            numbers.append(number)
            trace.mark("REQUEST_START", number)
            trace.end()
    return numbers


def heads(objects):
    return [one for one in objects if "model_name" in one]


# -- what is sampled ------------------------------------------------------------------------------------------


def test_nothing_is_traced_unasked(tmp_path):
    tracer = Tracer(TraceSettings())
    assert not tracer.active
    assert tracer.sample("m", "1", "") is None
    tracer.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rate", [1, 2, 7])
def test_every_so_many_requests_of_a_model_one_is_traced(make, rate):
    tracer = make(trace_rate=rate)
    assert sampled(tracer, "a", 20) == list(range(rate, 21, rate))
    assert sampled(tracer, "b", 20) == list(range(rate, 21, rate)), "each model is counted by itself"


def test_the_count_is_used_up_by_all_models_together(make):
    tracer = make(trace_count=3)
    assert sampled(tracer, "a", 2) == [1, 2]
    assert tracer.settings("b").values()["trace_count"] == "1"
    assert sampled(tracer, "b", 5) == [1]
    assert not tracer.active
    assert tracer.settings().values()["trace_count"] == "0"
    tracer.change({"trace_count": ["2"]})
    assert tracer.active
    assert sampled(tracer, "a", 5) == [1, 2]


def test_a_count_of_none_is_none(make):
    assert not make(trace_count=0).active


def test_a_models_own_settings_stand_before_the_servers(make):
    tracer = make(trace_level=("OFF",))
    assert not tracer.active
    tracer.change({"trace_level": ["TIMESTAMPS"], "trace_count": ["2"], "trace_rate": ["3"]}, "own")
    assert tracer.active
    assert sampled(tracer, "other", 10) == []
    assert sampled(tracer, "own", 10) == [3, 6]
    assert not tracer.active
    assert tracer.settings("own").values() == {
        "trace_level": ["TIMESTAMPS"],
        "trace_rate": "3",
        "trace_count": "0",
        "log_frequency": "0",
        "trace_file": tracer.settings().trace_file,
        "trace_mode": "triton",
    }
    assert tracer.settings().trace_count == -1


def test_what_a_model_does_not_set_follows_the_server(make):
    tracer = make()
    tracer.change({"trace_level": ["TENSORS"]}, "own")
    tracer.change({"trace_rate": ["5"], "trace_level": ["OFF"]})
    assert (tracer.settings("own").trace_level, tracer.settings("own").trace_rate) == (("TENSORS",), 5)
    assert tracer.settings("other").trace_level == ("OFF",)
    tracer.change({"trace_level": None}, "own")
    assert tracer.settings("own") == tracer.settings("other") == tracer.settings()
    assert not tracer.active


def test_a_model_may_be_left_out(make):
    tracer = make()
    tracer.change({"trace_level": ["OFF"]}, "quiet")
    assert sampled(tracer, "quiet", 3) == []
    assert sampled(tracer, "m", 3) == [1, 2, 3]


def test_the_server_goes_back_to_what_it_was_started_with(make):
    tracer = make(trace_rate=7, trace_count=10)
    tracer.change({"trace_rate": ["1"], "trace_count": ["5"], "log_frequency": ["9"]})
    sampled(tracer, "m", 2)
    assert tracer.settings().trace_count == 3
    tracer.change({"trace_rate": None, "trace_count": None, "log_frequency": None})
    assert tracer.settings() == TraceSettings(("TIMESTAMPS",), 7, 10, 0, tracer.settings().trace_file)


def test_a_change_starts_the_counting_of_requests_anew(make):
    tracer = make(trace_rate=3)
    assert sampled(tracer, "m", 2) == []
    tracer.change({"trace_rate": ["3"]}, "m")
    assert sampled(tracer, "m", 3) == [3]


# -- what a request may change --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("trace_level", ["LOUD"]),
        ("trace_level", ["OFF", "TENSORS"]),
        ("trace_level", []),
        ("trace_rate", ["0"]),
        ("trace_rate", ["-1"]),
        ("trace_rate", [str(2**32)]),
        ("trace_rate", ["1.5"]),
        ("trace_rate", [""]),
        ("trace_rate", ["1", "2"]),
        ("trace_rate", []),
        ("trace_rate", ["\u0663"]),
        ("trace_rate", ["9" * 5000]),
        ("trace_count", ["-2"]),
        ("trace_count", [str(2**31)]),
        ("log_frequency", ["-1"]),
        ("log_frequency", [" 1"]),
        ("trace_colour", ["1"]),
        ("trace_colour", None),
        ("", ["1"]),
    ],
)
@pytest.mark.parametrize("model", ["", "m"])
def test_what_is_wrong_is_refused_by_its_name_and_changes_nothing(make, key, values, model):
    tracer = make()
    before = tracer.settings(model)
    with pytest.raises(InvalidRequest, match=f"'{key}'") as caught:
        tracer.change({"log_frequency": ["7"], "trace_level": ["TENSORS"], key: values}, model)
    assert len(str(caught.value)) < 400
    assert tracer.settings(model) == before


@pytest.mark.parametrize(
    ("key", "values"), [("trace_file", ["x"]), ("trace_file", None), ("trace_mode", ["opentelemetry"])]
)
def test_what_only_the_command_line_sets(make, key, values):
    tracer = make()
    with pytest.raises(Unsupported, match=key):
        tracer.change({"trace_rate": ["5"], key: values})
    assert tracer.settings().trace_rate == 1


@pytest.mark.parametrize("values", [None, ["triton"]])
def test_the_mode_may_be_named(make, values):
    tracer = make()
    tracer.change({"trace_mode": values, "trace_rate": ["2"]})
    assert tracer.settings().trace_rate == 2


@pytest.mark.parametrize(
    ("given", "level"), [(["TENSORS", "TIMESTAMPS"], BOTH), (["TENSORS"] * 2, ("TENSORS",)), (["OFF"], ("OFF",))]
)
def test_levels_add_up(make, given, level):
    tracer = make()
    tracer.change({"trace_level": given})
    assert tracer.settings().trace_level == level


@pytest.mark.parametrize("model", ["", "m"])
def test_without_a_file_tracing_cannot_be_switched_on(model):
    tracer = Tracer(TraceSettings())
    tracer.change({"trace_rate": ["5"], "trace_level": ["OFF"]}, model)
    with pytest.raises(InvalidRequest, match="trace_level"):
        tracer.change({"trace_level": ["TIMESTAMPS"]}, model)
    assert not tracer.active


def test_the_command_line_gives_the_first_settings(tmp_path):
    path = str(tmp_path / "trace.json")
    assert settings_at_start("", [], 1000, -1) == TraceSettings()
    assert settings_at_start(path, ["TENSORS"], 5, 6) == TraceSettings(("TENSORS",), 5, 6, 0, path)
    assert settings_at_start(path, [], 5, 6).trace_level == ("OFF",)
    assert list(tmp_path.iterdir()) == [], "nothing is written before there is a trace"


def test_impossible_settings_are_refused_at_start(tmp_path):
    with pytest.raises(ValueError, match=r"--trace-level.*LOUD"):
        settings_at_start(str(tmp_path / "x"), ["LOUD"], 1, 1)
    with pytest.raises(ValueError, match=r"--trace-level.*--trace-file"):
        settings_at_start("", ["TENSORS"], 1, 1)
    for path in (tmp_path / "no" / "such", tmp_path):
        with pytest.raises(ValueError, match="--trace-file"):
            settings_at_start(str(path), ["TENSORS"], 1, 1)


# -- what a trace holds ---------------------------------------------------------------------------------------


def test_a_trace_has_the_layout_that_tools_read(make, read):
    tracer = make(trace_level=BOTH)
    trace = tracer.sample("m", "3", 'an "id"')
    data = pack_bytes(['a "b"', b"\xff\n"])
    for ns, point in enumerate(POINTS, 10**15):
        trace.mark(point, ns)
        if point == "QUEUE_START":
            trace.tensors("TENSOR_QUEUE_INPUT", [Tensor("x", DataType.FP32, (1, 2), to_wire(np.float32([0.1, -2])))])
    trace.tensors("TENSOR_BACKEND_OUTPUT", [Tensor("y", DataType.BYTES, (2,), data)])
    trace.end()
    tracer.close()
    head, *rest = read()
    assert head == {"id": 1, "model_name": "m", "model_version": 3, "request_id": 'an "id"'}
    assert {one["id"] for one in rest} == {1}
    stamps = [(it["name"], it["ns"]) for one in rest for it in one.get("timestamps", ())]
    assert stamps == [(point, ns) for ns, point in enumerate(POINTS, 10**15)]
    assert rest[2] == {
        "id": 1,
        "activity": "TENSOR_QUEUE_INPUT",
        "tensor": {"name": "x", "data": "0.1,-2.0", "shape": "1,2", "dtype": "FP32"},
    }
    tensor = rest[-1]["tensor"]
    assert json.loads(f"[{tensor['data']}]") == ['a "b"', "\\xff\n"]
    assert (tensor["shape"], tensor["dtype"]) == ("2", "BYTES")


@pytest.mark.parametrize(("level", "kinds"), [("TIMESTAMPS", {"timestamps"}), ("TENSORS", {"activity"})])
def test_only_what_is_wanted_is_noted(make, read, level, kinds):
    tracer = make(trace_level=(level,))
    trace = tracer.sample("m", "1", "")
    trace.mark("REQUEST_START", 1)
    trace.tensors("TENSOR_QUEUE_INPUT", [Tensor("x", DataType.INT8, (1,), b"\1")])
    trace.end()
    tracer.close()
    assert {key for one in read()[1:] for key in one} & {"timestamps", "activity"} == kinds
    assert "request_id" not in read()[0]


@pytest.mark.parametrize("datatype", [it for it in DataType if it is not DataType.BYTES])
def test_numbers_of_every_datatype_are_written_so_that_they_read_back(make, read, datatype):
    dtype = tracing.from_wire(b"", datatype, (0,)).dtype
    array = np.array([[0, 1, 0.1], [1, 100, 0]]).astype(dtype)
    tracer = make(trace_level=BOTH)
    trace = tracer.sample("m", "1", "")
    trace.tensors("TENSOR_QUEUE_INPUT", [Tensor("x", datatype, (2, 3), to_wire(array))])
    trace.end()
    tracer.close()
    (tensor,) = [one["tensor"] for one in read() if "tensor" in one]
    values = np.array([float(it) for it in tensor["data"].split(",")]).astype(dtype)  # as trace_summary.py does
    assert (values.reshape([int(it) for it in tensor["shape"].split(",")]) == array).all()
    assert tensor["dtype"] == datatype


def test_what_is_not_finite_is_written_as_python_reads_it(make, read):
    tracer = make(trace_level=BOTH)
    for dtype, datatype in ((np.float32, DataType.FP32), (ml_dtypes.bfloat16, DataType.BF16)):
        trace = tracer.sample("m", "1", "")
        trace.tensors("TENSOR_QUEUE_INPUT", [Tensor("x", datatype, (2,), to_wire(np.array([np.nan, -np.inf], dtype)))])
        trace.end()
    tracer.close()
    for one in read():
        if "tensor" in one:
            nan, infinity = map(float, one["tensor"]["data"].split(","))
            assert math.isnan(nan)
            assert infinity == -math.inf


def test_of_a_large_tensor_there_is_the_beginning(make, read):
    tracer = make(trace_level=BOTH)
    trace = tracer.sample("m", "1", "")
    count = tracing.MAX_TENSOR_BYTES // 4
    numbers = np.arange(count + 8, dtype=np.int32)
    texts = pack_bytes([b"x" * 1000] * 100)
    exact = np.zeros(count, np.int32)
    trace.tensors(
        "TENSOR_QUEUE_INPUT",
        [
            Tensor("numbers", DataType.INT32, (2, len(numbers) // 2), to_wire(numbers)),
            Tensor("texts", DataType.BYTES, (10, 10), texts),
            Tensor("exact", DataType.INT32, (count,), to_wire(exact)),
        ],
    )
    trace.end()
    tracer.close()
    cut, strings, whole = [one["tensor"] for one in read() if "tensor" in one]
    assert [int(it) for it in cut["data"].split(",")] == list(range(count))
    assert (cut["shape"], cut["cut_from"]) == (str(count), f"2,{len(numbers) // 2}")
    found = json.loads(f"[{strings['data']}]")
    assert set(found) == {"x" * 1000}
    assert len(found) == tracing.MAX_TENSOR_BYTES // 1004 == int(strings["shape"])
    assert whole["shape"] == str(count)
    assert "cut_from" not in whole


def test_tensors_are_those_of_the_moment(make, read):
    tracer = make(trace_level=BOTH)
    trace = tracer.sample("m", "1", "")
    buffer = bytearray(b"\1\2")
    trace.tensors("TENSOR_QUEUE_INPUT", [Tensor("x", DataType.INT8, (2,), memoryview(buffer))])
    buffer[:] = b"\7\7"
    trace.end()
    tracer.close()
    assert read()[1]["tensor"]["data"] == "1,2"


def test_a_trace_is_written_once_and_is_over_then(make, read):
    tracer = make(trace_level=BOTH)
    trace = tracer.sample("m", "1", "")
    trace.end()
    trace.mark("REQUEST_END", 5)
    trace.tensors("TENSOR_BACKEND_OUTPUT", [Tensor("x", DataType.INT8, (1,), b"\1")])
    trace.end()
    tracer.close()
    assert read() == [{"id": 1, "model_name": "m", "model_version": 1}]


# -- files ----------------------------------------------------------------------------------------------------


def test_all_traces_come_into_one_file(make, read, tmp_path):
    tracer = make()
    assert sampled(tracer, "m", 50) == list(range(1, 51))
    tracer.close()
    assert [one["id"] for one in heads(read())] == list(range(1, 51))
    assert [one.name for one in tmp_path.iterdir()] == ["trace.json"]
    assert tracer.dropped == 0


def test_files_are_rotated(make, read, tmp_path):
    tracer = make(log_frequency=3)
    sampled(tracer, "m", 7)
    tracer.close()
    names = {one.name for one in tmp_path.iterdir()}
    assert names == {"trace.json.0", "trace.json.1", "trace.json.2"}
    ids = [[one["id"] for one in heads(read(f"trace.json.{number}"))] for number in range(3)]
    assert ids == [[1, 2, 3], [4, 5, 6], [7]]


def test_the_frequency_may_change_underway(make, read, tmp_path):
    tracer = make()
    sampled(tracer, "m", 2)
    tracer.change({"log_frequency": ["2"]}, "m")
    sampled(tracer, "m", 3)
    sampled(tracer, "other", 1)
    tracer.change({"log_frequency": ["1"]}, "m")
    sampled(tracer, "m", 2)
    tracer.close()
    assert [one["id"] for one in heads(read())] == [1, 2, 6]
    rotated = [[one["id"] for one in heads(read(f"trace.json.{number}"))] for number in range(3)]
    assert rotated == [[3, 4], [5, 7], [8]]


def test_what_an_earlier_server_left_is_replaced(make, read, tmp_path):
    (tmp_path / "trace.json").write_text("x" * 100_000)
    tracer = make()
    sampled(tracer)
    tracer.close()
    assert len(heads(read())) == 1


def test_the_file_can_be_read_after_every_trace(tmp_path):
    path = tmp_path / "array.json"
    file = ArrayFile(str(path))
    for number in range(5):
        file.append(b"%d" % number)
        assert json.loads(path.read_bytes()) == list(range(number + 1))
    file.close()


@pytest.mark.parametrize("written_before", [0, 2])
def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch, written_before):
    path = tmp_path / "array.json"
    file = ArrayFile(str(path))
    for number in range(written_before):
        file.append(b"%d" % number)
    real = os.pwrite

    def half(descriptor, data, offset):
        if len(data) > 10:
            return real(descriptor, data[:10], offset)
        monkeypatch.setattr(os, "pwrite", real)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", half)
    with pytest.raises(OSError, match="No space"):
        file.append(b'"a long text that is written in two pieces"')
    assert json.loads(path.read_bytes()) == list(range(written_before))
    file.append(b"9")
    assert json.loads(path.read_bytes()) == [*range(written_before), 9]
    file.close()


def test_traces_that_cannot_be_written_are_counted_and_told(make, tmp_path, caplog):
    tracer = make()
    (tmp_path / "trace.json").mkdir()
    sampled(tracer, "m", 4)
    tracer.close()
    assert tracer.dropped == 4
    assert sum(record.args[0] for record in caplog.records if record.levelno == logging.WARNING) == 4
    assert "directory" in caplog.text


def test_a_slow_disk_holds_up_nobody_and_bounds_what_waits(make, read, monkeypatch, caplog):
    monkeypatch.setattr(trace_file, "MAX_WAITING_TRACES", 10)
    gate, begun = threading.Event(), threading.Event()
    real = ArrayFile.append

    def append(file, objects):
        begun.set()
        assert gate.wait(30)
        real(file, objects)

    monkeypatch.setattr(ArrayFile, "append", append)
    tracer = make()
    sampled(tracer)
    assert begun.wait(30)
    sampled(tracer, "m", 25)
    assert tracer.dropped == 15
    gate.set()
    tracer.close()
    assert [one["id"] for one in heads(read())] == list(range(1, 12))
    assert "15" in caplog.text


def test_the_bytes_that_wait_are_bounded_too(make, monkeypatch):
    monkeypatch.setattr(trace_file, "MAX_WAITING_BYTES", 100)
    tracer = make(trace_level=BOTH)
    traces = [tracer.sample("m", "1", "") for _ in range(2)]
    traces[0].tensors("TENSOR_QUEUE_INPUT", [Tensor("x", DataType.INT8, (101,), b"\1" * 101)])
    traces[1].tensors("TENSOR_QUEUE_INPUT", [Tensor("x", DataType.INT8, (100,), b"\1" * 100)])
    for trace in traces:
        trace.end()
    tracer.close()
    assert tracer.dropped == 1


def test_a_bug_costs_one_trace_only(make, read, caplog):
    tracer = make()
    broken = tracer.sample("m", "1", "")
    broken.mark(object(), 1)
    broken.end()
    sampled(tracer)
    tracer.close()
    assert [one["id"] for one in heads(read())] == [2]
    assert tracer.dropped == 1
    assert "could not be written" in caplog.text


def test_after_its_end_nothing_is_traced(make, read):
    tracer = make()
    late = tracer.sample("m", "1", "")
    sampled(tracer)
    tracer.close()
    assert not tracer.active
    tracer.change({"trace_rate": ["1"]})
    assert not tracer.active
    assert tracer.sample("m", "1", "") is None
    late.end()
    tracer.close()
    assert [one["id"] for one in heads(read())] == [2]
    assert tracer.dropped == 1

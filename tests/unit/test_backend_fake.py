"""The fake backend: it echoes, and does every harm that it is asked for."""

import ctypes
import os
import signal

import numpy as np
import pytest

from headrace.core.model import TensorSpec
from headrace.core.tensor import DataType
from headrace_backends import fake
from headrace_backends.base import InputError, LoadError, ModelSource, RequestInfo
from headrace_backends.fake import FakeBackend

X = np.arange(6, dtype=np.float32).reshape(2, 3)


def load(tmp_path, **keywords):
    parameters = {key: keywords.pop(key) for key in list(keywords) if key.startswith("fake_") or key == "speed"}
    return FakeBackend.load(ModelSource("m", "1", tmp_path, parameters=parameters, **keywords))


def run(backend, *requests, rows=2):
    infos = [RequestInfo(1, str(index), parameters) for index, parameters in enumerate(requests)]
    return backend.execute({"x": X[:rows]}, infos)


def test_echoes_by_default(tmp_path):
    backend = load(tmp_path)
    assert backend.wants_requests
    assert backend.signature.max_batch_size == 32
    assert [spec.describe() for spec in backend.signature.inputs] == ["x FP32[-1, -1]"]
    np.testing.assert_array_equal(run(backend, {}, {})["y"], X)
    backend.close()


def test_echoes_configured_tensors_in_order(tmp_path):
    inputs = (TensorSpec("a", DataType.INT32, (-1,)), TensorSpec("b", DataType.BYTES, (2,)))
    outputs = (TensorSpec("c", DataType.INT32, (-1,)), TensorSpec("d", DataType.BYTES, (2,)))
    backend = load(tmp_path, inputs=inputs, outputs=outputs)
    assert backend.signature.max_batch_size == 0
    given = {"a": np.array([1], np.int32), "b": np.array([b"p", b"q"], object)}
    made = backend.execute(given, [])
    assert made["c"] is given["a"]
    assert made["d"] is given["b"]


@pytest.mark.parametrize(
    ("outputs", "problem"),
    [
        ((TensorSpec("y", DataType.FP16, (-1, -1)),), "cannot echo"),
        ((TensorSpec("y", DataType.FP32, None), TensorSpec("z", DataType.FP32, None)), "no more than its 1 inputs"),
    ],
)
def test_refuses_what_it_cannot_echo(tmp_path, outputs, problem):
    with pytest.raises(LoadError, match=problem):
        load(tmp_path, outputs=outputs)


def test_configured_faults_hit_every_batch(tmp_path):
    with pytest.raises(RuntimeError, match="out of cheese"):
        run(load(tmp_path, fake_fail="out of cheese"), {})
    with pytest.raises(InputError, match="too blue"):
        run(load(tmp_path, fake_input_error="too blue"), {})


def test_one_requests_fault_is_the_batchs_and_the_next_batch_is_well(tmp_path):
    backend = load(tmp_path)
    with pytest.raises(RuntimeError, match="mine"):
        run(backend, {}, {"fake_fail": "mine"})
    with pytest.raises(InputError, match="mine"):
        run(backend, {"fake_input_error": "mine"}, {})
    np.testing.assert_array_equal(run(backend, {}, {})["y"], X)


def test_delays_and_hangs_as_long_as_told(tmp_path, monkeypatch):
    slept = []
    monkeypatch.setattr(fake.time, "sleep", slept.append)
    backend = load(tmp_path, fake_delay_ms=20, fake_load_delay_ms="500")
    run(backend, {})
    run(backend, {"fake_delay_ms": 40, "fake_hang": 1})
    assert [seconds for seconds in slept if seconds] == [0.5, 0.02, 0.04, 1.0]


def test_a_delay_for_each_row_of_the_batch(tmp_path, monkeypatch):
    slept = []
    monkeypatch.setattr(fake.time, "sleep", slept.append)
    run(load(tmp_path, fake_delay_ms=20, fake_row_delay_ms=1.5), {})
    assert [seconds for seconds in slept if seconds] == [pytest.approx(0.02 + 0.0015 * len(X))]


@pytest.mark.parametrize("forever", [True, "true"])
def test_hangs_for_ever(tmp_path, monkeypatch, forever):
    naps = []

    def nap(seconds):
        naps.append(seconds)
        if len(naps) > 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(fake.time, "sleep", nap)
    backend = load(tmp_path, fake_hang=forever)
    with pytest.raises(KeyboardInterrupt):
        run(backend, {})


@pytest.mark.parametrize(("wanted", "rows"), [(True, 3), (1, 1), (0, 0), (5, 5), (False, 2)])
def test_bad_rows(tmp_path, wanted, rows):
    assert run(load(tmp_path), {"fake_bad_rows": wanted})["y"].shape == (rows, 3)


def test_crashes(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "_exit", lambda status: calls.append(("exit", status)))
    monkeypatch.setattr(os, "kill", lambda pid, number: calls.append(("kill", pid, number)))
    monkeypatch.setattr(ctypes, "string_at", lambda address: calls.append(("read", address)))
    monkeypatch.setitem(fake._CRASHES, "abort", lambda: calls.append(("abort",)))
    backend = load(tmp_path)
    for kind in ("exit", "kill", "segfault", "abort"):
        with pytest.raises(AssertionError, match="outlived"):
            run(backend, {"fake_crash": kind})
    assert calls == [("exit", 70), ("kill", os.getpid(), signal.SIGKILL), ("read", 0), ("abort",)]
    with pytest.raises(AssertionError, match="outlived its exit"):
        load(tmp_path, fake_load_crash="exit")


def test_memory_is_held_from_load_to_close(tmp_path):
    backend = load(tmp_path, fake_memory_mb=2)
    assert backend._ballast.nbytes == 2 << 20
    backend.close()
    assert backend._ballast is None


def test_load_fails_when_told(tmp_path):
    with pytest.raises(LoadError, match="bad day"):
        load(tmp_path, fake_load_fail="bad day")


@pytest.mark.parametrize(
    ("parameters", "problem"),
    [
        ({"speed": 1}, "no parameter 'speed'"),
        ({"fake_dely_ms": 1}, "no parameter 'fake_dely_ms'"),
        ({"fake_crash": "gently"}, "'gently', expected one of segfault"),
        ({"fake_delay_ms": -1}, "expected a number"),
        ({"fake_delay_ms": "soon"}, "expected a number"),
        ({"fake_bad_rows": 1.5}, "expected a number"),
        ({"fake_fail": True}, "expected the message"),
    ],
)
def test_wrong_parameters_are_named(tmp_path, parameters, problem):
    with pytest.raises(LoadError, match=problem):
        load(tmp_path, **parameters)
    if "speed" not in parameters:
        with pytest.raises(InputError, match="fake_"):
            run(load(tmp_path), parameters)


def test_a_requests_own_parameters_are_left_alone(tmp_path):
    run(load(tmp_path), {"priority": 1, "sequence_id": 7})
    with pytest.raises(InputError, match="fake_load_fail"):
        run(load(tmp_path), {"fake_load_fail": "x"})


def test_it_takes_turns_only_where_it_is_told_that_its_batches_are_heavy(tmp_path):
    assert load(tmp_path).cpu_threads == 0
    assert load(tmp_path, fake_cpu_threads=3).cpu_threads == 3
    with pytest.raises(LoadError, match="fake_cpu_threads is 1"):
        load(tmp_path, fake_cpu_threads=1.5)

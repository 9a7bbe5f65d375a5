"""The LiteRT backend: exact results, names by signature, quantised numbers as they are, batching that is proved."""

import numpy as np
import pytest

pytest.importorskip("ai_edge_litert", reason="LiteRT is not installed: pip install 'headrace[litert]'")

from tflite_nets import doubled_int8, less_their_mean, linear

from headrace.core.model import TensorSpec
from headrace.core.tensor import DataType
from headrace_backends import threads
from headrace_backends.base import InputError, LoadError, ModelSource
from headrace_backends.litert import LiteRtBackend
from headrace_backends.row_trial import MIXES

WEIGHTS = np.random.default_rng(3).standard_normal((5, 3)).astype(np.float32)
ROWS = np.random.default_rng(4).standard_normal((7, 5)).astype(np.float32)


def load(path, **keywords):
    return LiteRtBackend.load(ModelSource("m", "1", path, **keywords))


def test_results_and_what_the_signature_says(tmp_path):
    backend = load(linear(tmp_path / "m.tflite", WEIGHTS))
    assert backend.signature.inputs == (TensorSpec("x", DataType.FP32, (-1, 5)),)
    assert backend.signature.outputs == (TensorSpec("y", DataType.FP32, (-1, 3)),)
    assert backend.signature.max_batch_size == 32
    for count in (7, 1, 7, 3):
        answered = backend.execute({"x": ROWS[:count]}, [])["y"]
        np.testing.assert_allclose(answered, ROWS[:count] @ WEIGHTS, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(backend.execute({"x": ROWS[::2]}, [])["y"], ROWS[::2] @ WEIGHTS, rtol=1e-5, atol=1e-6)


def test_without_a_signature_names_are_the_graphs(tmp_path):
    backend = load(linear(tmp_path / "m.tflite", WEIGHTS, signatures=()))
    assert [spec.name for spec in backend.signature.inputs] == ["in:0"]
    for count in (7, 1, 7):
        answered = backend.execute({"in:0": ROWS[:count]}, [])["out:0"]
        np.testing.assert_allclose(answered, ROWS[:count] @ WEIGHTS, rtol=1e-5, atol=1e-6)


def test_outputs_are_the_callers_and_inputs_are_only_read(tmp_path):
    backend = load(linear(tmp_path / "m.tflite", WEIGHTS))
    given = ROWS.copy()
    given.flags.writeable = False
    first = backend.execute({"x": given}, [])["y"]
    kept = first.copy()
    backend.execute({"x": -ROWS}, [])
    np.testing.assert_array_equal(first, kept)


def test_which_signature(tmp_path):
    path = linear(tmp_path / "m.tflite", WEIGHTS, signatures=("encode", "decode"))
    with pytest.raises(LoadError, match=r"has the signatures decode, encode; choose one with parameters\.signature"):
        load(path)
    assert "signature 'encode' of decode, encode" in load(path, parameters={"signature": "encode"}).notes()
    with pytest.raises(LoadError, match=r"parameters\.signature is 'train', and 'm\.tflite' has decode, encode"):
        load(path, parameters={"signature": "train"})
    path = linear(tmp_path / "m.tflite", WEIGHTS, signatures=("encode", "serving_default"))
    assert "signature 'serving_default' of encode, serving_default" in load(path).notes()


def test_quantised_numbers_are_served_as_they_are(tmp_path):
    backend = load(doubled_int8(tmp_path / "m.tflite"))
    assert backend.signature.inputs == (TensorSpec("x", DataType.INT8, (-1, 4)),)
    x = np.array([[3, 5, 1, 13], [-7, 3, 4, 103]], np.int8)
    real = (x.astype(float) - 3) * 0.5
    np.testing.assert_array_equal(backend.execute({"x": x}, [])["y"], (2 * real - 1).astype(np.int8))
    assert "'x' is quantised: 0.5 x (INT8 - 3)" in backend.notes()
    assert "'y' is quantised: 1 x (INT8 - -1)" in backend.notes()


def test_rows_that_mix_are_not_merged(tmp_path):
    backend = load(less_their_mean(tmp_path / "m.tflite"))
    assert backend.signature.max_batch_size == 0
    assert MIXES in backend.notes()[0]


def test_a_file_for_one_row(tmp_path):
    path = linear(tmp_path / "m.tflite", WEIGHTS, rows=1)
    assert load(path).signature.max_batch_size == 0
    with pytest.raises(LoadError, match=r"max_batch_size is 8, but the first dimension of 'x' \[1, 5\] is not of any"):
        load(path, max_batch_size=8)


def test_a_wrong_shape_is_the_inputs_fault_and_the_model_goes_on(tmp_path):
    backend = load(linear(tmp_path / "m.tflite", WEIGHTS))
    with pytest.raises(InputError):
        backend.execute({"x": np.ones((2, 6), np.float32)}, [])
    np.testing.assert_allclose(backend.execute({"x": ROWS}, [])["y"], ROWS @ WEIGHTS, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_inputs_without_elements(tmp_path, shape):
    backend = load(linear(tmp_path / "m.tflite", WEIGHTS))
    with pytest.raises(InputError, match=r"input 'x' has the shape \[\d, \d\]; LiteRT takes no empty ones"):
        backend.execute({"x": np.ones(shape, np.float32)}, [])


def test_threads(tmp_path, monkeypatch):
    path = linear(tmp_path / "m.tflite", WEIGHTS)
    assert load(path, threads=2).cpu_threads == 0
    monkeypatch.setattr(threads, "LIGHT_MODEL_MS", -1.0)
    heavy = load(path, threads=2)
    assert heavy.cpu_threads == 2
    np.testing.assert_allclose(heavy.execute({"x": ROWS}, [])["y"], ROWS @ WEIGHTS, rtol=1e-5, atol=1e-6)
    heavy.close()


def test_refusals(tmp_path):
    path = linear(tmp_path / "m.tflite", WEIGHTS)
    with pytest.raises(LoadError, match=r"the backend litert has no parameter 'speed'"):
        load(path, parameters={"speed": 1})
    with pytest.raises(LoadError, match="device 'gpu:0' is not one for the backend litert"):
        load(path, device="gpu:0")
    path.write_bytes(b"TFL3" * 3)
    with pytest.raises(LoadError, match=r"cannot load 'm\.tflite'"):
        load(path)
    path.write_bytes(b"abc")
    with pytest.raises(LoadError, match=r"'m\.tflite' is no TensorFlow Lite model"):
        load(path)
    with pytest.raises(LoadError, match=r"cannot read 'no\.tflite': No such file"):
        load(tmp_path / "no.tflite")

"""What models find in triton_python_backend_utils: tensors, datatypes, responses, configurations, metrics."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headrace_backends.triton_python.errors import TritonModelException
from headrace_backends.triton_python.metrics import MAX_METRICS, ModelMetrics
from headrace_backends.triton_python.module import utilities
from headrace_backends.triton_python.requests import Calls


@pytest.fixture
def metrics():
    return ModelMetrics()


@pytest.fixture
def pb_utils(metrics):
    with ThreadPoolExecutor(1) as pool:
        yield utilities("m", Path("/models/m/1"), Calls(None, pool), metrics)


DOCUMENTED = """
    InferenceRequest InferenceResponse InferenceResponseSender InferenceTrace Logger MetricFamily MetricKind ModelConfig
    PreferredMemory Tensor TritonError TritonModelException TRITON_STRING_TO_NUMPY COUNTER GAUGE HISTOGRAM
    TRITONSERVER_MEMORY_CPU TRITONSERVER_MEMORY_GPU TRITONSERVER_REQUEST_FLAG_SEQUENCE_END
    TRITONSERVER_REQUEST_FLAG_SEQUENCE_START TRITONSERVER_REQUEST_RELEASE_ALL TRITONSERVER_REQUEST_RELEASE_RESCHEDULE
    TRITONSERVER_RESPONSE_COMPLETE_FINAL deserialize_bytes_tensor get_input_config_by_name get_input_tensor_by_name
    get_model_dir get_output_config_by_name get_output_tensor_by_name is_model_ready load_model numpy_to_triton_type
    serialize_byte_tensor triton_string_to_numpy triton_to_numpy_type unload_model
    using_decoupled_model_transaction_policy
"""


def test_everything_documented_is_there(pb_utils):
    assert [name for name in DOCUMENTED.split() if not hasattr(pb_utils, name)] == []
    assert pb_utils.__name__ == "triton_python_backend_utils"
    assert pb_utils.get_model_dir() == "/models/m/1"
    assert pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START | pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END == 3


def test_tensor(pb_utils):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensor = pb_utils.Tensor("x", array)
    assert (tensor.name(), tensor.shape(), tensor.triton_dtype(), tensor.is_cpu()) == ("x", [2, 3], 11, True)
    assert tensor.as_numpy() is array


@pytest.mark.parametrize(("data", "problem"), [([1.0], "made of list"), (np.ones(1, complex), "array of complex128")])
def test_what_is_no_tensor(pb_utils, data, problem):
    with pytest.raises((TypeError, TritonModelException), match=f"tensor 'x' is .*{problem}"):
        pb_utils.Tensor("x", data)


@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.bool_, np.uint8, ml_dtypes.bfloat16])
@pytest.mark.parametrize("by", ["capsule", "object"])
def test_dlpack_there_and_back(pb_utils, by, dtype):
    array = np.array([[0, 1], [1, 0]]).astype(dtype)
    tensor = pb_utils.Tensor("x", array)
    there = torch.utils.dlpack.from_dlpack(tensor.to_dlpack() if by == "capsule" else tensor)
    assert there.data_ptr() == array.ctypes.data
    assert there.float().tolist() == [[0.0, 1.0], [1.0, 0.0]]
    back = pb_utils.Tensor.from_dlpack("y", torch.utils.dlpack.to_dlpack(there) if by == "capsule" else there)
    assert back.name() == "y"
    assert back.as_numpy().dtype == array.dtype
    assert back.as_numpy().ctypes.data == array.ctypes.data


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (0, 3)])
def test_dlpack_keeps_the_shape(pb_utils, dtype, shape):
    there = torch.utils.dlpack.from_dlpack(pb_utils.Tensor("x", np.full(shape, 2).astype(dtype)).to_dlpack())
    assert tuple(there.shape) == shape
    assert tuple(pb_utils.Tensor.from_dlpack("y", there).shape()) == shape


def test_dlpack_of_memory_that_must_not_be_written(pb_utils):
    array = np.ones(3, np.float32)
    array.flags.writeable = False
    there = torch.utils.dlpack.from_dlpack(pb_utils.Tensor("x", array).to_dlpack())
    there += 1
    assert array.tolist() == [1.0, 1.0, 1.0]


def test_dlpack_does_not_have_text(pb_utils):
    with pytest.raises(TritonModelException, match="'x' is BYTES, which DLPack does not have"):
        pb_utils.Tensor("x", np.array([b"a"], object)).to_dlpack()


def test_dlpack_of_what_is_none(pb_utils):
    with pytest.raises(TypeError, match="expected a DLPack capsule or an object with __dlpack__, got list"):
        pb_utils.Tensor.from_dlpack("x", [1])


@pytest.mark.parametrize(
    ("name", "number", "kind"),
    [
        ("TYPE_BOOL", 1, np.bool_),
        ("TYPE_UINT8", 2, np.uint8),
        ("TYPE_INT64", 9, np.int64),
        ("TYPE_FP16", 10, np.float16),
        ("TYPE_FP64", 12, np.float64),
        ("TYPE_STRING", 13, np.object_),
        ("TYPE_BF16", 14, ml_dtypes.bfloat16),
    ],
)
def test_datatypes(pb_utils, name, number, kind):
    assert pb_utils.triton_string_to_numpy(name) is kind
    assert pb_utils.triton_to_numpy_type(number) is kind
    assert pb_utils.numpy_to_triton_type(kind) == number
    assert pb_utils.numpy_to_triton_type(np.dtype(kind)) == number


def test_datatypes_that_are_not_there(pb_utils):
    assert pb_utils.triton_to_numpy_type(0) is None
    assert pb_utils.numpy_to_triton_type(np.complex64) is None
    assert pb_utils.numpy_to_triton_type(np.bytes_) == 13


@given(elements=st.lists(st.binary(max_size=20)))
def test_text_in_wire_form_there_and_back(elements):
    from headrace_backends.triton_python.datatypes import deserialize_bytes_tensor, serialize_byte_tensor

    array = np.empty(len(elements), object)
    array[:] = elements
    assert deserialize_bytes_tensor(serialize_byte_tensor(array)).tolist() == elements


def test_text_in_wire_form(pb_utils):
    assert pb_utils.serialize_byte_tensor(np.array([["é", b"\0"], [5, ""]], object)) == (
        b"\2\0\0\0\xc3\xa9\1\0\0\0\0\1\0\0\0005\0\0\0\0"
    )
    for wrong in (b"\1", b"\1\0\0\0", b"\0\0\0\0\2\0\0\0a"):
        with pytest.raises(ValueError, match="ends inside its element"):
            pb_utils.deserialize_bytes_tensor(wrong)


def test_response(pb_utils):
    tensor = pb_utils.Tensor("y", np.ones(1))
    response = pb_utils.InferenceResponse(output_tensors=[tensor], parameters={"k": 1, "b": True})
    assert response.output_tensors() == [tensor]
    assert pb_utils.get_output_tensor_by_name(response, "y") is tensor
    assert pb_utils.get_output_tensor_by_name(response, "z") is None
    assert not response.has_error()
    assert response.error() is None
    assert json.loads(response.parameters()) == {"k": 1, "b": True}
    error = pb_utils.TritonError("no", pb_utils.TritonError.NOT_FOUND)
    failed = pb_utils.InferenceResponse([], error)
    assert failed.has_error()
    assert (failed.error().message(), failed.error().code(), str(error)) == ("no", 2, "no")
    assert pb_utils.TritonError("x").code() == pb_utils.TritonError.INTERNAL


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"output_tensors": [np.ones(1)]}, "has a ndarray, expected pb_utils.Tensor only"),
        ({"error": "no"}, "error is str, expected pb_utils.TritonError"),
        ({"parameters": {"k": [1]}}, r"parameter 'k' is \[1\]"),
    ],
)
def test_what_is_no_response(pb_utils, arguments, problem):
    with pytest.raises(TypeError, match=problem):
        pb_utils.InferenceResponse(**arguments)


def test_errors_have_known_codes(pb_utils):
    with pytest.raises(TritonModelException, match="codes 0 to 7, got 99"):
        pb_utils.TritonError("x", 99)


def test_request_of_ones_own_has_no_sender(pb_utils):
    request = pb_utils.InferenceRequest(model_name="o", requested_output_names=[], inputs=[])
    with pytest.raises(TritonModelException, match="only a request that execute was given"):
        request.get_response_sender()


CONFIG = {
    "name": "m",
    "max_batch_size": 2,
    "input": [{"name": "a", "data_type": "TYPE_FP32", "dims": [1]}],
    "output": [],
}


def test_configuration_lookups(pb_utils):
    assert pb_utils.get_input_config_by_name(CONFIG, "a") == CONFIG["input"][0]
    assert pb_utils.get_input_config_by_name(CONFIG, "b") is None
    assert pb_utils.get_output_config_by_name({}, "b") is None
    assert not pb_utils.using_decoupled_model_transaction_policy(CONFIG)
    assert pb_utils.using_decoupled_model_transaction_policy({"model_transaction_policy": {"decoupled": True}})


def test_completing_a_configuration(pb_utils):
    config = pb_utils.ModelConfig(json.dumps(CONFIG))
    config.as_dict()["input"].clear()
    config.add_input({"name": "a", "data_type": "TYPE_FP32", "dims": [1]})
    config.add_input({"name": "b", "data_type": "TYPE_INT8", "dims": [-1], "optional": True})
    config.add_output({"name": "c", "data_type": "TYPE_INT8", "dims": []})
    config.set_max_batch_size(2)
    config.set_model_transaction_policy({"decoupled": False})
    assert [tensor["name"] for tensor in config.as_dict()["input"]] == ["a", "b"]
    assert config.as_dict()["output"] == [{"name": "c", "data_type": "TYPE_INT8", "dims": []}]


def test_what_was_left_open_is_filled_in(pb_utils):
    open_config = {**CONFIG, "output": [{"name": "c", "data_type": "", "dims": []}]}
    config = pb_utils.ModelConfig(json.dumps(open_config))
    config.add_output({"name": "c", "data_type": "TYPE_INT8", "dims": [4]})
    assert config.as_dict()["output"] == [{"name": "c", "data_type": "TYPE_INT8", "dims": [4]}]


@pytest.mark.parametrize(
    ("method", "argument", "problem"),
    [
        ("add_input", {"name": "b"}, r"an input has the keys \['name'\], expected"),
        ("add_input", {"name": "b", "data_type": "TYPE_INT8", "dims": [1], "color": 1}, "'color'"),
        ("add_output", {"name": "b", "data_type": "TYPE_INT8", "dims": [1], "optional": True}, "'optional'"),
        ("add_input", {"name": "a", "data_type": "TYPE_INT8", "dims": [1]}, "'a' has data_type TYPE_FP32 in the conf"),
        ("add_input", {"name": "a", "data_type": "TYPE_FP32", "dims": [2]}, r"'a' has dims \[1\] in the conf"),
        ("set_max_batch_size", 1, "max_batch_size is 2 in the configuration, got 1"),
        ("set_max_batch_size", "4", "got '4'"),
        ("set_model_transaction_policy", {"coupled": True}, r"unknown keys \['coupled'\], expected decoupled"),
    ],
)
def test_what_does_not_complete_it(pb_utils, method, argument, problem):
    with pytest.raises(ValueError, match=problem):
        getattr(pb_utils.ModelConfig(json.dumps(CONFIG)), method)(argument)


def test_policies_that_exclude_each_other(pb_utils):
    config = pb_utils.ModelConfig(json.dumps({**CONFIG, "sequence_batching": {}}))
    with pytest.raises(ValueError, match="dynamic_batching does not go with the sequence_batching"):
        config.set_dynamic_batching()
    config = pb_utils.ModelConfig(json.dumps({**CONFIG, "model_transaction_policy": {"decoupled": True}}))
    with pytest.raises(ValueError, match="decoupled by its configuration"):
        config.set_model_transaction_policy({"decoupled": False})


def test_counter_and_gauge(pb_utils, metrics):
    counter = pb_utils.MetricFamily(name="c", description="C.", kind=pb_utils.MetricFamily.COUNTER).Metric()
    counter.increment(2)
    counter.increment(0.5)
    gauge = pb_utils.MetricFamily("g", "G.", pb_utils.GAUGE).Metric(labels={"b": "2", "a": "1"})
    gauge.increment(-3)
    assert gauge.value() == -3
    gauge.set(7)
    first, second = metrics.samples()
    assert (first.name, first.help, first.kind, first.labels, first.value) == ("c", "C.", "counter", (), 2.5)
    assert (second.kind, second.labels, second.value) == ("gauge", (("a", "1"), ("b", "2")), 7.0)


def test_histogram(pb_utils, metrics):
    family = pb_utils.MetricFamily(name="h", description="H.", kind=pb_utils.MetricFamily.HISTOGRAM)
    histogram = family.Metric(labels={"a": "1"}, buckets=[1, 2.5])
    for value in (0.5, 1, 2, 9):
        histogram.observe(value)
    (sample,) = metrics.samples()
    assert (sample.kind, sample.buckets, sample.value, sample.count) == ("histogram", ((1.0, 2), (2.5, 3)), 12.5, 4)


def test_same_name_and_labels_mean_the_same_metric(pb_utils, metrics):
    one = pb_utils.MetricFamily("c", "First.", pb_utils.COUNTER).Metric(labels={"a": "1"})
    other = pb_utils.MetricFamily("c", "Second.", pb_utils.COUNTER).Metric(labels={"a": "1"})
    one.increment(1)
    other.increment(1)
    (sample,) = metrics.samples()
    assert (sample.help, sample.value) == ("First.", 2.0)


@pytest.mark.parametrize(
    ("attempt", "problem"),
    [
        (lambda p: p.MetricFamily("c", "", p.GAUGE), "family 'c' is a COUNTER already, got GAUGE"),
        (lambda p: p.MetricFamily("2x", "", p.GAUGE), "'2x' cannot be a metric's name"),
        (lambda p: p.MetricFamily("c", "", p.COUNTER).Metric().increment(-1), "'c' is incremented by -1"),
        (lambda p: p.MetricFamily("c", "", p.COUNTER).Metric().set(1), r"'c' is a COUNTER, which has no set\(\)"),
        (lambda p: p.MetricFamily("c", "", p.COUNTER).Metric().observe(1), r"no observe\(\)"),
        (lambda p: p.MetricFamily("h", "", p.HISTOGRAM).Metric(buckets=[1]).value(), r"no value\(\)"),
        (lambda p: p.MetricFamily("h", "", p.HISTOGRAM).Metric(), "buckets belong to a HISTOGRAM, and every one has"),
        (lambda p: p.MetricFamily("c", "", p.COUNTER).Metric(buckets=[1]), "buckets belong to a HISTOGRAM"),
        (
            lambda p: p.MetricFamily("h", "", p.HISTOGRAM).Metric(buckets=[2, 1]),
            r"\[2.0, 1.0\], expected finite bounds that rise",
        ),
        (
            lambda p: p.MetricFamily("h", "", p.HISTOGRAM).Metric(buckets=[float("nan")]),
            "expected finite bounds that rise",
        ),
        (lambda p: p.MetricFamily("c", "", p.COUNTER).Metric(labels={"a-b": "1"}), "the label 'a-b': '1'"),
        (lambda p: p.MetricFamily("c", "", p.COUNTER).Metric(labels={"a": 1}), "the label 'a': 1, expected a name of"),
    ],
)
def test_metrics_that_make_no_sense(pb_utils, attempt, problem):
    pb_utils.MetricFamily("c", "", pb_utils.COUNTER)
    with pytest.raises(TritonModelException, match=problem):
        attempt(pb_utils)


def test_buckets_do_not_change(pb_utils):
    family = pb_utils.MetricFamily("h", "", pb_utils.HISTOGRAM)
    family.Metric(buckets=[1])
    with pytest.raises(TritonModelException, match=r"has the buckets \[1.0\], got \[2.0\]"):
        family.Metric(buckets=[2])


def test_metrics_are_bounded(pb_utils):
    family = pb_utils.MetricFamily("c", "", pb_utils.COUNTER)
    for number in range(MAX_METRICS):
        family.Metric(labels={"n": str(number)})
    family.Metric(labels={"n": "0"})
    with pytest.raises(TritonModelException, match=f"one more than the {MAX_METRICS} of a model"):
        family.Metric(labels={"n": "one more"})

"""Over every protocol a model answers with the very bits that ONNX Runtime gives in this process.

By default a few hundred operator models are compared; HEADRACE_TEST_OPERATORS=all takes every one there is.
"""

import http.client
import json
import os
import struct
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from operator_models import (
    DTYPES,
    REFUSALS,
    SHAPES,
    OperatorModel,
    Selection,
    Tensor,
    open_session,
    select,
    write_repository,
)
from running_server import RunningServer
from tritonclient.grpc import service_pb2, service_pb2_grpc

HALVES = {"FP16", "BF16"}  # which JSON and typed contents cannot carry
CONTENTS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


class Refused(Exception):
    """The server's status and what it said."""

    def __init__(self, status: object, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.message = message


@pytest.fixture(scope="module")
def selection() -> Selection:
    return select(everything=os.environ.get("HEADRACE_TEST_OPERATORS") == "all")


@pytest.fixture(scope="module")
def server(selection, tmp_path_factory):
    repository = write_repository(tmp_path_factory.mktemp("operators"), selection.contents())
    running = RunningServer(repository, "--model-control", "none")
    try:
        running.wait_ready(timeout_s=600)
        yield running
    finally:
        running.__exit__()


@pytest.fixture(scope="module")
def index(server) -> dict[str, dict]:
    status, entries = server.post("/v2/repository/index", {})
    assert status == 200
    return {entry["name"]: entry for entry in entries}


@pytest.fixture
def http_connection(server):
    host, port = server.http.split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    yield connection
    connection.close()


@pytest.fixture
def stub(server):
    with grpc.insecure_channel(server.grpc) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


# ---- what is compared ----


def test_the_models_cover_every_datatype_and_shape(selection):
    models = selection.models.values()
    assert len(models) >= 300
    assert {tensor.datatype for model in models for tensor in model.inputs} == set(DTYPES)
    operators = [model for model in models if not model.name.startswith("identity_")]
    assert {tensor.datatype for model in operators for tensor in model.tensors} == set(DTYPES)
    shapes = [tensor.array.shape for model in operators for tensor in model.tensors]
    assert () in shapes
    assert any(0 in shape for shape in shapes)
    assert any(not model.inputs for model in operators)


def test_the_selection_is_the_same_each_time(selection):
    again = select(everything=os.environ.get("HEADRACE_TEST_OPERATORS") == "all")
    assert again.contents() == selection.contents()
    assert _problems(selection.models.values(), lambda model: again.models[model.name].outputs) == {}


def test_every_model_is_served(selection, index):
    assert {name: index[name] for name in selection.models if index[name]["state"] != "READY"} == {}


def test_the_metadata_tell_the_file_s_tensors(selection, http_connection):
    wrong = {}
    for model in selection.models.values():
        http_connection.request("GET", f"/v2/models/{model.name}")
        metadata = json.loads(http_connection.getresponse().read())
        told = [(tensor["name"], tensor["datatype"]) for tensor in (*metadata["inputs"], *metadata["outputs"])]
        if told != [(tensor.name, tensor.datatype) for tensor in model.tensors]:
            wrong[model.name] = told
    assert wrong == {}


# ---- what ONNX Runtime answers ----


def test_http_binary(selection, http_connection):
    assert _problems(selection.models.values(), lambda model: _ask_http(http_connection, model, "binary")) == {}


@pytest.mark.parametrize("form", ["flat", "nested"])
def test_http_json(selection, http_connection, form):
    """Tensors of half precision beside the others travel as binary data in the same request."""
    assert _problems(selection.models.values(), lambda model: _ask_http(http_connection, model, form)) == {}


def test_grpc_raw(selection, stub):
    assert _problems(selection.models.values(), lambda model: _ask_grpc(stub, model, typed=False)) == {}


def test_grpc_typed(selection, stub):
    models = [model for model in selection.models.values() if not _halves(model.inputs)]
    assert len(models) > 200
    assert _problems(models, lambda model: _ask_grpc(stub, model, typed=True)) == {}


def test_many_clients_at_once(selection, server):
    """What others ask meanwhile, and requests that share a batch, change no bit of anyone's answer."""
    models = [*selection.models.values()]
    merged = [model for model in models if model.name.startswith("identity_") and "rows" in model.name]
    turns = [models[start::7] + merged * 3 for start in range(7)]

    def ask(mine: list[OperatorModel]) -> dict[str, str]:
        host, port = server.http.split(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=60)
        try:
            return _problems(mine, lambda model: _ask_http(connection, model, "binary"))
        finally:
            connection.close()

    with ThreadPoolExecutor(len(turns)) as clients:
        assert [found for found in clients.map(ask, turns) if found] == []


# ---- what nobody can answer ----


def test_half_precision_as_json_is_refused(selection, http_connection):
    answered, asked = {}, 0
    for model in selection.models.values():
        halves = _halves(model.inputs) or _halves(model.outputs)
        if not halves:
            continue
        asked += 1
        try:
            _ask_http(http_connection, model, "flat", all_json=True)
        except Refused as refused:
            if refused.status != 400 or halves[0].name not in refused.message or "JSON" not in refused.message:
                answered[model.name] = str(refused)
        else:
            answered[model.name] = "answered"
    assert asked >= 2 * len(SHAPES)
    assert answered == {}


def test_half_precision_as_typed_contents_is_refused(selection, stub):
    models = [model for model in selection.models.values() if any(one.array.size for one in _halves(model.inputs))]
    assert len(models) >= 10
    for model in models:
        with pytest.raises(Refused) as refused:
            _ask_grpc(stub, model, typed=True)
        assert refused.value.status is grpc.StatusCode.INVALID_ARGUMENT, (model.name, refused.value)
        assert "raw_input_contents" in refused.value.message


def test_types_without_a_datatype_are_refused_at_load(selection, index):
    """Sequences, optionals and the small floats and integers: the reason names the tensor and its type."""
    assert len(selection.foreign) >= 8
    for name, content in selection.foreign.items():
        entry = index[name]
        assert entry["state"] == "UNAVAILABLE", name
        assert entry["reason"], name
        if _loads_here(content):
            assert "which the protocol has no datatype for" in entry["reason"], entry


def test_what_onnx_runtime_does_not_load_is_unavailable_with_its_reason(selection, index):
    assert selection.unloadable
    for name in selection.unloadable:
        assert index[name]["state"] == "UNAVAILABLE", name
        assert "cannot load" in index[name]["reason"], index[name]


def test_what_onnx_runtime_does_not_run_is_a_bad_request(selection, http_connection, stub):
    for model in selection.unrunnable.values():
        with pytest.raises(Refused) as refused:
            _ask_http(http_connection, model, "binary")
        assert refused.value.status == 400, (model.name, refused.value)
        with pytest.raises(Refused) as refused:
            _ask_grpc(stub, model, typed=False)
        assert refused.value.status is grpc.StatusCode.INVALID_ARGUMENT, (model.name, refused.value)


def _loads_here(content: bytes) -> bool:
    try:
        open_session(content)
    except REFUSALS:
        return False
    return True


# ---- comparing ----


def _problems(models: Iterable[OperatorModel], ask: Callable[[OperatorModel], Iterable[Tensor]]) -> dict[str, str]:
    """What is wrong with the answers, by model."""
    found = {}
    for model in models:
        try:
            problem = _difference(model.outputs, tuple(ask(model)))
        except Refused as refused:
            problem = str(refused)
        if problem:
            found[model.name] = problem
    return found


def _difference(expected: tuple[Tensor, ...], given: tuple[Tensor, ...]) -> str:
    names = [[tensor.name for tensor in tensors] for tensors in (expected, given)]
    if names[0] != names[1]:
        return f"outputs {names[1]}, expected {names[0]}"
    for wanted, got in zip(expected, given, strict=True):
        if (wanted.datatype, wanted.array.shape) != (got.datatype, got.array.shape):
            return f"{got.name} is {got.datatype}{got.array.shape}, expected {wanted.datatype}{wanted.array.shape}"
        if not _same_bits(wanted.array, got.array):
            return f"{got.name} is {got.array.reshape(-1)[:8]}, expected {wanted.array.reshape(-1)[:8]}"
    return ""


def _same_bits(expected: np.ndarray, given: np.ndarray) -> bool:
    """Whether every element is the same: -0.0 is not 0.0, and any NaN is as good as another."""
    if expected.dtype == object:
        return expected.tolist() == given.tolist()
    if expected.dtype.kind in "biu":
        return bool((expected == given).all())
    bits = np.dtype(f"u{expected.dtype.itemsize}")
    views = [np.ascontiguousarray(array).reshape(-1).view(bits) for array in (expected, given)]
    both_nan = (np.isnan(expected) & np.isnan(given)).reshape(-1)
    return bool(((views[0] == views[1]) | both_nan).all())


def _halves(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor.datatype in HALVES]


# ---- asking ----


def _raw(tensor: Tensor) -> bytes:
    if tensor.datatype != "BYTES":
        return tensor.array.tobytes()
    elements = [element.encode() for element in tensor.array.reshape(-1).tolist()]
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


def _from_raw(name: str, datatype: str, shape: list[int], raw: bytes) -> Tensor:
    if datatype != "BYTES":
        return Tensor(name, datatype, np.frombuffer(raw, DTYPES[datatype]).reshape(shape))
    texts = []
    while raw:
        (size,) = struct.unpack_from("<I", raw)
        texts.append(raw[4 : 4 + size].decode())
        raw = raw[4 + size :]
    return _texts(name, shape, texts)


def _texts(name: str, shape: list[int], texts: list[str]) -> Tensor:
    return Tensor(name, "BYTES", np.array([*texts, None], dtype=object)[:-1].reshape(shape))


def _ask_http(connection, model: OperatorModel, form: str, all_json: bool = False) -> list[Tensor]:
    """One request; ``form`` is binary, or how arrays are written in JSON: flat or nested."""

    def is_binary(tensor: Tensor) -> bool:
        return form == "binary" or (tensor.datatype in HALVES and not all_json)

    inputs, blobs = [], []
    for tensor in model.inputs:
        item = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.array.shape)}
        if is_binary(tensor):
            blobs.append(_raw(tensor))
            item["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            array = tensor.array.astype(np.float32) if tensor.datatype == "BF16" else tensor.array
            item["data"] = (array if form == "nested" else array.reshape(-1)).tolist()
        inputs.append(item)
    request: dict = {"inputs": inputs}
    if form == "binary":
        request["parameters"] = {"binary_data_output": True}
    else:
        request["outputs"] = [
            {"name": tensor.name, "parameters": {"binary_data": is_binary(tensor)}} for tensor in model.outputs
        ]
    header = json.dumps(request).encode()
    headers = {"Inference-Header-Content-Length": str(len(header))} if blobs else {}
    connection.request("POST", f"/v2/models/{model.name}/infer", b"".join((header, *blobs)), headers)
    response = connection.getresponse()
    body = response.read()
    if response.status != 200:
        raise Refused(response.status, json.loads(body)["error"])
    length = int(response.headers.get("Inference-Header-Content-Length", len(body)))
    answer = json.loads(body[:length])
    rest = body[length:]
    outputs = []
    for item in answer["outputs"]:
        name, datatype, shape = item["name"], item["datatype"], item["shape"]
        if "data" not in item:
            size = item["parameters"]["binary_data_size"]
            outputs.append(_from_raw(name, datatype, shape, rest[:size]))
            rest = rest[size:]
        elif datatype == "BYTES":
            outputs.append(_texts(name, shape, item["data"]))
        else:
            outputs.append(Tensor(name, datatype, _numbers(item["data"], datatype).reshape(shape)))
    assert not rest, "nothing follows the last output"
    return outputs


def _numbers(data: list, datatype: str) -> np.ndarray:
    """JSON's numbers as an array, without a rounding of numpy's own for integers that no double can hold."""
    dtype = DTYPES[datatype]
    if dtype.kind in "biu":
        assert all(type(value) is (bool if dtype.kind == "b" else int) for value in data)
        return np.array(data, dtype=dtype)
    return np.array(data, dtype=np.float64).astype(dtype)


def _ask_grpc(stub, model: OperatorModel, typed: bool) -> list[Tensor]:
    request = service_pb2.ModelInferRequest(model_name=model.name)
    for tensor in model.inputs:
        item = request.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.array.shape)
        if not typed:
            request.raw_input_contents.append(_raw(tensor))
            continue
        values = tensor.array.reshape(-1).tolist()
        if tensor.datatype == "BYTES":
            values = [value.encode() for value in values]
        elif tensor.datatype in HALVES:
            values = tensor.array.astype(np.float32).reshape(-1).tolist()
        getattr(item.contents, CONTENTS.get(tensor.datatype, "fp32_contents")).extend(values)
    try:
        response = stub.ModelInfer(request, timeout=60)
    except grpc.RpcError as error:
        raise Refused(error.code(), error.details()) from None
    assert len(response.raw_output_contents) == len(response.outputs)
    return [
        _from_raw(item.name, item.datatype, list(item.shape), raw)
        for item, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    ]

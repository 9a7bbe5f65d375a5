"""OpenVINO models, served: IR and ONNX files, over both protocols, batched, replaced, refused and shared."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import pytest
import tritonclient.grpc
import tritonclient.http
from onnx import TensorProto, helper, numpy_helper
from running_server import RunningServer

from headrace_backends.openvino_quietly import ov

WEIGHTS = np.random.default_rng(5).standard_normal((20, 6)).astype(np.float32)


def save_ir(folder, factor=1.0):
    folder.mkdir(parents=True)
    x = ov.opset13.parameter([-1, 20], ov.Type.f32)
    x.output(0).set_names({"x"})
    y = ov.opset13.matmul(x, ov.opset13.constant(WEIGHTS * np.float32(factor)), False, False)
    y.output(0).set_names({"y"})
    ov.save_model(ov.Model([y], [x], "m"), folder / "model.xml", compress_to_fp16=False)


def save_onnx(folder):
    folder.mkdir(parents=True)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "graph",
        [value("x", TensorProto.FLOAT, ["n", 20])],
        [value("y", TensorProto.FLOAT, ["n", 6])],
        [numpy_helper.from_array(WEIGHTS, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, folder / "model.onnx")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    repository = tmp_path_factory.mktemp("openvino")
    save_ir(repository / "ir/1")
    save_onnx(repository / "onnx/1")
    (repository / "onnx/config.yaml").write_text("{backend: openvino, parameters: {precision: f32, profiling: true}}")
    save_ir(repository / "weightless/1")
    (repository / "weightless/1/model.bin").unlink()
    (repository / "other/1").mkdir(parents=True)
    (repository / "other/1/model.xml").write_text("<?xml version='1.0'?><project/>")
    # All but the first share processes.
    with RunningServer(repository, "--model-control", "explicit", "--load-model", "*", "--max-own-workers", "1") as one:
        yield one


def over_http(server, name, rows):
    given = tritonclient.http.InferInput("x", rows.shape, "FP32")
    given.set_data_from_numpy(rows, binary_data=True)
    client = tritonclient.http.InferenceServerClient(server.http)
    try:
        return client.infer(name, [given]).as_numpy("y")
    finally:
        client.close()


def over_grpc(server, name, rows):
    given = tritonclient.grpc.InferInput("x", rows.shape, "FP32")
    given.set_data_from_numpy(rows)
    with tritonclient.grpc.InferenceServerClient(server.grpc) as client:
        return client.infer(name, [given]).as_numpy("y")


@pytest.mark.parametrize("ask", [over_http, over_grpc])
@pytest.mark.parametrize("name", ["ir", "onnx"])
def test_answers(server, ask, name):
    rows = np.random.default_rng(1).standard_normal((9, 20)).astype(np.float32)
    np.testing.assert_allclose(ask(server, name, rows), rows @ WEIGHTS, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ask(server, name, rows[:1]), rows[:1] @ WEIGHTS, rtol=1e-4, atol=1e-5)


def test_the_files_tell_everything(server):
    status, metadata = server.get("/v2/models/ir")
    assert (status, metadata["platform"]) == (200, "openvino")
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 20]}]
    assert metadata["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [-1, 6]}]
    status, config = server.get("/v2/models/ir/config")
    assert (status, config["backend"], config["max_batch_size"]) == (200, "openvino", 32)


def test_many_clients_get_their_own_rows(server):
    rows = np.random.default_rng(2).standard_normal((64, 20)).astype(np.float32)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda row: over_http(server, "ir", row[np.newaxis]), rows))
    np.testing.assert_allclose(np.concatenate(answers), rows @ WEIGHTS, rtol=1e-4, atol=1e-5)


def test_what_is_wrong_with_a_file_is_told(server):
    status, index = server.post("/v2/repository/index", {})
    assert status == 200
    states = {entry["name"]: entry["state"] for entry in index if entry["version"] == "1"}
    assert states == {"ir": "READY", "onnx": "READY", "weightless": "UNAVAILABLE", "other": "UNAVAILABLE"}
    reasons = {entry["name"]: entry["reason"] for entry in index if entry["version"] == "1"}
    assert "'model.xml' keeps its weights in 'model.bin', and there is no such file beside it" in reasons["weightless"]
    assert "cannot load 'model.xml': it is not in the format OpenVINO IR" in reasons["other"]


def test_a_wrong_row_is_the_clients_fault_and_the_model_goes_on(server):
    with pytest.raises(tritonclient.http.InferenceServerException) as caught:
        over_http(server, "ir", np.ones((2, 21), np.float32))
    assert caught.value.status() == "400"
    assert over_http(server, "ir", np.zeros((1, 20), np.float32)).tolist() == [[0] * 6]


def test_a_new_version_replaces_the_old_one(server):
    save_ir(server.repository / "ir/2", factor=2)
    assert server.post("/v2/repository/models/ir/load", {})[0] == 200
    row = np.ones((1, 20), np.float32)
    np.testing.assert_allclose(over_http(server, "ir", row), 2 * row @ WEIGHTS, rtol=1e-4, atol=1e-5)
    shutil.rmtree(server.repository / "ir/2")
    assert server.post("/v2/repository/models/ir/load", {})[0] == 200
    np.testing.assert_allclose(over_http(server, "ir", row), row @ WEIGHTS, rtol=1e-4, atol=1e-5)

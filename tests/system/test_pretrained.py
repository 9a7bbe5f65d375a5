"""A real pretrained model, served: its answers are those of the library that it comes from.

Magika tells the kind of a file from its first and last bytes. Here the library prepares the input and the
server runs the model.
"""

import json
import math
import py_compile
import shutil
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import magika
import numpy as np
import onnxruntime
import pytest
import tritonclient.grpc
import tritonclient.http
from magika.types import Seekable
from running_server import RunningServer

ROOT = Path(__file__).parents[2]
STDLIB = Path(sysconfig.get_path("stdlib"))
FILES = [
    ROOT / "pyproject.toml",
    ROOT / "LICENSE",
    ROOT / "Makefile",
    ROOT / "model_repository/digits/1/model.onnx",
    ROOT / "deploy/compose/compose.yaml",
    ROOT / "deploy/grafana/headrace.json",
    ROOT / "proto/health.proto",
    ROOT / "server/headrace/app.py",
    STDLIB / "json/decoder.py",
    Path(sys.executable).resolve(),
]


@pytest.fixture(scope="module")
def library() -> magika.Magika:
    return magika.Magika()


@pytest.fixture(scope="module")
def model_path(library) -> Path:
    return Path(magika.__file__).parent / "models" / library.get_model_name() / "model.onnx"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    """Files of many kinds, compiled code among them."""
    compiled = tmp_path_factory.mktemp("compiled") / "decoder.pyc"
    py_compile.compile(json.decoder.__file__, str(compiled), doraise=True)
    return [*FILES, compiled]


@pytest.fixture(scope="module")
def rows(library, files) -> np.ndarray:
    """The library's own preprocessing of each file."""
    return np.array([_prepared(library, path) for path in files], dtype=np.int32)


@pytest.fixture(scope="module")
def server(model_path, tmp_path_factory):
    repository = tmp_path_factory.mktemp("pretrained")
    (repository / "magika/1").mkdir(parents=True)
    shutil.copy(model_path, repository / "magika/1/model.onnx")
    with RunningServer(repository, "--model-control", "none") as running:
        yield running


@pytest.fixture(scope="module")
def direct(model_path) -> onnxruntime.InferenceSession:
    """ONNX Runtime in this process, on as many threads as the library takes by itself."""
    return onnxruntime.InferenceSession(model_path, providers=["CPUExecutionProvider"])


def _prepared(library: magika.Magika, path: Path) -> list[int]:
    with path.open("rb") as stream:
        result, features = library._get_result_or_features_from_seekable(Seekable(stream), path)
    assert result is None, f"{path} is for the model, not for a rule"
    assert features is not None
    return [*features.beg, *features.end]


def _over_http(server, rows: np.ndarray) -> np.ndarray:
    given = tritonclient.http.InferInput("bytes", rows.shape, "INT32")
    given.set_data_from_numpy(rows, binary_data=True)
    client = tritonclient.http.InferenceServerClient(server.http)
    try:
        return client.infer("magika", [given]).as_numpy("target_label")
    finally:
        client.close()


def _over_grpc(server, rows: np.ndarray) -> np.ndarray:
    given = tritonclient.grpc.InferInput("bytes", rows.shape, "INT32")
    given.set_data_from_numpy(rows)
    with tritonclient.grpc.InferenceServerClient(server.grpc) as client:
        return client.infer("magika", [given]).as_numpy("target_label")


ASK = pytest.mark.parametrize("ask", [_over_http, _over_grpc], ids=["http", "grpc"])


def test_the_file_tells_everything(server, rows):
    status, metadata = server.get("/v2/models/magika")
    assert status == 200
    assert metadata["inputs"] == [{"name": "bytes", "datatype": "INT32", "shape": [-1, rows.shape[1]]}]
    (output,) = metadata["outputs"]
    assert (output["name"], output["datatype"], output["shape"][0]) == ("target_label", "FP32", -1)
    status, config = server.get("/v2/models/magika/config")
    assert status == 200
    assert config["max_batch_size"] > 1, "its rows are independent, and its leading dimension is free"


@ASK
def test_one_file_at_a_time(server, library, direct, files, rows, ask):
    """The same label and the same score as the library gives, and what ONNX Runtime gives for all labels."""
    labels = library._target_labels_space
    for path, row in zip(files, rows, strict=True):
        (scores,) = ask(server, row[np.newaxis])
        expected = library.identify_path(path).prediction
        assert labels[scores.argmax()] == expected.dl.label, path
        assert math.isclose(scores.max(), expected.score, rel_tol=1e-4), path
        (reference,) = direct.run(["target_label"], {"bytes": row[np.newaxis]})[0]
        np.testing.assert_allclose(scores, reference, rtol=1e-4, atol=1e-5)


@ASK
def test_all_files_in_one_request(server, library, direct, files, rows, ask):
    scores = ask(server, rows)
    expected = [library.identify_path(path).prediction for path in files]
    labels = [library._target_labels_space[best] for best in scores.argmax(axis=1)]
    assert labels == [one.dl.label for one in expected]
    assert len(set(labels)) >= 6, "the files are of many kinds"
    np.testing.assert_allclose(scores.max(axis=1), [one.score for one in expected], rtol=1e-4)
    np.testing.assert_allclose(scores, direct.run(["target_label"], {"bytes": rows})[0], rtol=1e-4, atol=1e-5)


def test_more_files_than_a_batch_holds(server, direct, rows):
    many = np.tile(rows, (7, 1))
    _, config = server.get("/v2/models/magika/config")
    assert len(many) > config["max_batch_size"]
    np.testing.assert_allclose(
        _over_http(server, many),
        np.tile(direct.run(["target_label"], {"bytes": rows})[0], (7, 1)),
        rtol=1e-4,
        atol=1e-5,
    )


@ASK
def test_many_clients_at_once(server, direct, rows, ask):
    """Requests that are merged into batches get the rows that belong to them."""
    reference = direct.run(["target_label"], {"bytes": rows})[0]
    turns = [*range(len(rows))] * 6
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda turn: ask(server, rows[turn : turn + 1]), turns))
    np.testing.assert_allclose(np.concatenate(answers), reference[turns], rtol=1e-4, atol=1e-5)

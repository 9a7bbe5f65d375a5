"""What the README shows works as it is shown: the first requests, the configuration, the Python model."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from running_server import RunningServer
from system.load import python_model

from headrace.repository.model_config import ModelConfig, parse_config

ROOT = Path(__file__).parents[2]


def blocks(language):
    """The README's code blocks in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def block(language, holds):
    """The one block that has these words."""
    (found,) = [text for text in blocks(language) if holds in text]
    return found


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    repository = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "model_repository" / "digits", repository / "digits")
    python_model(repository, "example", block("python", "class Model"))
    with RunningServer(repository) as running:
        yield running


def test_the_first_request_with_curl(server):
    if shutil.which("curl") is None:
        pytest.skip("there is no curl on this machine")
    command = block("sh", "curl -s localhost:8000/v2/models/digits/infer").replace("localhost:8000", server.http)
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=True)
    (output,) = json.loads(ended.stdout)["outputs"]
    probabilities = output["data"]
    assert probabilities.index(max(probabilities)) == 7
    shown = block("json", "probabilities")
    assert output["name"] == re.search(r'"outputs":\[{"name":"(\w+)"', shown)[1]
    assert output["shape"] == [1, 10]
    first = float(re.search(r'"data":\[([^,]+),', shown)[1])
    assert probabilities[0] == pytest.approx(first, rel=0.05, abs=1e-12)


def test_the_first_request_with_tritonclient(server):
    code = block("python", "tritonclient").replace("localhost:8001", server.grpc)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["7"]


def test_every_key_of_the_configuration_is_shown():
    shown = parse_config(block("yaml", "max_batch_size"))
    on_pages_of_their_own = {"ensemble", "sequence"}  # which test_docs.py reads
    assert shown.model_fields_set == ModelConfig.model_fields.keys() - on_pages_of_their_own - {"optimize"}


def test_the_python_model_serves(server):
    assert server.model_ready("example"), server.output
    body = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [2], "data": ["one", "three"]}]}
    status, answer = server.post("/v2/models/example/infer", body)
    assert status == 200, answer
    assert answer["outputs"][0]["data"] == [3, 5]


def test_whoever_asks_for_nothing_is_told_where_the_paths_are(server):
    status, answer = server.get("/")
    assert (status, answer["error"]) == (404, "Not Found: there is no GET / on this server; /docs shows its paths")
    assert server.get("/docs")[0] == 200
    status, answer = server.get("/v2/models/nothing/ready")
    assert (status, answer["error"]) == (400, "model 'nothing' is not ready; POST /v2/repository/index says why")


def test_the_options_that_are_shown_exist():
    ended = subprocess.run(
        [sys.executable, "-m", "headrace", "serve", "--help"], capture_output=True, text=True, timeout=120, check=True
    )
    flags = set(re.findall(r"^\| `(--[a-z-]+)`", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert flags
    assert not [flag for flag in flags if flag not in ended.stdout]

"""``headrace.client`` and ``headrace infer`` against a real server, over both protocols, waiting and not."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading

import ml_dtypes
import numpy as np
import pytest
from running_server import RunningServer
from system.load import fake_model, gated_model, python_model

from headrace.client import (
    AsyncClient,
    Client,
    ConnectionFailed,
    DeadlineError,
    InferenceError,
    InvalidRequestError,
    NotFoundError,
    UnavailableError,
)
from headrace.core.tensor import NUMPY_DTYPES, DataType

ANY = """
    import ml_dtypes
    import numpy as np

    TYPES = {
        "BOOL": "?", "UINT8": "u1", "UINT16": "u2", "UINT32": "u4", "UINT64": "u8", "INT8": "i1", "INT16": "i2",
        "INT32": "i4", "INT64": "i8", "FP16": "f2", "BF16": ml_dtypes.bfloat16, "FP32": "f4", "FP64": "f8",
        "BYTES": "O",
    }


    class Model:
        inputs = [{"name": f"x_{name}", "datatype": name, "optional": True} for name in TYPES]
        outputs = [{"name": f"y_{name}", "datatype": name} for name in TYPES]

        def infer(self, inputs):
            return {f"y_{name}": inputs.get(f"x_{name}", np.zeros(0, dtype)) for name, dtype in TYPES.items()}
"""

COUNTING = """
    import time

    import numpy as np


    class Model:
        inputs = [
            {"name": "count", "datatype": "INT32", "shape": [1]},
            {"name": "fail_at", "datatype": "INT32", "shape": [1]},
        ]
        outputs = [
            {"name": "number", "datatype": "INT32", "shape": [1]},
            {"name": "text", "datatype": "BYTES", "shape": [1]},
        ]

        def infer(self, inputs):
            for number in range(int(inputs["count"][0])):
                if number == int(inputs["fail_at"][0]):
                    raise RuntimeError(f"cannot count to {number}")
                yield {"number": np.array([number], np.int32), "text": np.array([f"number {number}"], object)}
                time.sleep(0.005)
"""

CONSTANT = """
    import numpy as np


    class Model:
        inputs = [{"name": "x", "datatype": "FP32", "shape": [1]}]
        outputs = [{"name": "y", "datatype": "INT32", "shape": [1]}]

        def infer(self, inputs):
            return {"y": np.array([%d], np.int32)}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    repository = tmp_path_factory.mktemp("repository")
    python_model(repository, "any", ANY)
    python_model(repository, "rows")
    python_model(repository, "counting", COUNTING)
    python_model(repository, "versions", CONSTANT % 1, 1, "versions: all\n")
    python_model(repository, "versions", CONSTANT % 2, 2)
    fake_model(repository, "fake", "max_batch_size: 1\nbatching: {max_queue_size: 2}\n")
    # by default a model that was slow just now refuses at arrival what has too little time, which is another error
    gate = gated_model(repository, "slow", "batching: {refuse_late: false}\n")
    with RunningServer(repository, "--model-control", "explicit", "--load-model", "*") as running:
        running.gate = gate
        yield running


class Driven:
    """An AsyncClient called as a Client is, on a loop of its own; streams come as iterators over all their parts."""

    def __init__(self, url):
        self._runner = asyncio.Runner()
        self._client = self._runner.run(self._make(url))

    async def _make(self, url):
        return AsyncClient(url)

    def __getattr__(self, name):
        method = getattr(self._client, name)

        async def collect(*arguments, **named):
            return [part async for part in method(*arguments, **named)]

        run = collect if name == "stream" else method
        return lambda *arguments, **named: self._runner.run(run(*arguments, **named))

    def close(self):
        self._runner.run(self._client.close())
        self._runner.close()


KINDS = [(Client, "http"), (Client, "grpc"), (Driven, "http"), (Driven, "grpc")]


def url_of(server, protocol):
    return f"{protocol}://{getattr(server, protocol)}"


@pytest.fixture(params=KINDS, ids=["sync-http", "sync-grpc", "async-http", "async-grpc"])
def client(request, server):
    make, protocol = request.param
    made = make(url_of(server, protocol))
    yield made
    made.close()


@pytest.fixture(params=["http", "grpc"])
def url(request, server):
    return url_of(server, request.param)


# -- inference -----------------------------------------------------------------------------------------------------


def test_every_datatype_goes_there_and_back(client):
    arrays = {}
    for datatype, dtype in NUMPY_DTYPES.items():
        if datatype is DataType.BYTES:
            arrays[datatype] = np.array([[b"\xff\x00", "ä".encode()], [b"", b"z" * 1000]], object)
        else:
            arrays[datatype] = np.array([[0, 1, 1], [1, 0, 1]]).astype(dtype)
    result = client.infer("any", {f"x_{name}": array for name, array in arrays.items()})
    assert (result.model_name, result.model_version) == ("any", "1")
    for name, array in arrays.items():
        got = result[f"y_{name}"]
        assert got.dtype == array.dtype
        assert got.shape == array.shape
        assert got.tolist() == array.tolist()
        assert got.flags.writeable


def test_values_that_are_hard_to_carry(client):
    odd = np.array([np.nan, np.inf, -np.inf, -0.0, 1e-45], np.float32)
    large = np.arange(3_000_000, dtype=np.float64)  # over gRPC's usual bound of 4 MiB
    inputs = {"x_FP32": odd, "x_FP64": large, "x_INT8": np.zeros((0, 4), np.int8), "x_INT16": np.array(-7, np.int16)}
    result = client.infer("any", inputs)
    assert result["y_FP32"].tobytes() == odd.tobytes()
    np.testing.assert_array_equal(result["y_FP64"], large)
    assert result["y_INT8"].shape == (0, 4)
    assert (result["y_INT16"].shape, result["y_INT16"].item()) == ((), -7)


def test_lists_become_what_the_model_declares(client):
    result = client.infer(
        "any", {"x_BF16": [[1, 2.5]], "x_BYTES": ["a", b"\xff"], "x_UINT64": [2**64 - 1], "x_BOOL": [True]}
    )
    assert result["y_BF16"].dtype == ml_dtypes.bfloat16
    assert result["y_BF16"].tolist() == [[1, 2.5]]
    assert result["y_BYTES"].tolist() == [b"a", b"\xff"]
    assert result["y_UINT64"].tolist() == [2**64 - 1]
    assert result["y_BOOL"].tolist() == [True]


def test_outputs_ids_and_versions(client):
    result = client.infer("any", {"x_INT8": [3]}, outputs=["y_INT8", "y_FP32"], id="request 7", parameters={"p": 1})
    assert list(result.outputs) == ["y_INT8", "y_FP32"]
    assert result.id == "request 7"
    assert [client.infer("versions", {"x": [0]}, version=one)["y"].item() for one in ("1", "2", "")] == [1, 2, 2]


def test_refusals_are_the_same_over_both_protocols(client):
    x = np.zeros((1, 2), np.float32)
    for kind, said, call in (
        (NotFoundError, "'absent'", lambda: client.infer("absent", {"x": x})),
        (NotFoundError, "'absent'", lambda: client.metadata("absent")),
        (NotFoundError, "9", lambda: client.infer("rows", {"x": x}, version="9")),
        (InvalidRequestError, "FP64", lambda: client.infer("rows", {"x": x.astype(np.float64)})),
        (InvalidRequestError, "'z'", lambda: client.infer("rows", {"z": x})),
        (InvalidRequestError, "'z'", lambda: client.infer("rows", {"x": x}, outputs=["z"])),
        (
            InferenceError,
            "broken on purpose",
            lambda: client.infer("fake", {"x": x}, parameters={"fake_fail": "broken on purpose"}),
        ),
    ):
        with pytest.raises(kind, match=said) as caught:
            call()
        assert type(caught.value) is kind
        assert caught.value.status is not None


def test_a_deadline_is_kept(client, server):
    with server.gate.shut(), pytest.raises(DeadlineError):
        client.infer("slow", {"x": [[1]]}, timeout_s=0.2)
    # the client is as good as before
    assert client.infer("rows", {"x": [[1]]})["y"].tolist() == [[1]]


def test_what_is_too_much_is_unavailable(url):
    outcomes = []
    with Client(url) as client:

        def ask():
            try:
                client.infer("fake", {"x": np.ones((1, 1), np.float32)}, parameters={"fake_delay_ms": 300})
            except UnavailableError as error:
                outcomes.append(str(error))

        threads = [threading.Thread(target=ask) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert 0 < len(outcomes) < 12


def test_threads_share_a_client(url):
    wrong = []
    with Client(url, max_connections=3) as client:

        def ask(number):
            for step in range(20):
                value = float(number * 100 + step)
                if client.infer("rows", {"x": [[value]]})["y"].tolist() != [[value]]:
                    wrong.append(value)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


async def test_tasks_share_a_client(url):
    async with AsyncClient(url) as client:
        results = await asyncio.gather(*(client.infer("rows", {"x": [[number]]}) for number in range(50)))
    assert [one["y"].item() for one in results] == list(range(50))


# -- the rest ------------------------------------------------------------------------------------------------------


def test_what_a_server_tells_of_itself(client):
    assert client.is_live()
    assert client.is_ready()
    assert client.is_ready("rows")
    assert client.is_ready("versions", "1")
    assert not client.is_ready("absent")
    client.wait_until_ready(60, "rows")
    with pytest.raises(DeadlineError, match="model 'absent'"):
        client.wait_until_ready(0.2, "absent")
    assert client.server().name == "headrace"
    assert client.models() == ["any", "counting", "fake", "rows", "slow", "versions"]
    assert {(one.name, one.version, one.state) for one in client.index(ready=True)} >= {("rows", "1", "READY")}
    metadata = client.metadata("rows")
    assert (metadata.name, metadata.versions) == ("rows", ("1",))
    assert [(one.name, one.datatype, one.shape) for one in metadata.inputs] == [("x", "FP32", (-1, -1))]


def test_configurations_are_the_same_over_both_protocols(server):
    with Client(url_of(server, "http")) as one, Client(url_of(server, "grpc")) as other:
        for model in ("rows", "fake", "versions"):
            config = one.config(model)
            assert config == other.config(model)
            assert config["name"] == model
        assert config["max_batch_size"] == 0


def test_statistics_count_what_was_asked(client):
    before = client.statistics("rows")[0]
    client.infer("rows", {"x": [[1], [2], [3]]})
    (after,) = client.statistics("rows")
    assert (after.name, after.version) == ("rows", "1")
    assert after.inference_count == before.inference_count + 3
    assert after.inference_stats.success.count == before.inference_stats.success.count + 1
    assert after.inference_stats.success.ns > before.inference_stats.success.ns
    assert {one.name for one in client.statistics()} >= {"rows", "any"}


def test_models_are_loaded_and_unloaded(client):
    client.unload("versions")
    try:
        assert not client.is_ready("versions")
        with pytest.raises((NotFoundError, UnavailableError)):
            client.infer("versions", {"x": np.zeros(1, np.float32)})
    finally:
        client.load("versions")
    client.wait_until_ready(60, "versions")
    assert client.infer("versions", {"x": [0]})["y"].item() == 2
    with pytest.raises(InferenceError, match="absent"):
        client.load("absent")


def test_nobody_there(server):
    for make, protocol in KINDS:
        client = make(f"{protocol}://127.0.0.1:1")
        try:
            assert not client.is_live()
            with pytest.raises(ConnectionFailed, match=f"{protocol}://127.0.0.1:1"):
                client.server()
        finally:
            client.close()


@pytest.mark.parametrize("kind", KINDS, ids=["sync-http", "sync-grpc", "async-http", "async-grpc"])
def test_a_server_that_dies_is_a_failed_connection(tmp_path, kind):
    make, protocol = kind
    fake_model(tmp_path, "fake")
    with RunningServer(tmp_path) as running:
        client = make(url_of(running, protocol))
        try:
            assert client.infer("fake", {"x": [[1]]})["y"].tolist() == [[1]]
            # Its workers end with it.
            threading.Timer(0.5, os.kill, (running.process.pid, signal.SIGKILL)).start()
            with pytest.raises(ConnectionFailed):
                client.infer("fake", {"x": [[1]]}, parameters={"fake_delay_ms": 20_000})
            assert not client.is_live()
        finally:
            client.close()


# -- streams -------------------------------------------------------------------------------------------------------


def test_a_stream_gives_each_part(client):
    parts = list(client.stream("counting", {"count": [5], "fail_at": [-1]}, id="s"))
    assert [one["number"].item() for one in parts] == [0, 1, 2, 3, 4]
    assert [one["text"].item() for one in parts] == [f"number {number}".encode() for number in range(5)]
    assert {(one.model_name, one.model_version, one.id) for one in parts} == {("counting", "1", "s")}


def test_a_stream_of_some_outputs_and_an_empty_one(client):
    parts = list(client.stream("counting", {"count": [2], "fail_at": [-1]}, outputs=["text"]))
    assert [list(one.outputs) for one in parts] == [["text"], ["text"]]
    assert list(client.stream("counting", {"count": [0], "fail_at": [-1]})) == []


def test_a_model_that_answers_once_can_be_streamed_too(client):
    (part,) = client.stream("rows", {"x": [[1, 2]]})
    assert part["y"].tolist() == [[1, 2]]


def test_a_stream_that_is_refused(client):
    with pytest.raises(NotFoundError, match="'absent'"):
        list(client.stream("absent", {"x": np.zeros(1)}))
    with pytest.raises(InvalidRequestError, match="INT64"):
        list(client.stream("counting", {"count": np.array([1]), "fail_at": np.array([1], np.int32)}))


def test_a_stream_that_fails_in_its_midst(url):
    seen = []
    with Client(url) as client, pytest.raises(InferenceError, match="cannot count to 2"):
        seen.extend(part["number"].item() for part in client.stream("counting", {"count": [5], "fail_at": [2]}))
    assert seen == [0, 1]


def test_a_stream_can_be_left(url):
    with Client(url) as client:
        parts = client.stream("counting", {"count": [100_000], "fail_at": [-1]})
        assert [next(parts)["number"].item() for _ in range(3)] == [0, 1, 2]
        parts.close()
        # which frees the one instance of the model
        assert len(list(client.stream("counting", {"count": [1], "fail_at": [-1]}, timeout_s=60))) == 1


async def test_an_async_stream_can_be_left(url):
    async with AsyncClient(url) as client:
        async for part in client.stream("counting", {"count": [100_000], "fail_at": [-1]}):
            if part["number"].item() == 2:
                break
        parts = [one async for one in client.stream("counting", {"count": [1], "fail_at": [-1]}, timeout_s=60)]
        assert len(parts) == 1


# -- the command ---------------------------------------------------------------------------------------------------


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "headrace", "infer", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"},
        check=False,
    )


def test_infer_prints_an_answer(url):
    ended = command("rows", "--input", "x=[1.5, 2]", "--url", url)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "rows version 1\ny  FP32[1, 2]\n  [[1.5 2. ]]\n"
    assert "'x' is given the batch dimension" in ended.stderr


def test_infer_as_json_with_files_and_parameters(server, tmp_path):
    np.save(tmp_path / "x.npy", np.array([1, 2], np.int8))
    (tmp_path / "picture.jpg").write_bytes(b"\xff\xd8")
    ended = command(
        *("any", "--url", server.http, "--version", "1", "--parameter", "p=1", "--json"),
        *("--input", f"x_INT8=@{tmp_path}/x.npy", "--input", f"x_BYTES=@{tmp_path}/picture.jpg"),
        *("--output", f"y_INT8=@{tmp_path}/y.npy", "--output", "y_BYTES"),
    )
    assert ended.returncode == 0, ended.stderr
    answer = json.loads(ended.stdout)
    assert [(one["name"], one["shape"], one["data"]) for one in answer["outputs"]] == [
        ("y_INT8", [2], [1, 2]),
        ("y_BYTES", [1], [{"b64": "/9g="}]),
    ]
    assert np.load(tmp_path / "y.npy").tolist() == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["absent", "--input", "x=1"], "'absent'"),
        (["rows"], "--input x=... for x FP32[-1, -1]"),
        (["rows", "--input", "z=1"], "has no input 'z'"),
        (["rows", "--input", "x=hello"], "not JSON"),
        (["rows", "--input", "x=[[1]]", "--output", "z"], "'z'"),
        (["rows", "--input", 'x=[["a"]]'], "number"),
    ],
)
def test_infer_says_what_is_wrong(server, arguments, said):
    ended = command(*arguments, "--url", server.http)
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr.startswith("headrace: ")
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_infer_without_a_server_says_what_to_start(protocol):
    ended = command("rows", "--input", "x=1", "--url", f"{protocol}://127.0.0.1:1")
    assert ended.returncode == 1
    assert "headrace serve" in ended.stderr
    assert "Traceback" not in ended.stderr

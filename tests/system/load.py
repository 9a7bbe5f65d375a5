"""Small models, and clients that record how every request of theirs ended: for the system and fault tests."""

import http.client
import json
import select
import shutil
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import grpc
import numpy as np
from onnx import TensorProto, helper, numpy_helper

from headrace.wire import pb

INFER = f"/{pb.SERVICE}/ModelInfer"
TIMEOUT_S = 60  # for what comes at once, unless the machine is busy with something else
REFUSED = "refused"  # the status of a connection that nobody accepted: the request was never sent

ECHO = """
    class Model:
        inputs = [{"name": "x", "datatype": "FP32", "shape": [-1, -1]}]
        outputs = [{"name": "y", "datatype": "FP32", "shape": [-1, -1]}]
        max_batch_size = 32

        def infer(self, inputs):
            return {"y": inputs["x"]}
"""

# An echo, a request at a time, that neither loads nor answers while a file is there: its gate is shut then.
GATED = """
    import time
    from pathlib import Path


    class Model:
        inputs = [{"name": "x", "datatype": "FP32", "shape": [-1, -1]}]
        outputs = [{"name": "y", "datatype": "FP32", "shape": [-1, -1]}]
        max_batch_size = 1

        def load(self, context):
            self.gate = Path(context.parameters["gate"])
            self.ballast = b"x" * (context.parameters.get("ballast_mb", 0) << 20)
            self.wait()

        def infer(self, inputs):
            self.wait()
            return {"y": inputs["x"]}

        def wait(self):
            while self.gate.exists():
                time.sleep(0.005)
"""


# -- models, x FP32[-1, -1] to y of the same shape -----------------------------------------------------------------


def fake_model(repository: Path, name: str, config: str = "", version: int = 1) -> Path:
    """A model of the fake backend: an echo with the faults that its configuration or its requests ask for."""
    folder = repository / name
    (folder / str(version)).mkdir(parents=True)
    (folder / "config.yaml").write_text("backend: fake\n" + textwrap.dedent(config))
    return folder


def onnx_model(repository: Path, name: str, version: int = 1, add: float | None = None, config: str = "") -> Path:
    """An ONNX model that adds a constant, its version number unless told otherwise."""
    folder = repository / name
    folder.mkdir(parents=True, exist_ok=True)
    if config:
        (folder / "config.yaml").write_text(textwrap.dedent(config))
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "constant"], ["y"])],
        "add",
        [value("x", TensorProto.FLOAT, ["n", "m"])],
        [value("y", TensorProto.FLOAT, ["n", "m"])],
        [numpy_helper.from_array(np.array([version if add is None else add], np.float32), "constant")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    put(folder / str(version), "model.onnx", model.SerializeToString())
    return folder


def python_model(repository: Path, name: str, code: str = ECHO, version: int = 1, config: str = "") -> Path:
    """A model.py; an echo unless told otherwise."""
    folder = repository / name
    folder.mkdir(parents=True, exist_ok=True)
    if config:
        (folder / "config.yaml").write_text(textwrap.dedent(config))
    put(folder / str(version), "model.py", textwrap.dedent(code).encode())
    return folder


class Gate:
    """What keeps a gated model waiting, so that a test need not be quicker than a model that is slow."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextmanager
    def shut(self) -> Iterator[None]:
        """Nothing passes within, unless it is opened before the end."""
        self._path.touch()
        try:
            yield
        finally:
            self.open()

    def open(self) -> None:
        """Let pass what waits."""
        self._path.unlink(missing_ok=True)


def gated_model(repository: Path, name: str, config: str = "", code: str = GATED, **parameters: int) -> Gate:
    """A model whose gate is open at first; the file is beside the repository."""
    path = repository.with_name(f"{repository.name}.{name}.gate")
    config = f"{textwrap.dedent(config)}\nparameters: {json.dumps({'gate': str(path), **parameters})}\n"
    python_model(repository, name, code, config=config)
    return Gate(path)


def broken_onnx(repository: Path, name: str, version: int = 1) -> Path:
    """A model file that no runtime can read."""
    put(repository / name / str(version), "model.onnx", b"this is no model")
    return repository / name


def put(version_folder: Path, file: str, content: bytes) -> None:
    """A version's folder that appears at once, whole."""
    staging = version_folder.with_name(f".{version_folder.name}.new")
    staging.mkdir(parents=True)
    (staging / file).write_bytes(content)
    staging.rename(version_folder)


def replace(folder: Path, file: str, content: bytes | str) -> None:
    """A file in a model's folder that changes at once, as editors and deployment tools write."""
    staged = folder / f".{file}.new"
    staged.write_bytes(content.encode() if isinstance(content, str) else content)
    staged.rename(folder / file)


def copy_in(model: Path, repository: Path) -> None:
    """What ``cp -r`` does."""
    shutil.copytree(model, repository / model.name)


# -- one request ---------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """How one request ended. Times of ``time.monotonic``."""

    protocol: str
    status: int | str  # HTTP's number, gRPC's code by name, or what broke the connection
    detail: str = ""
    values: list[float] | None = None
    version: str = ""
    sent_at: float = 0.0
    ended_at: float = 0.0
    headers: dict[str, str] | None = None

    @property
    def ok(self) -> bool:
        """Whether the model answered."""
        return self.status in (200, "OK")

    @property
    def seconds(self) -> float:
        """How long the client waited."""
        return self.ended_at - self.sent_at


def infer_body(values: list[float], parameters: dict | None = None) -> dict:
    """One row of ``values`` as the protocol's JSON."""
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, len(values)], "data": values}]}
    return {**body, "parameters": parameters} if parameters else body


def infer_message(model: str, values: list[float], parameters: dict | None = None) -> pb.ModelInferRequest:
    """One row of ``values`` as the protocol's message."""
    message = pb.ModelInferRequest(model_name=model)
    tensor = message.inputs.add(name="x", datatype="FP32", shape=[1, len(values)])
    tensor.contents.fp32_contents.extend(values)
    for key, value in (parameters or {}).items():
        field = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}[type(value)]
        setattr(message.parameters[key], field, value)
    return message


class HttpClient:
    """One keep-alive connection, opened again when the server has closed it behind an answer or while it was idle."""

    protocol = "http"

    def __init__(self, address: str, model: str, timeout_s: float = TIMEOUT_S) -> None:
        self._connection = http.client.HTTPConnection(address, timeout=timeout_s)
        self._path = f"/v2/models/{model}/infer"

    def infer(self, values: list[float], parameters: dict | None = None) -> Outcome:
        """Send one row and wait for its answer."""
        body = json.dumps(infer_body(values, parameters))
        sent_at = time.monotonic()
        outcome = self._infer(body)
        outcome.sent_at, outcome.ended_at = sent_at, time.monotonic()
        return outcome

    def send(self, values: list[float], parameters: dict | None = None) -> None:
        """Send one row; the answer is left on the connection."""
        self._connection.request("POST", self._path, json.dumps(infer_body(values, parameters)))

    def close(self) -> None:
        """Leave."""
        self._connection.close()

    def _infer(self, body: str) -> Outcome:
        try:
            if self._is_closed():
                self._connection.close()
                self._connection.connect()
        except ConnectionRefusedError as error:
            return Outcome("http", REFUSED, str(error))
        except OSError as error:
            self._connection.close()
            return Outcome("http", "connect failed", repr(error))
        try:
            self._connection.request("POST", self._path, body)
            response = self._connection.getresponse()
            answer = json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._connection.close()
            return Outcome("http", "broken", repr(error))
        headers = {name.lower(): value for name, value in response.getheaders()}
        if response.status != 200:
            return Outcome("http", response.status, answer["error"], headers=headers)
        return Outcome("http", 200, "", answer["outputs"][0]["data"], answer["model_version"], headers=headers)

    def _is_closed(self) -> bool:
        """Whether there is no connection, or one that a server that stops has closed since the last answer."""
        sock = self._connection.sock
        if sock is None:
            return True
        idle = select.poll()
        idle.register(sock, select.POLLIN)
        return bool(idle.poll(0))


class GrpcClient:
    """One channel with a connection of its own."""

    protocol = "grpc"

    def __init__(self, address: str, model: str, timeout_s: float = TIMEOUT_S) -> None:
        self._channel = grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        self._call = self._channel.unary_unary(
            INFER, pb.ModelInferRequest.SerializeToString, pb.ModelInferResponse.FromString
        )
        self._model = model
        self._timeout_s = timeout_s

    def infer(self, values: list[float], parameters: dict | None = None, timeout_s: float | None = None) -> Outcome:
        """Send one row and wait for its answer."""
        message = infer_message(self._model, values, parameters)
        sent_at = time.monotonic()
        try:
            answer = self._call(message, timeout=timeout_s or self._timeout_s)
        except grpc.RpcError as error:
            outcome = Outcome("grpc", error.code().name, error.details())
        else:
            data = np.frombuffer(answer.raw_output_contents[0], np.float32).tolist()
            outcome = Outcome("grpc", "OK", "", data, answer.model_version)
        outcome.sent_at, outcome.ended_at = sent_at, time.monotonic()
        return outcome

    def start(self, values: list[float], parameters: dict | None = None) -> grpc.Future:
        """Send one row; the call can be cancelled."""
        return self._call.future(infer_message(self._model, values, parameters), timeout=self._timeout_s)

    def close(self) -> None:
        """Leave."""
        self._channel.close()


def infer(address: str, model: str, values: list[float], parameters: dict | None = None) -> Outcome:
    """One HTTP request on a connection of its own."""
    client = HttpClient(address, model)
    try:
        return client.infer(values, parameters)
    finally:
        client.close()


def all_at_once(address: str, model: str, requests: list[tuple[list[float], dict | None]]) -> list[Outcome]:
    """Send these rows together, each on a connection that stands already; their outcomes in order."""
    outcomes: list[Outcome | None] = [None] * len(requests)
    together = threading.Barrier(len(requests))

    def client(index: int, values: list[float], parameters: dict | None) -> None:
        one = HttpClient(address, model)
        one._connection.connect()
        together.wait(TIMEOUT_S)
        outcomes[index] = one.infer(values, parameters)
        one.close()

    threads = [threading.Thread(target=client, args=(index, *one)) for index, one in enumerate(requests)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(outcomes)
    return outcomes


# -- many requests -------------------------------------------------------------------------------------------------


class Load:
    """Clients that each send one row after the other until told to stop; every outcome is kept.

    An answer with other values than ``expected`` gives for the row has the status "wrong". With ``until_refused``
    a client ends at its first refused connection (or UNAVAILABLE call), as when the server is stopping.
    """

    def __init__(
        self,
        server,
        model: str,
        *,
        http: int = 8,
        grpc: int = 0,
        expected: Callable[[list[float], str], list[float]] = lambda values, _: values,
        parameters: dict | None = None,
        until_refused: bool = False,
        interval_s: float = 0.0,
    ) -> None:
        self.outcomes: list[Outcome] = []
        self._expected = expected
        self._parameters = parameters
        self._until_refused = until_refused
        self._interval_s = interval_s
        self._stop = threading.Event()
        clients = [HttpClient(server.http, model) for _ in range(http)]
        clients += [GrpcClient(server.grpc, model) for _ in range(grpc)]
        self._threads = [
            threading.Thread(target=self._run, args=(number, client), daemon=True)
            for number, client in enumerate(clients)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Let every client have its last answer."""
        self._stop.set()
        self.join()

    def join(self, timeout_s: float = TIMEOUT_S) -> None:
        """Wait until every client has ended."""
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            assert not thread.is_alive(), "a client still waits for an answer"

    def wait_answers(self, count: int, timeout_s: float = TIMEOUT_S) -> None:
        """Wait until so many more requests have ended."""
        wanted, deadline = len(self.outcomes) + count, time.monotonic() + timeout_s
        while len(self.outcomes) < wanted:
            assert time.monotonic() < deadline, f"only {self.summary} after {timeout_s} s"
            time.sleep(0.01)

    @property
    def summary(self) -> Counter:
        """How many requests ended how."""
        return Counter((one.protocol, one.status) for one in self.outcomes)

    @property
    def failed(self) -> list[Outcome]:
        """Every request without a right answer."""
        return [one for one in self.outcomes if not one.ok]

    def _run(self, number: int, client: HttpClient | GrpcClient) -> None:
        sent = 0
        try:
            while not self._stop.is_set():
                sent += 1
                values = [float(number), float(sent)]
                outcome = client.infer(values, self._parameters)
                if outcome.ok and outcome.values != self._expected(values, outcome.version):
                    outcome.status, outcome.detail = "wrong", f"{outcome.values} for {values}"
                self.outcomes.append(outcome)
                if outcome.status in (REFUSED, "UNAVAILABLE"):
                    if self._until_refused:
                        return
                    self._stop.wait(0.05)
                elif self._interval_s:
                    self._stop.wait(self._interval_s)
        finally:
            client.close()


def wait_for(condition: Callable[[], object], timeout_s: float = TIMEOUT_S, what: str = "it") -> object:
    """Wait until ``condition()`` is true and return what it gave."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError(f"waited {timeout_s} s in vain for {what}")

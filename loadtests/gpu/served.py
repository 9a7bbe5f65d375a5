"""The forms as a server gives them: their answers, their speed, and what happens when a worker dies or they go."""

import asyncio
import json
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from http.client import HTTPConnection
from statistics import median
from typing import Any

import numpy as np

from headrace.client import Client
from headrace.core.tensor import Array, datatype_of
from loadtests.cpu import read_processes, tree_times
from loadtests.dialect import Wire
from loadtests.drive import Result, Settings, drive
from loadtests.gpu import lent
from loadtests.gpu.subjects import Inputs
from loadtests.inputs import tensor_of_array
from loadtests.server import HOST, Server

SATURATING = 128  # clients that wait for an answer each before they ask again
_WARMUP_S = 1.0


def reason(server: Server, model: str) -> str:
    """Why a model is not served; empty where it is."""
    request = urllib.request.Request(f"http://{HOST}:{server.http_port}/v2/repository/index", data=b"{}", method="POST")
    with urllib.request.urlopen(request, timeout=30) as response:
        entries = json.loads(response.read())
    return next((str(one.get("reason", "")) for one in entries if one["name"] == model), "it is not in the index")


def ask(server: Server, model: str, inputs: Inputs) -> Array:
    """One request's answer, of a model with one output."""
    with Client(f"http://{HOST}:{server.http_port}") as client:
        (answer,) = client.infer(model, inputs).outputs.values()
        return np.asarray(answer)


def through_lent_memory(server: Server, model: str, inputs: Inputs, seconds: float) -> tuple[Array, dict[str, float]]:
    """The answer that came into memory of the GPU that is this process's, and ms of a request there and in its body."""
    with Client(f"http://{HOST}:{server.http_port}") as client:
        ((output, answer),) = client.infer(model, inputs).outputs.items()
        body_ms = _median_ms(lambda: client.infer(model, inputs), seconds)
    expected = np.asarray(answer)
    tensors, position = [], 0
    for name, array in inputs.items():
        where = lent.place("client", array.nbytes, position)
        tensors.append({"name": name, "datatype": datatype_of(array), "shape": array.shape, "parameters": where})
        position += array.nbytes
    wanted = [{"name": output, "parameters": lent.place("client", expected.nbytes, position)}]
    request = {"inputs": tensors, "outputs": wanted}
    with lent.Lent(position + expected.nbytes) as memory, closing(HTTPConnection(HOST, server.http_port)) as to:
        memory.write(b"".join(array.tobytes() for array in inputs.values()))
        _demand(lent.register(to, "client", memory.handle, memory.nbytes))
        try:
            lent_ms = _median_ms(lambda: _demand(lent.post(to, f"/v2/models/{model}/infer", request)), seconds)
        finally:
            lent.post(to, "/v2/cudasharedmemory/unregister", {})
        received = np.frombuffer(memory.read()[position:], expected.dtype).reshape(expected.shape)
    return received, {"lent_ms": lent_ms, "body_ms": body_ms}


def _demand(answer: tuple[int, Any]) -> None:
    assert answer[0] == 200, answer


def _median_ms(work: Callable[[], object], seconds: float) -> float:
    taken: list[float] = []
    ends = time.monotonic() + seconds
    while not taken or time.monotonic() < ends:
        started = time.perf_counter()
        work()
        taken.append((time.perf_counter() - started) * 1000)
    return median(taken)


def load_up(server: Server, model: str, inputs: Inputs, clients: int, seconds: float) -> Result:
    """Closed-loop load of one request over binary HTTP."""
    settings = Settings(
        (HOST, server.http_port),
        Wire.HTTP_BINARY,
        model,
        clients,
        None,
        seconds,
        _WARMUP_S,
        server.pid,
        (HOST, server.metrics_port),
    )
    return asyncio.run(drive(settings, [tensor_of_array(name, array) for name, array in inputs.items()]))


def told(result: Result) -> str:
    """As ``5210 rows/s, p50 24.1 ms, p99 31.0 ms``."""
    latency = result.latency
    return f"{result.requests_per_s:.0f} rows/s, p50 {latency.p50_ms:.1f} ms, p99 {latency.p99_ms:.1f} ms"


def values(result: Result) -> dict[str, Any]:
    """For the file of raw results."""
    return asdict(result)


def kill_workers_under_load(server: Server, model: str, inputs: Inputs, seconds: float) -> Result:
    """Load, and in the middle of it SIGKILL for every process of the server but its first."""

    async def both() -> Result:
        loop = asyncio.get_running_loop()
        driving = loop.run_in_executor(None, lambda: load_up(server, model, inputs, 16, seconds))
        await asyncio.sleep(_WARMUP_S + seconds / 3)
        for pid, _ in tree_times(server.pid, read_processes()).members:
            if pid != server.pid:
                os.kill(pid, signal.SIGKILL)
        return await driving

    return asyncio.run(both())


def change(server: Server, model: str, verb: str) -> None:
    """Have the server load or unload a model.

    Raises:
        urllib.error.HTTPError: it refuses.
    """
    url = f"http://{HOST}:{server.http_port}/v2/repository/models/{model}/{verb}"
    with urllib.request.urlopen(urllib.request.Request(url, data=b"{}", method="POST"), timeout=300) as response:
        response.read()


def metrics(server: Server) -> str:
    """The server's metrics."""
    with urllib.request.urlopen(f"http://{HOST}:{server.metrics_port}/metrics", timeout=30) as response:
        text: str = response.read().decode()
    return text


def wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Whether something comes true in time."""
    ends = time.monotonic() + timeout_s
    while time.monotonic() < ends:
        if condition():
            return True
        time.sleep(0.2)
    return False


def used_bytes(text: str) -> float | None:
    """The first GPU's memory in use, by a metrics page."""
    for line in text.splitlines():
        if line.startswith("nv_gpu_memory_used_bytes{"):
            return float(line.rpartition(" ")[2])
    return None

"""The servers that are compared, each set up as somebody who knows it would for a small machine without a GPU.

What all have in common, so that the servers differ and not the work: the same ONNX file in the same ONNX Runtime
version, one worker with one session, one thread for the small nets and one a CPU for the large ones, no spinning
threads, batches of up to 32 rows, no access log. A batch is never waited for longer than 1 ms, the least that most
accept: Triton, like Headrace, takes what is there (0), mosec knows whole milliseconds.

- **One worker.** On two cores a second one would compete with the front process and the driver for the same CPUs, and
  halve the batches.
- **Triton**: the python backend of the `nvidia-pytriton` wheel, whose `tritonserver` is started directly. The wheel has
  no C++ ONNX Runtime backend. numpy is below 2: with it the stub of this release hands over zeros.
- **mosec**: one worker for bytes and one for JSON; the one not asked sleeps.
- **MLServer**: one parallel worker, which is its default, and adaptive batching of 1 ms, which is not. No debug mode.
- **LitServe**: `fast_queue` (ZeroMQ), one API server.
- **BentoML**: a batched method; uvloop and httptools, which uvicorn uses when they are there; no metrics.
- **Headrace**: as it comes. It finds out batching and threads from the file.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from headrace.core.tensor import Array
from loadtests.dialect import Dialect, Wire
from loadtests.environment import CACHE, environment
from loadtests.limit import usable_cpus
from loadtests.models import place
from loadtests.server import HOST, Server, ServerProcess, free_ports

MAX_BATCH = 32
LARGE = frozenset({"minilm", "resnet50"})  # a row takes milliseconds: all CPUs pay
_SCRIPTS = Path(__file__).parent / "peers"
_READY_S, _STOP_S = 120.0, 20.0


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be served: a model out of the cache, from a folder that is the server's own until it has ended."""

    model: str
    model_file: Path
    folder: Path

    @property
    def threads(self) -> int:
        """Of an ONNX Runtime session."""
        return usable_cpus() if self.model in LARGE else 1


@dataclass(frozen=True, slots=True)
class Running:
    """A server that can be started with ``with``, and where it will listen."""

    process: ServerProcess
    grpc_port: int | None = None
    metrics_port: int | None = None


@dataclass(frozen=True, slots=True)
class Door:
    """How to ask over one wire; ``path`` None is the open protocol's."""

    dialect: Dialect = Dialect.V2
    path: str | None = None


@dataclass(frozen=True, slots=True)
class Contender:
    """One server. ``python_front`` says that Python code receives its requests; ``sample`` adapts a row to it."""

    name: str
    start: Callable[[Job], Running]
    doors: Mapping[Wire, Door]
    python_front: bool = False
    sample: Callable[[dict[str, Array]], dict[str, Array]] = field(default=lambda row: row)


def model_cache(cache: Path = CACHE) -> Path:
    """Where the load models lie."""
    return cache / "models"


def job_of(model: str, folder: Path) -> Job:
    """A job in a folder made for it."""
    folder.mkdir(parents=True)
    return Job(model, place(model, model_cache()), folder)


def headrace(job: Job) -> Running:
    """The folder of one model and not a single option."""
    shutil.copytree(job.model_file.parents[1], job.folder / "repository" / job.model)
    server = Server(job.folder / "repository", job.folder / "log", stop_timeout_s=_STOP_S)
    return Running(server, server.grpc_port, server.metrics_port)


def triton(job: Job) -> Running:
    """The wheel's binary on a repository with a python model."""
    home = environment("triton")
    (packages,) = home.glob("lib/python3*/site-packages")
    home_of_triton = packages / "pytriton" / "tritonserver"
    backends = job.folder / "backends"  # the wheel keeps the stubs of all Pythons apart from the backend
    shutil.copytree(home_of_triton / "backends", backends)
    stubs = home_of_triton / "python_backend_stubs" / packages.parent.name.removeprefix("python")
    shutil.copy(stubs / "triton_python_backend_stub", backends / "python")
    version = job.folder / "repository" / job.model / "1"
    version.mkdir(parents=True)
    shutil.copy(_SCRIPTS / "triton_model.py", version / "model.py")
    shutil.copy(_SCRIPTS / "onnx_net.py", version)
    (version.parent / "config.pbtxt").write_text(triton_config(job.model))
    http_port, grpc_port, metrics_port = free_ports(3)
    command = [
        str(home_of_triton / "bin" / "tritonserver"),
        *(f"--model-repository={version.parents[1]}", f"--backend-directory={backends}", "--exit-timeout-secs=5"),
        *(f"--http-address={HOST}", f"--http-port={http_port}", f"--grpc-address={HOST}", f"--grpc-port={grpc_port}"),
        *(f"--metrics-address={HOST}", f"--metrics-port={metrics_port}", "--log-info=false"),
    ]
    variables = _variables(job, home, http_port) | {"LD_LIBRARY_PATH": str(packages / "nvidia_pytriton.libs")}
    return Running(_process(command, job, http_port, "/v2/health/ready", variables), grpc_port, metrics_port)


def triton_config(model: str) -> str:
    """config.pbtxt with dynamic batching and one instance."""
    inputs, outputs = _TRITON_TENSORS[model]
    return "\n".join(
        [
            f'name: "{model}"',
            'backend: "python"',
            f"max_batch_size: {MAX_BATCH}",
            *(f'input {{ name: "{name}" data_type: {kind} dims: {dims} }}' for name, kind, dims in inputs),
            *(f'output {{ name: "{name}" data_type: {kind} dims: {dims} }}' for name, kind, dims in outputs),
            "instance_group { kind: KIND_CPU count: 1 }",
            "dynamic_batching { }",
            "",
        ]
    )


_TRITON_TENSORS = {
    "identity": ([("x", "TYPE_FP32", [16])], [("y", "TYPE_FP32", [16])]),
    "mlp": ([("x", "TYPE_FP32", [784])], [("y", "TYPE_FP32", [10])]),
    "minilm": (
        [("input_ids", "TYPE_INT64", [-1]), ("attention_mask", "TYPE_INT64", [-1])],
        [("embedding", "TYPE_FP32", [384])],
    ),
    "resnet50": ([("data", "TYPE_FP32", [3, 224, 224])], [("logits", "TYPE_FP32", [1000])]),
}


def mosec(job: Job) -> Running:
    """Its own command line; the time limit is one that a queue of large nets cannot reach."""
    home = environment("mosec")
    (port,) = free_ports(1)
    command = [
        *(str(home / "bin" / "python"), str(_SCRIPTS / "mosec_server.py"), "--address", HOST, "--port", str(port)),
        *("--timeout", "300000", "--path", str(job.folder / "sockets"), "--log-level", "warning"),
    ]
    return Running(_process(command, job, port, "/", _variables(job, home, port)))


def mlserver(job: Job) -> Running:
    """Settings of the server and of the model, as files in the folder that it is started on."""
    home = environment("mlserver")
    http_port, grpc_port, metrics_port = free_ports(3)
    for script in ("mlserver_runtime.py", "onnx_net.py"):
        shutil.copy(_SCRIPTS / script, job.folder)
    server = {
        "host": HOST,
        "http_port": http_port,
        "grpc_port": grpc_port,
        "metrics_port": metrics_port,
        "debug": False,
        "parallel_workers": 1,
        "gzip_enabled": False,
        "grpc_max_message_length": 1 << 26,
    }
    model = {
        "name": job.model,
        "implementation": "mlserver_runtime.OnnxRuntime",
        "max_batch_size": MAX_BATCH,
        "max_batch_time": 0.001,
    }
    (job.folder / "settings.json").write_text(json.dumps(server))
    (job.folder / "model-settings.json").write_text(json.dumps(model))
    command = [str(home / "bin" / "mlserver"), "start", str(job.folder)]
    variables = _variables(job, home, http_port) | {"PYTHONPATH": str(job.folder)}
    ready = f"/v2/models/{job.model}/ready"
    return Running(_process(command, job, http_port, ready, variables), grpc_port)


def litserve(job: Job) -> Running:
    """A script of its own API."""
    home = environment("litserve")
    (port,) = free_ports(1)
    command = [str(home / "bin" / "python"), str(_SCRIPTS / "litserve_server.py")]
    return Running(_process(command, job, port, "/health", _variables(job, home, port)))


def bentoml(job: Job) -> Running:
    """`bentoml serve`, which is its production mode."""
    home = environment("bentoml")
    (port,) = free_ports(1)
    command = [
        *(str(home / "bin" / "bentoml"), "serve", "bentoml_service:Service", "--working-dir", str(_SCRIPTS)),
        *("--host", HOST, "--port", str(port)),
    ]
    variables = _variables(job, home, port) | {
        "BENTOML_HOME": str(job.folder / "bentoml"),
        "BENTOML_DO_NOT_TRACK": "true",
        "PYTHONDONTWRITEBYTECODE": "1",  # its working directory is our source tree
    }
    return Running(_process(command, job, port, "/readyz", variables))


def stacked(row: dict[str, Array]) -> dict[str, Array]:
    """All inputs in one array, along a second dimension: what a method with one parameter can take."""
    arrays = list(row.values())
    return {"x": arrays[0] if len(arrays) == 1 else np.stack(arrays, axis=1)}


def _variables(job: Job, home: Path, port: int) -> dict[str, str]:
    """The environment of a peer's process: its own packages first, and what peers/ wants to know."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return inherited | {
        "PATH": f"{home / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "VIRTUAL_ENV": str(home),
        "LOADTEST_MODEL_FILE": str(job.model_file),
        "LOADTEST_THREADS": str(job.threads),
        "LOADTEST_WORKERS": "1",
        "LOADTEST_MAX_BATCH": str(MAX_BATCH),
        "LOADTEST_PORT": str(port),
    }


def _process(command: list[str], job: Job, port: int, ready_path: str, variables: dict[str, str]) -> ServerProcess:
    return ServerProcess(
        command,
        job.folder / "log",
        port,
        ready_path,
        environment=variables,
        folder=job.folder,
        ready_timeout_s=_READY_S,
        stop_timeout_s=_STOP_S,
    )


_OPEN_PROTOCOL = {wire: Door() for wire in Wire}
CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("headrace", headrace, _OPEN_PROTOCOL),
        Contender("triton", triton, _OPEN_PROTOCOL),
        Contender(
            "mosec",
            mosec,
            {Wire.HTTP_BINARY: Door(Dialect.PLAIN, "/raw"), Wire.HTTP_JSON: Door(Dialect.PLAIN, "/json")},
        ),
        Contender("mlserver", mlserver, {Wire.HTTP_JSON: Door(), Wire.GRPC: Door()}, python_front=True),
        Contender("litserve", litserve, {Wire.HTTP_JSON: Door(Dialect.PLAIN, "/predict")}, python_front=True),
        Contender(
            "bentoml",
            bentoml,
            {Wire.HTTP_JSON: Door(Dialect.PLAIN, "/predict")},
            python_front=True,
            sample=stacked,
        ),
    )
}

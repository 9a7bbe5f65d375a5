"""The composition root: builds every object of a server, starts them in order, drains them in the other."""

import asyncio
import contextlib
import gc
import logging
import resource
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from time import monotonic

from headrace.config import Settings
from headrace.engine import Engine
from headrace.frontends.grpc import GrpcServer
from headrace.frontends.http import create_app, metrics_app
from headrace.frontends.http_lane import lane
from headrace.frontends.http_server import HttpServer, bind
from headrace.frontends.server_state import ServerState
from headrace.metrics import Metrics
from headrace.readings import Readings
from headrace.repository.layout import list_models
from headrace.repository.repository import Repository
from headrace.repository.watcher import Watcher, take_prints
from headrace.workers.cpus import usable_cpus
from headrace.workers.placement import PlacementLimits
from headrace.workers.supervisor import Supervisor

log = logging.getLogger("headrace")


class CannotStart(Exception):
    """The server cannot start; the message says why and what to do."""


async def serve(settings: Settings, announce: Callable[[str], None]) -> None:
    """Run a server until SIGTERM or SIGINT, and drain it.

    ``announce`` is given a line for each model and one when the server is ready.

    Raises:
        CannotStart: a port is taken, or there is no repository.
    """
    check_folder(settings.repository)
    _raise_descriptor_limit()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await App(settings).run(stop, announce)


class App:
    """One server: front ends, engine, repository and workers."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.supervisor = build_supervisor(settings)
        self.repository = Repository(settings.repository, self.supervisor, settings.model_control)
        self.engine = Engine(self.repository, settings.max_inflight_bytes)
        self.state = ServerState(settings.server_name, self.repository, strict_readiness=settings.strict_readiness)
        readings = Readings(self.engine, self.repository, self.supervisor, self.state)
        metrics = Metrics(readings.models, readings.workers, readings.server)
        app = create_app(self.engine, self.state, metrics, settings.max_request_bytes)
        with contextlib.ExitStack() as bound:
            http_socket = bound.enter_context(_bind(settings.host, settings.http_port, "--http-port"))
            metrics_socket = bound.enter_context(_bind(settings.host, settings.metrics_port, "--metrics-port"))
            try:
                self.grpc = GrpcServer(
                    self.engine, self.state, settings.host, settings.grpc_port, settings.max_grpc_bytes
                )
            except RuntimeError as error:
                raise _taken(settings.host, settings.grpc_port, "--grpc-port", error) from error
            bound.pop_all()
        self.http = HttpServer(app, http_socket, lane(self.engine, settings.max_request_bytes), settings.read_timeout)
        self.metrics = HttpServer(
            metrics_app(metrics), metrics_socket, lane(None, settings.max_request_bytes), settings.read_timeout
        )
        self.watcher = Watcher(self.repository)

    async def run(self, stop: asyncio.Event, announce: Callable[[str], None]) -> None:
        """Serve until ``stop`` is set, then drain: accepted requests are answered, then workers end."""
        self.supervisor.start()
        for front_end in (self.http, self.metrics, self.grpc):
            await front_end.start()
        loading = asyncio.get_running_loop().create_task(self._load(announce))
        loading.add_done_callback(_log_failure)
        await stop.wait()
        announce("stopping: draining accepted requests")
        deadline = monotonic() + self._settings.drain_timeout
        self.state.stopping = True
        self.watcher.stop()
        loading.cancel()
        # The front ends first: a request that a connection still brings is answered as well.
        await asyncio.gather(
            *(front_end.drain(max(0.1, deadline - monotonic())) for front_end in (self.http, self.grpc))
        )
        self.engine.stop_accepting()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.1, deadline - monotonic())):
                await self.repository.close()
        await self.supervisor.close()
        await self.metrics.drain(0.5)
        await asyncio.gather(loading, return_exceptions=True)
        announce("stopped")

    async def _load(self, announce: Callable[[str], None]) -> None:
        settings = self._settings
        prints = await asyncio.to_thread(take_prints, settings.repository)
        names = list(prints)
        if settings.model_control == "explicit":
            wanted = names if "*" in settings.load_model else settings.load_model
            for name in sorted(set(wanted) - set(names)):
                log.error("model %s (--load-model) is not in %s", name, settings.repository)
            names = [name for name in names if name in wanted]
        await self.repository.load_all(names)
        self.repository.settled = True
        # What was built so far lives as long as the server: the collector need not walk it again and again.
        gc.collect()
        gc.freeze()
        for line in model_lines(self.repository):
            announce(line)
        announce(
            f"ready: http://{_shown(settings.host)}:{self.http.port} grpc://{_shown(settings.host)}:{self.grpc.port} "
            f"metrics http://{_shown(settings.host)}:{self.metrics.port}/metrics"
        )
        if settings.model_control == "poll":
            await self.watcher.run(prints)


def build_supervisor(settings: Settings) -> Supervisor:
    """The worker side of a server; the commands that only look at models use it too."""
    return Supervisor(
        cpus=usable_cpus(),
        limits=PlacementLimits(own=settings.max_own_workers, shared=settings.max_shared_workers),
        load_timeout_s=settings.load_timeout,
        log_format=settings.log_format,
    )


def model_lines(repository: Repository) -> list[str]:
    """A line for each version: what it is served as, or why it is not."""
    served = {(one.folder.name, one.version): one for one in repository.served()}
    lines = []
    for entry in repository.index():
        one = served.get((entry.name, entry.version))
        if one is None:
            if entry.state:
                lines.append(f"{entry.name} {entry.version or '-'}: {entry.state}: {entry.reason}")
            continue
        signature = one.info.signature
        inputs = ", ".join(spec.describe() for spec in signature.inputs)
        outputs = ", ".join(spec.describe() for spec in signature.outputs)
        batching = f"batches of up to {signature.max_batch_size}" if signature.max_batch_size else "no batching"
        lines.append(
            f"{entry.name} {entry.version}: {entry.state}: {one.info.backend}, {inputs} -> {outputs}, {batching}"
        )
    return lines


def check_folder(path: Path) -> None:
    """See that there is a model repository at ``path``.

    Raises:
        CannotStart: there is none.
    """
    if not path.is_dir():
        raise CannotStart(
            f"there is no model repository at '{path}': expected a folder with one folder a model, "
            "for instance NAME/1/model.onnx"
        )
    try:
        list_models(path)
    except OSError as error:
        raise CannotStart(f"the model repository '{path}' cannot be read: {error}") from error


def _bind(host: str, port: int, flag: str) -> socket.socket:
    try:
        return bind(host, port)
    except OSError as error:
        raise _taken(host, port, flag, error) from error


def _taken(host: str, port: int, flag: str, error: Exception) -> CannotStart:
    return CannotStart(f"cannot listen on {host}:{port} ({error}); choose another port with {flag}, 0 for a free one")


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.error("the repository is not followed any more", exc_info=task.exception())


def _raise_descriptor_limit() -> None:
    """A connection is a descriptor, and so is much of what a worker needs: take as many as are allowed."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host

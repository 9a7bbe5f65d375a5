"""The composition root: builds every object of a server, starts them in order, drains them in the other."""

import asyncio
import contextlib
import gc
import logging
import signal
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from time import monotonic
from typing import Any

from headrace.announcement import model_lines, no_model_line, ready_line
from headrace.background.optimizer import BackgroundOptimizer
from headrace.background.schedule import Subject
from headrace.background.subjects import command_for, read_room, subjects_of
from headrace.calls import CallDesk
from headrace.client_memory import ClientMemory
from headrace.config import Settings
from headrace.core.errors import InvalidRequest
from headrace.cuda_memory.regions import DRIVER_NODE, CudaRegions
from headrace.engine import Engine
from headrace.frontends.arrivals import Arrivals
from headrace.frontends.device_tensors import DeviceTensors
from headrace.frontends.forwarding import HeaderForwarding
from headrace.frontends.grpc import HealthService, InferenceService
from headrace.frontends.grpc_infer import GrpcInfer
from headrace.frontends.grpc_lane import InferLane
from headrace.frontends.grpc_server import GrpcServer
from headrace.frontends.grpc_settings import SettingsService
from headrace.frontends.grpc_shared_memory import SharedMemoryService
from headrace.frontends.grpc_statistics import StatisticsService
from headrace.frontends.grpc_stream import StreamService
from headrace.frontends.http import create_app, metrics_app
from headrace.frontends.http_lane import lane
from headrace.frontends.http_plans import add_plans
from headrace.frontends.http_recording import add_recording
from headrace.frontends.http_server import HttpServer
from headrace.frontends.http_settings import add_settings
from headrace.frontends.http_shared_memory import add_shared_memory
from headrace.frontends.http_statistics import add_statistics
from headrace.frontends.infer import HttpInfer
from headrace.frontends.load_report import LoadReport
from headrace.frontends.restrictions import Restrictions
from headrace.frontends.server_state import ServerState
from headrace.gpu_sampler import GpuSampler
from headrace.log import levels_from
from headrace.log_settings import LogSettings
from headrace.metrics import Metrics
from headrace.readings import Readings
from headrace.recording.recorder import Recorder, allowed_folder
from headrace.redis_cache import RedisCache, RedisMissing
from headrace.repository.drift import DriftGuard
from headrace.repository.pager import Pager
from headrace.repository.plans import Plans
from headrace.repository.repository import Repository
from headrace.repository.served import ServedVersion
from headrace.repository.watcher import Watcher, take_prints
from headrace.response_cache import Cache, ResponseCache
from headrace.shared_memory import SharedMemoryRegions
from headrace.starting import CannotStart, bind_all, check_folder, check_pairs, raise_descriptor_limit
from headrace.tracing import Tracer, settings_at_start
from headrace.wire import pb
from headrace.worker_side import build_supervisor
from headrace.workers.growth import GrowthLimits
from headrace.workers.recycler import Recycler
from headrace_backends.optimize.plan_cache import PlanCache

log = logging.getLogger("headrace")

SWEEP_INTERVAL_S = 5.0


async def serve(
    settings: Settings,
    announce: Callable[[str], None],
    optimize: Callable[[Subject], Sequence[str]] | None = None,
) -> None:
    """Run a server until SIGTERM or SIGINT, and drain it; a second SIGINT ends it at once.

    ``announce`` is given a line for each model and one when the server is ready. ``optimize`` makes the command line
    of the optimiser beside it, ``headrace optimize`` unless given.

    Raises:
        CannotStart: a port is taken, there is no repository, or an option needs another.
    """
    check_pairs(settings)
    check_folder(settings.repository)
    raise_descriptor_limit()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGINT, lambda: _interrupt(loop, stop, announce))
    await App(settings, optimize).run(stop, announce)


def _interrupt(loop: asyncio.AbstractEventLoop, stop: asyncio.Event, announce: Callable[[str], None]) -> None:
    """The first Ctrl-C asks for the drain. Whoever presses it again does not wait for that; workers end with us."""
    if stop.is_set():
        announce("stopped at once, by a second Ctrl-C")
        loop.remove_signal_handler(signal.SIGINT)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
    stop.set()


class App:
    """One server: front ends, engine, repository and workers."""

    def __init__(self, settings: Settings, optimize: Callable[[Subject], Sequence[str]] | None = None) -> None:
        self._settings = settings
        try:
            restrictions = Restrictions.parse(settings.restricted_api)
            forwarding = HeaderForwarding(settings.forward_headers)
            tracing = settings_at_start(
                settings.trace_file, settings.trace_level, settings.trace_rate, settings.trace_count
            )
            growth_limits = _growth_limits(settings)
            recordings = allowed_folder(settings.plan_cache, allowed=settings.allow_recording)
            self.cache = _cache(settings)
        except (ValueError, InvalidRequest, RedisMissing) as error:
            raise CannotStart(str(error)) from error
        self.supervisor = build_supervisor(settings)
        self.pager = Pager(settings.resident_bytes) if settings.resident_bytes else None
        serve = partial(
            ServedVersion, supervisor=self.supervisor, with_summaries=settings.summary_metrics, pager=self.pager
        )
        plans = None if settings.optimize == "off" else Plans(PlanCache(settings.plan_cache))
        self.repository = Repository(settings.repository, self.supervisor, settings.model_control, serve, plans)
        self.drift_guard = (
            DriftGuard(self.repository.served, plans, settings.drift_interval)
            if plans is not None and settings.drift_interval
            else None
        )
        self.optimizer = self._optimizer(plans, optimize) if settings.optimize == "background" else None
        self.tracer = Tracer(tracing)
        self.recorder = Recorder(self.repository, recordings, settings.recording_bytes)
        self.engine = Engine(self.repository, settings.max_inflight_bytes, self.cache, self.tracer, self.recorder)
        self.supervisor.desk = CallDesk(self.engine)
        shares_memory = settings.allow_client_shm
        self.state = ServerState(
            settings.server_name,
            self.repository,
            strict_readiness=settings.strict_readiness,
            shares_gpu_memory=shares_memory and DRIVER_NODE.exists(),
        )
        self.cuda_regions = CudaRegions(shares_memory, settings.log_format, lambda name: name in self.regions)
        self.regions = SharedMemoryRegions(shares_memory, taken=self.cuda_regions.holds)
        regions = ClientMemory(self.regions, self.cuda_regions) if shares_memory else None
        device_tensors = DeviceTensors(self.engine, regions, self.cuda_regions) if regions is not None else None
        log_settings = LogSettings(levels_from(settings.log_level), json_lines=settings.log_format == "json")
        log_settings.on_change.append(self.supervisor.set_logging)
        self.supervisor.set_logging(log_settings.levels)
        self.recycler = Recycler(self.supervisor, growth_limits, settings.recycle_grace)
        readings = Readings(
            self.engine,
            self.repository,
            self.supervisor,
            self.state,
            self.cache,
            self.recycler,
            self.pager,
            self.optimizer,
        )
        self.gpu_sampler = GpuSampler()
        metrics = Metrics(readings.models, readings.workers, readings.server, readings.custom, self.gpu_sampler.latest)
        http_infer = HttpInfer(
            self.engine,
            settings.max_request_bytes,
            regions=regions,
            device_tensors=device_tensors,
            forwarding=forwarding,
            load_report=LoadReport(readings.load),
        )
        app = create_app(
            http_infer,
            self.state,
            metrics,
            [
                lambda app: add_statistics(app, self.repository, readings.workers),
                lambda app: add_settings(app, log_settings, self.tracer, self.repository.has),
                lambda app: add_shared_memory(app, self.regions, self.cuda_regions),
                lambda app: add_recording(app, self.recorder, self.repository),
                lambda app: add_plans(
                    app, self.repository, plans, settings.plan_cache, used=settings.optimize != "off"
                ),
            ],
            restrictions,
        )
        arrivals = Arrivals(settings.max_inflight_bytes)
        grpc_infer = GrpcInfer(self.engine.count_unreadable, regions=regions, forwarding=forwarding)
        services = [
            InferenceService(self.repository, self.state),
            StreamService(self.engine, grpc_infer, device_tensors),
            StatisticsService(self.repository, readings.workers),
            SettingsService(log_settings, self.tracer, self.repository.has),
            SharedMemoryService(self.regions, self.cuda_regions),
        ]
        ports = [
            (settings.http_port, "--http-port"),
            (settings.metrics_port, "--metrics-port"),
            (settings.grpc_port, "--grpc-port"),
        ]
        http_socket, metrics_socket, grpc_socket = bind_all(settings.host, ports)
        self.grpc = GrpcServer(
            {pb.SERVICE: (pb.RPCS, services), pb.HEALTH_SERVICE: (pb.HEALTH_RPCS, [HealthService(self.state)])},
            InferLane(self.engine, grpc_infer, device_tensors),
            grpc_socket,
            settings.max_grpc_bytes,
            arrivals,
            compression=settings.grpc_compression,
            restrictions=restrictions,
        )
        protocol = lane(http_infer, settings.max_request_bytes, arrivals, restrictions)
        self.http = HttpServer(app, http_socket, protocol, settings.read_timeout)
        self.metrics = HttpServer(
            metrics_app(metrics),
            metrics_socket,
            lane(None, settings.max_request_bytes, arrivals),
            settings.read_timeout,
        )
        self.watcher = Watcher(self.repository)

    async def run(self, stop: asyncio.Event, announce: Callable[[str], None]) -> None:
        """Serve until ``stop`` is set, then drain: accepted requests are answered, then workers end."""
        self.supervisor.start()
        for front_end in (self.http, self.metrics, self.grpc):
            await front_end.start()
        loading = _begin(self._load(announce), "the repository is not followed")
        optimizing = _begin(self._optimize(), "models are not optimised")
        watching = [
            _begin(self._sweep(), "shared memory is not watched"),
            _begin(self.recycler.run(), "the memory of workers is not watched"),
            _begin(self._check_plans(), "the answers of optimised models are not watched"),
            _begin(self.gpu_sampler.run(), "GPUs are not measured"),
        ]
        await stop.wait()
        for task in (*watching, optimizing):
            task.cancel()
        announce(f"stopping: accepted requests have {self._settings.drain_timeout:g} s to be answered")
        deadline = monotonic() + self._settings.drain_timeout
        self.state.stopping = True
        self.watcher.stop()
        loading.cancel()
        # The front ends first: a request that a connection still brings is answered as well.
        await asyncio.gather(
            *(front_end.drain(max(0.1, deadline - monotonic())) for front_end in (self.http, self.grpc))
        )
        self.engine.stop_accepting()
        await self.recorder.close()
        await asyncio.gather(optimizing, return_exceptions=True)  # it was cancelled, and kills what it runs
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.1, deadline - monotonic())):
                await self.repository.close()
        if self.pager is not None:
            await self.pager.close()
        await self.cuda_regions.close()
        await self.supervisor.close()
        await self.metrics.drain(0.5)
        await asyncio.to_thread(self.tracer.close)
        if self.cache is not None:
            await self.cache.close()
        await asyncio.gather(loading, *watching, return_exceptions=True)
        announce("stopped")

    async def _check_plans(self) -> None:
        if self.drift_guard is not None:
            await self.drift_guard.run()

    def _optimizer(
        self, plans: Plans | None, command: Callable[[Subject], Sequence[str]] | None
    ) -> BackgroundOptimizer:
        settings = self._settings
        # Both as absolute paths: the folder that the server was started in may be another one's.
        repository, plan_cache = settings.repository.absolute(), settings.plan_cache.resolve()
        optimizer = BackgroundOptimizer(
            lambda: subjects_of(self.repository, plans),
            partial(read_room, plan_cache),
            command or partial(command_for, repository=repository, plan_cache=plan_cache),
            self.repository.take_plan,
            settings.optimize_time_limit,
        )
        if plans is not None:
            plans.on_refused = optimizer.on_refused
        return optimizer

    async def _optimize(self) -> None:
        if self.optimizer is not None:
            await self.optimizer.run()

    async def _sweep(self) -> None:
        """Let go of shared memory whose owners have."""
        while True:
            await asyncio.sleep(SWEEP_INTERVAL_S)
            self.cuda_regions.sweep()
            for name in self.regions.sweep():
                log.info("shared memory region %s is dropped: its owner has removed it", name)

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
        if not prints:
            announce(no_model_line(settings.repository))
        for line in await model_lines(self.repository):
            announce(line)
        announce(ready_line(settings.host, self.http.port, self.grpc.port, self.metrics.port))
        if settings.model_control == "poll":
            await self.watcher.run(prints)


def _cache(settings: Settings) -> Cache | None:
    """The response cache that the settings ask for.

    Raises:
        ValueError: the Redis URL is none.
        RedisMissing: the package for Redis is not installed.
    """
    if settings.cache_redis:
        return RedisCache(settings.cache_redis)
    return ResponseCache(settings.cache_bytes) if settings.cache_bytes else None


def _growth_limits(settings: Settings) -> GrowthLimits:
    """What a worker's memory may come to.

    Raises:
        ValueError: the bounds make no sense.
    """
    if 0 < settings.worker_memory_growth <= 1:
        raise ValueError(
            f"--worker-memory-growth is {settings.worker_memory_growth:g}, expected 0, or a factor above 1 as 1.5"
        )
    return GrowthLimits(
        settings.worker_memory_growth,
        settings.worker_memory_growth_bytes,
        settings.worker_memory_limit,
        settings.recycle_interval,
    )


def _begin(work: Coroutine[Any, Any, None], gone: str) -> asyncio.Task[None]:
    """Do it beside all the rest; should it fail, the log says what is ``gone`` then."""
    task = asyncio.get_running_loop().create_task(work)
    task.add_done_callback(partial(_log_failure, gone))
    return task


def _log_failure(what: str, task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.error("%s any more", what, exc_info=task.exception())

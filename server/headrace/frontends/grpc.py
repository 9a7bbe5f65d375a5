"""The gRPC service: the protocol's RPCs over the engine, and grpc.health.v1."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from time import monotonic_ns
from typing import Any

import grpc
from google.protobuf.message import DecodeError

import headrace
from headrace.core.errors import HeadraceError, InvalidRequest
from headrace.engine import Engine
from headrace.frontends.grpc_infer import GrpcInfer
from headrace.frontends.grpc_stream import StreamService
from headrace.frontends.load_override import load_override, unload_dependents
from headrace.frontends.restrictions import Restrictions
from headrace.frontends.server_state import EXTENSIONS, ServerState
from headrace.frontends.status import GRPC_STATUS
from headrace.repository.to_triton import to_message
from headrace.wire import pb
from headrace.wire.grpc_v2 import decode_parameters, encode_metadata

log = logging.getLogger(__name__)

MAX_MESSAGE_LENGTH = 2000  # of an error; it travels in the headers, which are bounded

Context = Any  # grpc.aio.ServicerContext, which the type stubs make generic and the library does not
Handler = Callable[[Any, Context], Awaitable[Any]]


class GrpcServer:
    """Serves both services on one port until it is drained."""

    def __init__(
        self,
        services: Sequence[object],
        state: ServerState,
        address: tuple[str, int],
        max_bytes: int,
        *,
        compression: grpc.Compression = grpc.Compression.NoCompression,
        restrictions: Restrictions | None = None,
    ) -> None:
        host, port = address
        self._leaving = [service.leave for service in services if isinstance(service, StreamService)]
        self._server = grpc.aio.server(
            compression=compression,
            options=[
                ("grpc.max_receive_message_length", max_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),  # a taken port is an error, not a shared one
                # Clients ping as Triton allows them to; the library's defaults would close their connections.
                ("grpc.http2.min_ping_interval_without_data_ms", 5000),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.max_ping_strikes", 0),
            ],
        )
        self._server.add_generic_rpc_handlers(
            (
                _handlers(pb.SERVICE, pb.RPCS, services, restrictions),
                _handlers(pb.HEALTH_SERVICE, pb.HEALTH_RPCS, [HealthService(state)], restrictions),
            )
        )
        shown = f"[{host}]" if ":" in host else host
        self.port: int = self._server.add_insecure_port(f"{shown}:{port}")

    async def start(self) -> None:
        """Accept calls."""
        await self._server.start()

    async def drain(self, timeout_s: float) -> None:
        """Accept no more calls and finish those under way."""
        for leave in self._leaving:
            leave()
        await self._server.stop(timeout_s)


class InferenceService:
    """Most RPCs of inference.GRPCInferenceService, each a method of its name."""

    def __init__(self, engine: Engine, state: ServerState, reader: GrpcInfer) -> None:
        self._engine = engine
        self._repository = engine.repository
        self._state = state
        self._reader = reader

    async def ServerLive(self, _: Any, __: Context) -> Any:  # noqa: N802 - the protocol's name
        """Whether the process answers at all."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, _: Any, __: Context) -> Any:  # noqa: N802
        """Whether inference requests can be sent."""
        return pb.ServerReadyResponse(ready=not self._state.why_not_ready())

    async def ModelReady(self, request: Any, _: Context) -> Any:  # noqa: N802
        """Whether a request for the model would be run now."""
        return pb.ModelReadyResponse(ready=self._repository.is_ready(request.name, request.version))

    async def ServerMetadata(self, _: Any, __: Context) -> Any:  # noqa: N802
        """The server's name, its version and the protocol extensions that it offers."""
        return pb.ServerMetadataResponse(name=self._state.name, version=headrace.__version__, extensions=EXTENSIONS)

    async def ModelMetadata(self, request: Any, _: Context) -> Any:  # noqa: N802
        """A model's versions, inputs and outputs."""
        served = self._repository.lookup(request.name, request.version)
        return encode_metadata(served.info, self._repository.versions(request.name))

    async def ModelConfig(self, request: Any, _: Context) -> Any:  # noqa: N802
        """A model's configuration, with everything that was inferred filled in."""
        served = self._repository.lookup(request.name, request.version)
        return pb.ModelConfigResponse(config=to_message(served.folder.config, served.info))

    async def ModelInfer(self, request: Any, context: Context) -> Any:  # noqa: N802
        """Run the model on the request's inputs. A client that cancels takes its request back."""
        remaining_s = context.time_remaining()
        deadline_ns = 0 if remaining_s is None else monotonic_ns() + int(min(remaining_s, 1e6) * 1e9)
        metadata = context.invocation_metadata() or ()
        try:
            asked, _ = self._reader.read(request, deadline_ns, metadata)
        except HeadraceError:
            self._engine.count_unreadable(request.model_name, request.model_version)
            raise
        return self._reader.write(await self._engine.infer(asked), asked)

    async def RepositoryIndex(self, request: Any, _: Context) -> Any:  # noqa: N802
        """Every model in the repository, its versions and their states."""
        response = pb.RepositoryIndexResponse()
        for one in self._repository.index(request.ready):
            response.models.add(name=one.name, version=one.version, state=one.state, reason=one.reason)
        return response

    async def RepositoryModelLoad(self, request: Any, _: Context) -> Any:  # noqa: N802
        """Load a model, or anew what has changed of it."""
        name = _model_name(request)
        config, files = load_override(name, decode_parameters(request.parameters))
        await self._repository.load(name, config, files)
        return pb.RepositoryModelLoadResponse(model_name=name, isLoaded=True)

    async def RepositoryModelUnload(self, request: Any, _: Context) -> Any:  # noqa: N802
        """Stop serving a model; what was accepted is answered."""
        name = _model_name(request)
        dependents = unload_dependents(name, decode_parameters(request.parameters))
        await self._repository.unload(name, dependents=dependents)
        return pb.RepositoryModelUnloadResponse(model_name=name, isUnloaded=True)


class HealthService:
    """The RPCs of grpc.health.v1.Health. Every service has the server's own readiness."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    async def Check(self, _: Any, __: Context) -> Any:  # noqa: N802
        """The present status."""
        return self._status()

    async def Watch(self, _: Any, context: Context) -> None:  # noqa: N802
        """The present status, and each change of it."""
        last = None
        while True:
            status = self._status()
            if status != last:
                await context.write(status)
                last = status
            if self._state.stopping:
                return  # else this call alone would hold up the server's end
            await asyncio.sleep(0.5)

    def _status(self) -> Any:
        serving = not self._state.why_not_ready()
        return pb.HealthCheckResponse(
            status=pb.HealthCheckResponse.SERVING if serving else pb.HealthCheckResponse.NOT_SERVING
        )


def _model_name(request: Any) -> str:
    """The model of a load or unload. KServe's clients put it into the field that Triton names the repository."""
    name: str = request.model_name or request.repository_name
    if not name:
        raise InvalidRequest("the request names no model")
    return name


def _handlers(service_name: str, rpcs: Any, services: Sequence[object], restrictions: Restrictions | None) -> Any:
    """The RPCs that one of ``services`` has a method for; gRPC itself answers UNIMPLEMENTED to the others."""
    handlers = {}
    for name, rpc in rpcs.items():
        method = next((getattr(service, name) for service in services if hasattr(service, name)), None)
        if method is None:
            continue
        if rpc.client_streaming:
            make, behaviour = grpc.stream_stream_rpc_method_handler, method
        elif rpc.server_streaming:
            make, behaviour = grpc.unary_stream_rpc_method_handler, method
        else:
            make, behaviour = grpc.unary_unary_rpc_method_handler, _guarded(name, method, rpc.request)
        if restrictions is not None and restrictions.active:
            behaviour = _restricted(name, behaviour, restrictions)
        # Requests are parsed by the guarded call: gRPC would answer UNKNOWN to bytes that are no message.
        handlers[name] = make(behaviour, response_serializer=rpc.response.SerializeToString)
    return grpc.method_handlers_generic_handler(service_name, handlers)


def _restricted(name: str, method: Handler, restrictions: Restrictions) -> Handler:
    """``method``, for callers that may use it."""

    async def call(request: Any, context: Context) -> Any:
        problem = restrictions.grpc_problem(name, context.invocation_metadata() or ())
        if problem is not None:
            await context.abort(GRPC_STATUS[problem.kind], str(problem))
        return await method(request, context)

    return call


def _guarded(name: str, method: Handler, request_class: Any) -> Handler:
    """``method`` over raw bytes, with every error made into a status."""

    async def call(data: bytes, context: Context) -> Any:
        try:
            return await method(request_class.FromString(data), context)
        except DecodeError as error:
            code, message = grpc.StatusCode.INVALID_ARGUMENT, f"the request is no {name} message: {error}"
        except HeadraceError as error:
            code, message = GRPC_STATUS[error.kind], str(error)
        except Exception:
            log.exception("%s failed", name)
            code, message = grpc.StatusCode.INTERNAL, "the request failed; the server's log says why"
        await context.abort(code, message[:MAX_MESSAGE_LENGTH])
        raise AssertionError("abort raises")

    return call

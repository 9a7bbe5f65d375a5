"""The gRPC services: most of the protocol's RPCs, each a method of its name, and grpc.health.v1."""

import asyncio
from typing import Any

import headrace
from headrace.core.errors import InvalidRequest
from headrace.frontends.load_override import load_override, unload_dependents
from headrace.frontends.server_state import ServerState
from headrace.repository.repository import Repository
from headrace.repository.to_triton import to_message
from headrace.wire import pb
from headrace.wire.grpc_v2 import decode_parameters, encode_metadata

Call = Any  # what a procedure is given of its call; only those that stream look at it


class InferenceService:
    """The RPCs of inference.GRPCInferenceService about the server, its models and its repository."""

    def __init__(self, repository: Repository, state: ServerState) -> None:
        self._repository = repository
        self._state = state

    async def ServerLive(self, _: Any, __: Call) -> Any:  # noqa: N802 - the protocol's name
        """Whether the process answers at all."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, _: Any, __: Call) -> Any:  # noqa: N802
        """Whether inference requests can be sent."""
        return pb.ServerReadyResponse(ready=not self._state.why_not_ready())

    async def ModelReady(self, request: Any, _: Call) -> Any:  # noqa: N802
        """Whether a request for the model would be run now."""
        return pb.ModelReadyResponse(ready=self._repository.is_ready(request.name, request.version))

    async def ServerMetadata(self, _: Any, __: Call) -> Any:  # noqa: N802
        """The server's name, its version and the protocol extensions that it offers."""
        state = self._state
        return pb.ServerMetadataResponse(name=state.name, version=headrace.__version__, extensions=state.extensions)

    async def ModelMetadata(self, request: Any, _: Call) -> Any:  # noqa: N802
        """A model's versions, inputs and outputs."""
        served = self._repository.lookup(request.name, request.version)
        return encode_metadata(served.info, self._repository.versions(request.name))

    async def ModelConfig(self, request: Any, _: Call) -> Any:  # noqa: N802
        """A model's configuration, with everything that was inferred filled in."""
        served = self._repository.lookup(request.name, request.version)
        return pb.ModelConfigResponse(config=to_message(served.folder.config, served.info))

    async def RepositoryIndex(self, request: Any, _: Call) -> Any:  # noqa: N802
        """Every model in the repository, its versions and their states."""
        response = pb.RepositoryIndexResponse()
        for one in await self._repository.index(request.ready):
            response.models.add(name=one.name, version=one.version, state=one.state, reason=one.reason)
        return response

    async def RepositoryModelLoad(self, request: Any, _: Call) -> Any:  # noqa: N802
        """Load a model, or reload it when its files have changed."""
        name = _model_name(request)
        config, files = load_override(name, decode_parameters(request.parameters, f"model '{name}'"))
        await self._repository.load(name, config, files)
        return pb.RepositoryModelLoadResponse(model_name=name, isLoaded=True)

    async def RepositoryModelUnload(self, request: Any, _: Call) -> Any:  # noqa: N802
        """Stop serving a model; what was accepted is answered."""
        name = _model_name(request)
        dependents = unload_dependents(name, decode_parameters(request.parameters, f"model '{name}'"))
        await self._repository.unload(name, dependents=dependents)
        return pb.RepositoryModelUnloadResponse(model_name=name, isUnloaded=True)


class HealthService:
    """The RPCs of grpc.health.v1.Health. Every service has the server's own readiness."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    async def Check(self, _: Any, __: Call) -> Any:  # noqa: N802
        """The present status."""
        return self._status()

    async def Watch(self, _: Any, call: Call) -> None:  # noqa: N802
        """The present status, and each change of it."""
        last = None
        while True:
            status = self._status()
            if status != last:
                await call.write(status)
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

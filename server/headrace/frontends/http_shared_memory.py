"""The HTTP paths of the shared memory extensions."""

from collections.abc import Awaitable, Callable
from enum import Enum
from typing import Any, TypeVar

import msgspec
from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, Field

from headrace.core.errors import InvalidRequest
from headrace.cuda_memory.regions import CudaRegions
from headrace.frontends import schemas
from headrace.frontends.http_bodies import json_response
from headrace.shared_memory import SharedMemoryRegions


class SystemRegionBody(BaseModel):
    """A registered region of system shared memory."""

    name: str
    key: str
    offset: int
    byte_size: int


class CudaRegionBody(BaseModel):
    """A registered region of CUDA shared memory."""

    name: str
    device_id: int
    byte_size: int


class RegisterSystemBody(BaseModel):
    """A part of a shared memory object, which the client made with shm_open."""

    key: str = Field(description="The object's name, with or without the leading slash.")
    offset: int = Field(0, ge=0)
    byte_size: int = Field(gt=0)


class CudaHandleBody(BaseModel):
    """A cudaIpcMemHandle_t."""

    b64: str = Field(description="Its 64 bytes, in base64.")


class RegisterCudaBody(BaseModel):
    """Memory of a GPU, which the client has allocated."""

    raw_handle: CudaHandleBody
    device_id: int = Field(ge=0, description="The number that CUDA gives the GPU on the server.")
    byte_size: int = Field(gt=0)


class _RegisterSystem(msgspec.Struct):
    key: str
    byte_size: int
    offset: int = 0


class _CudaHandle(msgspec.Struct):
    b64: bytes  # msgspec decodes the base64


class _RegisterCuda(msgspec.Struct):
    raw_handle: _CudaHandle
    device_id: int
    byte_size: int


def add_shared_memory(app: FastAPI, system: SharedMemoryRegions, cuda: CudaRegions) -> None:
    """Add the paths that say, make and forget which memory clients share with this server."""

    async def register_system(name: str, body: bytes) -> None:
        wanted = _parse(body, _RegisterSystem, name)
        system.register(name, wanted.key, wanted.offset, wanted.byte_size)

    async def register_cuda(name: str, body: bytes) -> None:
        wanted = _parse(body, _RegisterCuda, name)
        await cuda.register(name, wanted.raw_handle.b64, wanted.device_id, wanted.byte_size)

    async def unregister_system(name: str) -> None:
        system.unregister(name)

    system_body = schemas.json_body(
        RegisterSystemBody, {"an object's beginning": {"key": "/headrace_example", "offset": 0, "byte_size": 256}}
    )
    cuda_body = schemas.json_body(
        RegisterCudaBody,
        {"a device's memory": {"raw_handle": {"b64": "A" * 86 + "=="}, "device_id": 0, "byte_size": 256}},
    )
    prefix = "/v2/systemsharedmemory"
    _add_kind(app, prefix, system, register_system, unregister_system, SystemRegionBody, system_body)
    _add_kind(app, "/v2/cudasharedmemory", cuda, register_cuda, cuda.unregister, CudaRegionBody, cuda_body)


def _add_kind(
    app: FastAPI,
    prefix: str,
    regions: SharedMemoryRegions | CudaRegions,
    register_region: Callable[[str, bytes], Awaitable[None]],
    unregister_region: Callable[[str], Awaitable[None]],
    region_body: type[BaseModel],
    register_body: dict[str, Any],
) -> None:
    """Add the paths of one kind of memory, which differ between the kinds in the bodies only."""
    # CUDA's are refused where one is registered, system's altogether where --allow-client-shm is not given.
    refusals = (501,) if isinstance(regions, SharedMemoryRegions) else ()
    tags: list[str | Enum] = ["shared memory"]
    regions_body = list[region_body]  # type: ignore[valid-type]  # a class that is given at run time

    path = f"{prefix}/status"

    @app.get(path, tags=tags, response_model=regions_body, **schemas.operation(path, *refusals))
    async def status() -> Response:
        """The regions that are registered."""
        return json_response(regions.status())

    path = f"{prefix}/region/{{name}}/status"

    @app.get(path, tags=tags, response_model=regions_body, **schemas.operation(path, *refusals))
    async def status_of_one(request: Request) -> Response:
        """One region, as an array of one."""
        return json_response(regions.status(request.path_params["name"]))

    path = f"{prefix}/region/{{name}}/register"
    described = schemas.operation(path, 400, 413, 501, 503, body=register_body)

    @app.post(path, tags=tags, response_class=Response, **described)
    async def register(request: Request) -> Response:
        """Register a region, so that requests can have tensors in it."""
        await register_region(request.path_params["name"], await request.body())
        return Response()

    path = f"{prefix}/region/{{name}}/unregister"

    @app.post(path, tags=tags, response_class=Response, **schemas.operation(path, 413, *refusals))
    async def unregister(request: Request) -> Response:
        """Unregister a region; it is no error if there is none of that name."""
        await unregister_region(request.path_params["name"])
        return Response()

    path = f"{prefix}/unregister"

    @app.post(path, tags=tags, response_class=Response, **schemas.operation(path, 413, *refusals))
    async def unregister_all() -> Response:
        """Unregister every region."""
        await unregister_region("")
        return Response()


_Body = TypeVar("_Body", bound=msgspec.Struct)


def _parse(body: bytes, kind: type[_Body], name: str) -> _Body:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"cannot register shared memory region '{name}': {error}") from None

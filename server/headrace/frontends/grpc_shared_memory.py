"""The RPCs of the shared memory extensions, which are part of inference.GRPCInferenceService."""

from typing import Any

from headrace.cuda_memory.regions import CudaRegions
from headrace.shared_memory import SharedMemoryRegions
from headrace.wire import pb


class SharedMemoryService:
    """Says, makes and forgets which memory clients share with this server; each RPC is a method of its name."""

    def __init__(self, system: SharedMemoryRegions, cuda: CudaRegions) -> None:
        self._system = system
        self._cuda = cuda

    async def SystemSharedMemoryStatus(self, request: Any, _: Any) -> Any:  # noqa: N802 - the protocol's name
        """The regions of system shared memory that are registered, or the one that is named."""
        response = pb.SystemSharedMemoryStatusResponse()
        for region in self._system.status(request.name):
            status = response.regions[region.name]
            status.name = region.name
            status.key = region.key
            status.offset = region.offset
            status.byte_size = region.byte_size
        return response

    async def SystemSharedMemoryRegister(self, request: Any, _: Any) -> Any:  # noqa: N802
        """Register a region of system shared memory."""
        self._system.register(request.name, request.key, request.offset, request.byte_size)
        return pb.SystemSharedMemoryRegisterResponse()

    async def SystemSharedMemoryUnregister(self, request: Any, _: Any) -> Any:  # noqa: N802
        """Forget a region of system shared memory, or every one when none is named."""
        self._system.unregister(request.name)
        return pb.SystemSharedMemoryUnregisterResponse()

    async def CudaSharedMemoryStatus(self, request: Any, _: Any) -> Any:  # noqa: N802
        """The regions of CUDA shared memory that are registered, or the one that is named."""
        response = pb.CudaSharedMemoryStatusResponse()
        for region in self._cuda.status(request.name):
            status = response.regions[region.name]
            status.name = region.name
            status.device_id = region.device_id
            status.byte_size = region.byte_size
        return response

    async def CudaSharedMemoryRegister(self, request: Any, _: Any) -> Any:  # noqa: N802
        """Register a region of CUDA shared memory."""
        await self._cuda.register(request.name, request.raw_handle, request.device_id, request.byte_size)
        return pb.CudaSharedMemoryRegisterResponse()

    async def CudaSharedMemoryUnregister(self, request: Any, _: Any) -> Any:  # noqa: N802
        """Forget a region of CUDA shared memory, or every one when none is named."""
        await self._cuda.unregister(request.name)
        return pb.CudaSharedMemoryUnregisterResponse()

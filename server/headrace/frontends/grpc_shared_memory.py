"""The RPCs of the shared memory extensions, which are part of inference.GRPCInferenceService."""

from typing import Any

from headrace.shared_memory import CudaSharedMemoryRegions, SharedMemoryRegions
from headrace.wire import pb


class SharedMemoryService:
    """Says, makes and forgets which memory clients share with this server; each RPC is a method of its name."""

    def __init__(self, system: SharedMemoryRegions, cuda: CudaSharedMemoryRegions) -> None:
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
        if request.name:
            self._system.unregister(request.name)
        else:
            self._system.unregister_all()
        return pb.SystemSharedMemoryUnregisterResponse()

    async def CudaSharedMemoryStatus(self, request: Any, _: Any) -> Any:  # noqa: N802
        """The regions of CUDA shared memory that are registered: none."""
        self._cuda.status(request.name)
        return pb.CudaSharedMemoryStatusResponse()

    async def CudaSharedMemoryRegister(self, request: Any, _: Any) -> Any:  # noqa: N802
        """Refuse a region of CUDA shared memory, which this server does not offer."""
        self._cuda.register(request.name)

    async def CudaSharedMemoryUnregister(self, request: Any, _: Any) -> Any:  # noqa: N802
        """Forget a region of CUDA shared memory, or every one when none is named."""
        if request.name:
            self._cuda.unregister(request.name)
        else:
            self._cuda.unregister_all()
        return pb.CudaSharedMemoryUnregisterResponse()

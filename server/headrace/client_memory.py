"""The regions of both kinds that clients registered, as requests name them: by a name that is one kind's only."""

from headrace.core.errors import NotFound
from headrace.core.tensor import Buffer
from headrace.cuda_memory.regions import CudaRegions
from headrace.shared_memory import SharedMemoryRegions


class ClientMemory:
    """``core.regions.Regions`` over both kinds. What lies on a GPU is fetched and delivered by others, beside this."""

    def __init__(self, system: SharedMemoryRegions, cuda: CudaRegions) -> None:
        self._system = system
        self._cuda = cuda

    def is_on_gpu(self, region: str) -> bool:
        """Whether a region is CUDA's, also if it is gone: then those know why."""
        return region in self._cuda and region not in self._system

    def check(self, region: str, offset: int, byte_size: int) -> None:
        """See that the bytes are there."""
        if self.is_on_gpu(region):
            self._cuda.check(region, offset, byte_size)
        else:
            self._system.check(region, offset, byte_size)

    def read(self, region: str, offset: int, byte_size: int) -> bytes | None:
        """A copy of the bytes; None for those on a GPU, once it is seen that they are there."""
        if self.is_on_gpu(region):
            self._cuda.check(region, offset, byte_size)
            return None
        return self._system.read(region, offset, byte_size)

    def write(self, region: str, offset: int, byte_size: int, data: Buffer) -> None:
        """Put ``data`` there, which is not on a GPU."""
        if self.is_on_gpu(region):  # else it would have been delivered before
            raise NotFound(f"Unable to find shared memory region: '{region}' was registered anew while it was in use")
        self._system.write(region, offset, byte_size, data)

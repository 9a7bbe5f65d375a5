"""The memory of an engine's tensors: on the GPU, and beside it on the host where copies start and end."""

from headrace_backends.tensorrt.cuda import Device, Pinned

_ALIGNMENT = 512  # of sizes, so that batches of nearly the same size share a buffer


class TensorBuffer:
    """One tensor's: grows as it must and never shrinks. Who keeps its addresses must ask again when it has grown."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._nbytes = 0
        self.address = 0  # on the GPU
        self.pinned: Pinned | None = None

    def reserve(self, nbytes: int) -> bool:
        """Make room for so much; returns whether the addresses are others now. Nothing may be using the old ones.

        Raises:
            MemoryError: there is not enough; the buffer is empty then.
        """
        if nbytes <= self._nbytes and self.pinned is not None:
            return False
        self.release()
        size = max(_ALIGNMENT, -(-nbytes // _ALIGNMENT) * _ALIGNMENT)
        self.address = self._device.allocate(size)
        try:
            self.pinned = self._device.allocate_pinned(size)
        except BaseException:
            self._device.free(self.address)
            self.address = 0
            raise
        self._nbytes = size
        return True

    def release(self) -> None:
        """Give both back."""
        if self.address:
            self._device.free(self.address)
        if self.pinned is not None:
            self._device.free_pinned(self.pinned)
        self.address, self.pinned, self._nbytes = 0, None, 0

"""Memory of a GPU that another process has allocated and lends by a handle: opened, read and written."""

import ctypes
from contextlib import suppress

from headrace_backends.tensorrt.cuda import CudaDevice, CudaDriver, CudaError, IpcHandle

_LAZY_PEER_ACCESS = 1  # CUipcMem_flags; there is no other


class TooShort(Exception):
    """A process lends less memory than it says."""


class LentMemory:
    """What other processes lend of one GPU. Addresses are plain numbers, of the GPU's memory and of the host's.

    Raises:
        MemoryError: from each method, there is not enough of it.
        DeviceLost: from each method, this process cannot use the GPU any more.
        CudaError: from each method, anything else.
    """

    def __init__(self, driver: CudaDriver, device: CudaDevice) -> None:
        self._call = driver.call
        self._device = device
        self._stream = device.make_stream()

    def open(self, handle: bytes, nbytes: int) -> int:
        """The address at which this process sees memory of which it needs ``nbytes``.

        Raises:
            TooShort: it is not as large as that.
        """
        self._device.make_current()
        address = ctypes.c_uint64()
        given = IpcHandle.from_buffer_copy(handle)
        self._call("cuIpcOpenMemHandle_v2", ctypes.byref(address), given, _LAZY_PEER_ACCESS)
        lent_bytes = self._bytes_from(address.value)
        if lent_bytes is not None and lent_bytes < nbytes:
            self.close(address.value)
            raise TooShort(f"byte_size is {nbytes}, and the handle stands for {lent_bytes} bytes")
        return address.value

    def close(self, address: int) -> None:
        """Forget it: its owner may free it then."""
        self._device.make_current()
        self._call("cuIpcCloseMemHandle", address)

    def read(self, address: int, host_address: int, nbytes: int) -> None:
        """Copy to the host; all is there on return."""
        self._device.make_current()
        self._call("cuMemcpyDtoHAsync_v2", host_address, address, nbytes, self._stream)
        self._device.wait(self._stream)

    def write(self, address: int, host_address: int, nbytes: int) -> None:
        """Copy to the GPU; all is there on return, also for the owner of the memory."""
        self._device.make_current()
        self._call("cuMemcpyHtoDAsync_v2", address, host_address, nbytes, self._stream)
        self._device.wait(self._stream)

    def _bytes_from(self, address: int) -> int | None:
        """How much there is from an address on; None where the driver does not tell: it refuses copies past the end."""
        start, whole_bytes = ctypes.c_uint64(), ctypes.c_size_t()
        with suppress(CudaError):
            self._call("cuMemGetAddressRange_v2", ctypes.byref(start), ctypes.byref(whole_bytes), address)
            return start.value + whole_bytes.value - address
        return None

"""The CUDA driver, as far as engines need it: a thin layer over libcuda, which every NVIDIA driver brings along.

Nothing has to be installed for it, and a machine without a driver says so here and nowhere else. One thread uses it.
"""

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from uuid import UUID

import numpy as np
import numpy.typing as npt

from headrace.core.device import IPC_HANDLE_BYTES
from headrace_backends.base import BackendUnavailable, DeviceLost, LoadError
from headrace_backends.tensorrt.capability import Capability

LIBRARY = "libcuda.so.1"

_OUT_OF_MEMORY = 2
# After these a process cannot use its GPU any more: broken memory, a kernel that failed, a GPU that has gone.
_LOST = {
    46: "CUDA_ERROR_DEVICE_UNAVAILABLE",
    214: "CUDA_ERROR_ECC_UNCORRECTABLE",
    220: "CUDA_ERROR_NVLINK_UNCORRECTABLE",
    226: "CUDA_ERROR_CONTAINED",
    700: "CUDA_ERROR_ILLEGAL_ADDRESS",
    702: "CUDA_ERROR_LAUNCH_TIMEOUT",
    709: "CUDA_ERROR_CONTEXT_IS_DESTROYED",
    710: "CUDA_ERROR_ASSERT",
    714: "CUDA_ERROR_HARDWARE_STACK_ERROR",
    715: "CUDA_ERROR_ILLEGAL_INSTRUCTION",
    716: "CUDA_ERROR_MISALIGNED_ADDRESS",
    717: "CUDA_ERROR_INVALID_ADDRESS_SPACE",
    718: "CUDA_ERROR_INVALID_PC",
    719: "CUDA_ERROR_LAUNCH_FAILED",
    721: "CUDA_ERROR_TENSOR_MEMORY_LEAK",
    810: "CUDA_ERROR_MPS_CLIENT_TERMINATED",
    911: "CUDA_ERROR_EXTERNAL_DEVICE",
}
_UNKNOWN = 999  # also what a GPU says that has fallen off the bus
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute
_UUID_BYTES = 16
_NON_BLOCKING_STREAM = 1
_CAPTURE_OF_THIS_THREAD = 1


class IpcHandle(ctypes.Structure):
    """What one process gives another for memory that it has allocated (CUipcMemHandle); passed by value."""

    _fields_ = (("reserved", ctypes.c_char * IPC_HANDLE_BYTES),)


_pointer, _handle, _size, _int = ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
_out = ctypes.POINTER
# Every function that is used, with what it takes. The names with _v2 are what cuda.h calls them by today.
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "cuInit": (ctypes.c_uint,),
    "cuDriverGetVersion": (_out(_int),),
    "cuDeviceGetCount": (_out(_int),),
    "cuDeviceGet": (_out(_int), _int),
    "cuDeviceGetName": (ctypes.c_char_p, _int, _int),
    "cuDeviceGetAttribute": (_out(_int), _int, _int),
    "cuDeviceTotalMem_v2": (_out(_size), _int),
    "cuDeviceGetUuid_v2": (ctypes.c_char_p, _int),
    "cuDevicePrimaryCtxRetain": (_out(_handle), _int),
    "cuDevicePrimaryCtxRelease_v2": (_int,),
    "cuCtxSetCurrent": (_handle,),
    "cuMemGetInfo_v2": (_out(_size), _out(_size)),
    "cuMemAlloc_v2": (_out(_pointer), _size),
    "cuMemFree_v2": (_pointer,),
    "cuMemHostAlloc": (_out(_handle), _size, ctypes.c_uint),
    "cuMemFreeHost": (_handle,),
    "cuMemGetAddressRange_v2": (_out(_pointer), _out(_size), _pointer),
    "cuIpcGetMemHandle": (_out(IpcHandle), _pointer),
    "cuIpcOpenMemHandle_v2": (_out(_pointer), IpcHandle, ctypes.c_uint),
    "cuIpcCloseMemHandle": (_pointer,),
    "cuMemcpyHtoDAsync_v2": (_pointer, _handle, _size, _handle),
    "cuMemcpyDtoHAsync_v2": (_handle, _pointer, _size, _handle),
    "cuStreamCreate": (_out(_handle), ctypes.c_uint),
    "cuStreamDestroy_v2": (_handle,),
    "cuStreamSynchronize": (_handle,),
    "cuStreamBeginCapture_v2": (_handle, _int),
    "cuStreamEndCapture": (_handle, _out(_handle)),
    "cuGraphInstantiateWithFlags": (_out(_handle), _handle, ctypes.c_ulonglong),
    "cuGraphLaunch": (_handle, _handle),
    "cuGraphExecDestroy": (_handle,),
    "cuGraphDestroy": (_handle,),
    "cuGetErrorName": (_int, _out(ctypes.c_char_p)),
}

Bytes = npt.NDArray[np.uint8]


class CudaError(RuntimeError):
    """A call of the driver failed, and the process can go on."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU as the driver numbers them (CUDA_VISIBLE_DEVICES has its say)."""

    index: int
    name: str
    capability: Capability
    total_bytes: int
    uuid: str = ""  # as GPU-...; of a part of a GPU (MIG) it is the part's


@dataclass(frozen=True, slots=True)
class Pinned:
    """Memory of the host that a GPU copies from and to by itself. ``data`` are its bytes, valid until it is freed."""

    address: int
    data: Bytes


class Device(Protocol):
    """One GPU in use by this thread: addresses and handles are plain numbers. CudaDriver and the tests' fake are two.

    Raises:
        MemoryError: from each, there is not enough of it.
        DeviceLost: from each, this process cannot use the GPU any more.
        CudaError: from each, anything else.
    """

    gpu: Gpu

    def allocate(self, nbytes: int) -> int:
        """Memory of the GPU."""

    def free(self, address: int) -> None:
        """Give that back."""

    def allocate_pinned(self, nbytes: int) -> Pinned:
        """Memory of the host for copies."""

    def free_pinned(self, pinned: Pinned) -> None:
        """Give that back; its bytes must not be touched any more."""

    def copy_in(self, address: int, pinned: Pinned, nbytes: int, stream: int) -> None:
        """Have the stream copy to the GPU."""

    def copy_out(self, pinned: Pinned, address: int, nbytes: int, stream: int) -> None:
        """Have the stream copy from the GPU."""

    def make_stream(self) -> int:
        """A stream of its own."""

    def end_stream(self, stream: int) -> None:
        """Let go of it."""

    def wait(self, stream: int) -> None:
        """Until everything is done that the stream was given."""

    def begin_capture(self, stream: int) -> None:
        """From now on the stream does nothing and remembers what it is given."""

    def end_capture(self, stream: int) -> int:
        """What it was given since, as a graph that can be launched."""

    def launch(self, graph: int, stream: int) -> None:
        """Have the stream do all of it."""

    def end_graph(self, graph: int) -> None:
        """Let go of a graph."""

    def memory(self) -> tuple[int, int]:
        """Free and total bytes."""

    def close(self) -> None:
        """Let go of the GPU."""


class CudaDriver:
    """libcuda, loaded and initialised.

    Raises:
        BackendUnavailable: there is no driver here, or it does not work.
    """

    def __init__(self, library: str = LIBRARY) -> None:
        try:
            self._cuda = ctypes.CDLL(library)
        except OSError as error:
            raise BackendUnavailable(
                f"there is no NVIDIA driver here ({error}); install one, or start the container with GPUs: "
                "docker run --gpus all"
            ) from error
        for name, takes in _FUNCTIONS.items():
            function = getattr(self._cuda, name, None)
            if function is None:
                raise BackendUnavailable(f"the NVIDIA driver here is too old: it has no {name}")
            function.argtypes, function.restype = takes, _int
        status = self._cuda.cuInit(0)
        if status:
            raise BackendUnavailable(
                f"the NVIDIA driver does not work here: cuInit says {self.error_name(status)}; nvidia-smi tells more"
            )

    @property
    def version(self) -> tuple[int, int]:
        """The newest CUDA that the driver takes, as ``(13, 0)``."""
        version = _int()
        self.call("cuDriverGetVersion", ctypes.byref(version))
        return version.value // 1000, version.value % 1000 // 10

    def gpus(self) -> list[Gpu]:
        """Every GPU that is visible."""
        count = _int()
        self.call("cuDeviceGetCount", ctypes.byref(count))
        return [self._gpu(index) for index in range(count.value)]

    def open(self, index: int) -> "CudaDevice":
        """Take a GPU into use on this thread.

        Raises:
            LoadError: there is no such GPU.
        """
        gpus = self.gpus()
        if index >= len(gpus):
            names = ", ".join(f"gpu:{gpu.index} {gpu.name}" for gpu in gpus) or "none"
            shown = os.environ.get("CUDA_VISIBLE_DEVICES")
            hidden = f" (CUDA_VISIBLE_DEVICES is '{shown}')" if shown is not None else ""
            raise LoadError(f"device 'gpu:{index}' is not here; the driver sees {names}{hidden}")
        return CudaDevice(self, gpus[index])

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function.

        Raises:
            MemoryError: there is not enough memory on the GPU, or of the pinned kind.
            DeviceLost: this process cannot use the GPU any more.
            CudaError: anything else.
        """
        status = getattr(self._cuda, name)(*arguments)
        if not status:
            return
        told = f"{name} says {self.error_name(status)}"
        if status == _OUT_OF_MEMORY:
            raise MemoryError(f"the GPU is out of memory: {told}")
        if status in _LOST:
            raise DeviceLost(f"the GPU is lost to this process: {told}")
        raise CudaError(told)

    def error_name(self, status: int) -> str:
        """As ``CUDA_ERROR_NO_DEVICE (100)``."""
        name = ctypes.c_char_p()
        known = self._cuda.cuGetErrorName(status, ctypes.byref(name)) == 0 and name.value
        return f"{name.value.decode() if known and name.value else _LOST.get(status, 'error')} ({status})"

    def _gpu(self, index: int) -> Gpu:
        device, major, minor, total = _int(), _int(), _int(), _size()
        name = ctypes.create_string_buffer(256)
        self.call("cuDeviceGet", ctypes.byref(device), index)
        self.call("cuDeviceGetName", name, len(name), device)
        self.call("cuDeviceGetAttribute", ctypes.byref(major), _CAPABILITY_MAJOR, device)
        self.call("cuDeviceGetAttribute", ctypes.byref(minor), _CAPABILITY_MINOR, device)
        self.call("cuDeviceTotalMem_v2", ctypes.byref(total), device)
        uuid = ctypes.create_string_buffer(_UUID_BYTES)
        self.call("cuDeviceGetUuid_v2", uuid, device)
        return Gpu(
            index,
            name.value.decode(errors="replace"),
            (major.value, minor.value),
            total.value,
            f"GPU-{UUID(bytes=uuid.raw)}",
        )


class CudaDevice:
    """A GPU's primary context, which the library's own code uses too, current on the thread that made this."""

    def __init__(self, driver: CudaDriver, gpu: Gpu) -> None:
        self.gpu = gpu
        self._call = driver.call
        self._device = _int()
        self._call("cuDeviceGet", ctypes.byref(self._device), gpu.index)
        self._context = _handle()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)
        self.make_current()

    def make_current(self) -> None:
        """Have what this thread asks of the driver next be about this GPU."""
        self._call("cuCtxSetCurrent", self._context)

    def allocate(self, nbytes: int) -> int:
        """Memory of the GPU."""
        address = _pointer()
        self._call("cuMemAlloc_v2", ctypes.byref(address), nbytes)
        return address.value

    def free(self, address: int) -> None:
        """Give that back."""
        self._call("cuMemFree_v2", address)

    def allocate_pinned(self, nbytes: int) -> Pinned:
        """Memory of the host for copies."""
        address = _handle()
        self._call("cuMemHostAlloc", ctypes.byref(address), nbytes, 0)
        memory = (ctypes.c_uint8 * nbytes).from_address(address.value or 0)
        return Pinned(address.value or 0, np.ctypeslib.as_array(memory))

    def free_pinned(self, pinned: Pinned) -> None:
        """Give that back; its bytes must not be touched any more."""
        self._call("cuMemFreeHost", pinned.address)

    def copy_in(self, address: int, pinned: Pinned, nbytes: int, stream: int) -> None:
        """Have the stream copy to the GPU."""
        self._call("cuMemcpyHtoDAsync_v2", address, pinned.address, nbytes, stream)

    def copy_out(self, pinned: Pinned, address: int, nbytes: int, stream: int) -> None:
        """Have the stream copy from the GPU."""
        self._call("cuMemcpyDtoHAsync_v2", pinned.address, address, nbytes, stream)

    def make_stream(self) -> int:
        """A stream that does not wait for the default one."""
        stream = _handle()
        self._call("cuStreamCreate", ctypes.byref(stream), _NON_BLOCKING_STREAM)
        return stream.value or 0

    def end_stream(self, stream: int) -> None:
        """Let go of it."""
        self._call("cuStreamDestroy_v2", stream)

    def wait(self, stream: int) -> None:
        """Until everything is done that the stream was given."""
        self._call("cuStreamSynchronize", stream)

    def begin_capture(self, stream: int) -> None:
        """From now on the stream does nothing and remembers what it is given."""
        self._call("cuStreamBeginCapture_v2", stream, _CAPTURE_OF_THIS_THREAD)

    def end_capture(self, stream: int) -> int:
        """What it was given since, as a graph that can be launched."""
        graph, executable = _handle(), _handle()
        self._call("cuStreamEndCapture", stream, ctypes.byref(graph))
        try:
            self._call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, 0)
        finally:
            self._call("cuGraphDestroy", graph)
        return executable.value or 0

    def launch(self, graph: int, stream: int) -> None:
        """Have the stream do all of it."""
        self._call("cuGraphLaunch", graph, stream)

    def end_graph(self, graph: int) -> None:
        """Let go of a graph."""
        self._call("cuGraphExecDestroy", graph)

    def memory(self) -> tuple[int, int]:
        """Free and total bytes."""
        free, total = _size(), _size()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def close(self) -> None:
        """Let go of the GPU."""
        self._call("cuDevicePrimaryCtxRelease_v2", self._device)


def context_is_well(library: str = LIBRARY) -> bool | None:
    """Whether the GPU that this thread uses, by whatever library, still does what it is asked; None: nobody can tell.

    It waits for what the GPU was given. Without a driver there is no GPU that could be lost.
    """
    try:
        status = ctypes.CDLL(library).cuCtxSynchronize()  # which is loaded, where CUDA is in use
    except OSError:
        return True
    except AttributeError:
        return None
    if status in _LOST or status == _UNKNOWN:
        return False
    return True if status == 0 else None  # the others: there is no context on this thread


def hardware(gpus: Sequence[Gpu]) -> str:
    """For messages: as ``gpu:0 NVIDIA H200 (9.0, 139 GiB)``."""
    return ", ".join(
        f"gpu:{gpu.index} {gpu.name} ({gpu.capability[0]}.{gpu.capability[1]}, {gpu.total_bytes / 2**30:.0f} GiB)"
        for gpu in gpus
    )

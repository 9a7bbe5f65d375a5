"""The process that holds clients' GPU memory, and copies from and to it: one thing at a time, as it is asked."""

import contextlib
import ctypes
import os
import socket
from collections.abc import Callable, Sequence

from headrace.core.errors import Kind
from headrace.cuda_memory import frames
from headrace.workers import channel
from headrace.workers.arena import Segment
from headrace.workers.spawned import come_up
from headrace_backends.base import BackendUnavailable, DeviceLost, LoadError
from headrace_backends.tensorrt.cuda import CudaDriver, CudaError
from headrace_backends.tensorrt.cuda_lent import LentMemory, TooShort


class Copier:
    """The regions that are open, and the GPUs that they are on. The driver is loaded for the first of them."""

    def __init__(self, load_driver: Callable[[], CudaDriver] = CudaDriver) -> None:
        self._load_driver = load_driver
        self._driver: CudaDriver | None = None
        self._gpus: dict[int, LentMemory] = {}
        self._regions: dict[int, tuple[LentMemory, int]] = {}  # where each begins

    def do(self, frame: frames.ToCopier, descriptors: Sequence[int]) -> frames.Answer:
        """Do what is asked. The descriptors stay the caller's.

        Raises:
            DeviceLost: this process can be asked nothing more.
        """
        try:
            match frame:
                case frames.Open():
                    gpu = self._gpu(frame.device)
                    self._regions[frame.region] = (gpu, gpu.open(frame.handle, frame.nbytes))
                case frames.Close():
                    self._close(frame.region)
                case _:
                    self._copy(frame, descriptors)
        except BackendUnavailable as error:
            return frames.Answer(Kind.UNSUPPORTED.value, str(error))
        except (LoadError, TooShort, CudaError) as error:
            return frames.Answer(Kind.INVALID.value, str(error))
        except (MemoryError, OSError) as error:  # of the GPU, and of the host
            return frames.Answer(Kind.OVERLOADED.value, str(error))
        return frames.Answer()

    def _gpu(self, index: int) -> LentMemory:
        if self._driver is None:
            self._driver = self._load_driver()
        if index not in self._gpus:
            self._gpus[index] = LentMemory(self._driver, self._driver.open(index))
        return self._gpus[index]

    def _close(self, region: int) -> None:
        gpu, address = self._regions.pop(region, (None, 0))
        if gpu is not None:
            gpu.close(address)

    def _copy(self, frame: frames.Read | frames.Write, descriptors: Sequence[int]) -> None:
        gpu, address = self._regions[frame.region]
        if not descriptors:  # the kernel drops one that this process has no room for
            raise OSError("the process that copies is out of file descriptors")
        segment = Segment(descriptors[0], frame.nbytes)
        host_address = ctypes.addressof(ctypes.c_char.from_buffer(segment.view))
        if isinstance(frame, frames.Read):
            gpu.read(address + frame.offset, host_address, frame.nbytes)
        else:
            gpu.write(address + frame.offset, host_address, frame.nbytes)


def serve(sock: socket.socket, copier: Copier) -> None:
    """Do what is asked over the socket until nobody asks any more."""
    while True:
        data, descriptors = channel.receive(sock)
        if not data:
            return
        try:
            answer = copier.do(frames.decode_to_copier(data), descriptors)
        except DeviceLost as error:
            channel.send_blocking(sock, frames.encode(frames.Answer(Kind.NOT_READY.value, str(error))))
            raise
        finally:
            channel.close_all(descriptors)
        channel.send_blocking(sock, frames.encode(answer))


def main() -> None:
    """Entry point: ``python -m headrace.cuda_memory.copier DESCRIPTOR NAME LOG_FORMAT``."""
    sock = come_up()
    try:
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):  # the front process is gone
            serve(sock, Copier())
    except DeviceLost:
        os._exit(1)  # letting go of what is lost would fail, and the kernel does so all the same


if __name__ == "__main__":
    main()

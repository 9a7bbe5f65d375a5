"""A client's own memory on the GPU, which it lends to a server for its tensors."""

import base64
import ctypes
import json
from http.client import HTTPConnection
from types import TracebackType
from typing import Any, Self

import numpy as np

from headrace_backends.tensorrt.cuda import CudaDriver, IpcHandle


class Lent:
    """Memory of the first GPU that this process allocates; a context manager that frees it."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._driver = CudaDriver()

    def __enter__(self) -> Self:
        self._device = self._driver.open(0)
        self._stream = self._device.make_stream()
        self._address = self._device.allocate(self.nbytes)
        self._host = self._device.allocate_pinned(self.nbytes)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._device.free_pinned(self._host)
        self._device.free(self._address)
        self._device.end_stream(self._stream)
        self._device.close()

    @property
    def handle(self) -> bytes:
        """What another process opens it by."""
        found = IpcHandle()
        self._driver.call("cuIpcGetMemHandle", ctypes.byref(found), self._address)
        return bytes(memoryview(found).cast("B"))

    def write(self, data: bytes) -> None:
        """Put data at its beginning, and zeros behind."""
        self._host.data[:] = np.frombuffer(data.ljust(self.nbytes, b"\0"), np.uint8)
        self._device.copy_in(self._address, self._host, self.nbytes, self._stream)
        self._device.wait(self._stream)

    def read(self) -> bytes:
        """All of it."""
        self._device.copy_out(self._host, self._address, self.nbytes, self._stream)
        self._device.wait(self._stream)
        found: bytes = self._host.data.tobytes()
        return found


def register(to: HTTPConnection, region: str, handle: bytes, nbytes: int, device: int = 0) -> tuple[int, Any]:
    """Lend memory to a server; status and answer."""
    body = {"raw_handle": {"b64": base64.b64encode(handle).decode()}, "device_id": device, "byte_size": nbytes}
    return post(to, f"/v2/cudasharedmemory/region/{region}/register", body)


def post(to: HTTPConnection, path: str, body: object) -> tuple[int, Any]:
    """One request with JSON; status and answer."""
    to.request("POST", path, json.dumps(body))
    response = to.getresponse()
    answer = response.read()
    return response.status, json.loads(answer) if answer else None


def place(region: str, nbytes: int, offset: int = 0) -> dict[str, object]:
    """The parameters of a tensor that lies there."""
    return {"shared_memory_region": region, "shared_memory_byte_size": nbytes, "shared_memory_offset": offset}

"""The CUDA shared memory that clients registered: named pieces of the memory of GPUs, which the copier holds."""

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from headrace.core.device import IPC_HANDLE_BYTES
from headrace.core.errors import HeadraceError, InvalidRequest, NotFound, Overloaded, Unsupported, at
from headrace.core.request import Place
from headrace.core.tensor import Buffer
from headrace.cuda_memory import frames
from headrace.cuda_memory.process import CopierProcess
from headrace.shared_memory import MAX_REGIONS, check_name, check_room, check_within
from headrace.workers.arena import Segment

log = logging.getLogger(__name__)

MAX_BYTES = 1 << 62
DRIVER_NODE = Path("/dev/nvidiactl")  # there where NVIDIA's driver is, also in a container
LARGE_BYTES = 4 * 1024 * 1024  # copied beside the event loop from here on


@dataclass(frozen=True, slots=True)
class CudaRegion:
    """``byte_size`` bytes of the memory of a GPU, by CUDA's number, under the name that a client gave them."""

    name: str
    device_id: int
    byte_size: int


@dataclass(frozen=True, slots=True)
class _Held:
    """A region, and the number that the copier knows it by."""

    region: CudaRegion
    number: int


class CudaRegions:
    """The registered regions. Used on the event loop only.

    ``taken`` tells whether a name is another kind of region's. Without ``allowed`` there is nothing to be had. When
    the copier ends, for instance because a GPU is lost to it, all regions are gone, and can be registered again.
    """

    def __init__(self, allowed: bool, log_format: str = "text", taken: Callable[[str], bool] = lambda _: False) -> None:
        self.copier = CopierProcess(log_format, self._on_end)
        self._allowed = allowed
        self._taken = taken
        self._held: dict[str, _Held] = {}
        self._opening: set[str] = set()
        self._gone: dict[str, str] = {}  # why, of those that went with a copier
        self._number = 0

    def __contains__(self, name: str) -> bool:
        """Whether a region of that name is or was here."""
        return name in self._held or name in self._gone

    def holds(self, name: str) -> bool:
        """Whether the name is taken."""
        return name in self._held or name in self._opening

    async def register(self, name: str, handle: bytes, device_id: int, byte_size: int) -> None:
        """Open the memory of a GPU by the handle of the process that allocated it, and call it ``name``.

        Raises:
            InvalidRequest: the name is taken, or the driver finds no such memory.
            Unsupported: it is not allowed, or there is no GPU to have it on.
            NotReady: the GPU is lost, or the driver does not answer.
            Overloaded: there are too many regions, or there is no memory.
        """
        if not self._allowed:
            raise Unsupported("shared memory is not enabled on this server; start it with --allow-client-shm")
        check_name(name)
        if self.holds(name) or self._taken(name):
            raise InvalidRequest(f"shared memory region '{name}' already in manager; unregister it first")
        if len(self._held) + len(self._opening) >= MAX_REGIONS:
            raise Overloaded(f"shared memory region '{name}': {MAX_REGIONS} regions are registered, which is the most")
        refused = f"cannot register shared memory region '{name}'"
        if len(handle) != IPC_HANDLE_BYTES:
            raise InvalidRequest(f"{refused}: raw_handle has {len(handle)} bytes, expected {IPC_HANDLE_BYTES}")
        if not 0 <= device_id < 1 << 31 or not 0 < byte_size <= MAX_BYTES:
            raise InvalidRequest(
                f"{refused}: device_id is {device_id} and byte_size {byte_size}, expected the number of a GPU and a "
                "size of at least 1"
            )
        self._number += 1
        held = _Held(CudaRegion(name, device_id, byte_size), self._number)
        self._opening.add(name)
        try:
            await self._ask(refused, frames.Open(held.number, device_id, handle, byte_size))
        except asyncio.CancelledError:
            await self._close(held)
            raise
        finally:
            self._opening.discard(name)
        self._gone.pop(name, None)
        self._held[name] = held

    async def unregister(self, name: str = "") -> None:
        """Forget the region of that name, or all of them for the empty one, and return when their owners may free them.

        It is no error if there is none.
        """
        for one in [name] if name else list(self._held):
            self._gone.pop(one, None)
            held = self._held.pop(one, None)
            if held is not None:
                await self._close(held)

    def status(self, name: str = "") -> list[CudaRegion]:
        """The region of that name, or all of them for the empty one.

        Raises:
            NotFound: there is no such region.
        """
        if name:
            return [self._find(name).region]
        return [held.region for held in self._held.values()]

    def check(self, region: str, offset: int, byte_size: int) -> None:
        """As ``core.regions.Regions`` has it."""
        check_within(region, self._find(region).region.byte_size, offset, byte_size)

    async def read(self, place: Place) -> Buffer:
        """A copy of the bytes at a place.

        Raises:
            HeadraceError: they cannot be had; naming the region.
        """
        self.check(place.region, place.offset, place.byte_size)
        if not place.byte_size:
            return b""
        held = self._find(place.region)
        try:
            segment, descriptor = Segment.create(place.byte_size)
        except OSError as error:
            raise _no_memory(place.region, error) from error
        frame = frames.Read(held.number, place.offset, place.byte_size)
        await self._ask(f"shared memory region '{place.region}' cannot be read", frame, descriptor)
        return segment.view.toreadonly()

    async def write(self, place: Place, data: Buffer) -> None:
        """Put ``data`` at the start of a place; it must stay unchanged meanwhile.

        Raises:
            HeadraceError: it cannot be put there; naming the region.
        """
        self.check(place.region, place.offset, place.byte_size)
        check_room(place.region, len(data), place.byte_size)
        if not len(data):
            return
        try:
            if len(data) < LARGE_BYTES:
                descriptor = _memory_with(data)
            else:
                descriptor = await asyncio.to_thread(_memory_with, data)
        except OSError as error:
            raise _no_memory(place.region, error) from error
        try:
            held = self._find(place.region)
            check_within(place.region, held.region.byte_size, place.offset, len(data))  # it may be another one by now
        except BaseException:
            os.close(descriptor)
            raise
        frame = frames.Write(held.number, place.offset, len(data))
        await self._ask(f"shared memory region '{place.region}' cannot be written", frame, descriptor)

    def sweep(self) -> None:
        """End the copier where it holds nothing: a process that uses CUDA has hundreds of MiB of each GPU."""
        if not (self._held or self._opening or self.copier.busy):
            self.copier.end()

    async def close(self) -> None:
        """End the copier."""
        self._held.clear()
        await self.copier.close()

    async def _close(self, held: _Held) -> None:
        try:
            await self.copier.ask(frames.Close(held.number))
        except HeadraceError as error:  # it is forgotten all the same
            log.warning("CUDA shared memory region %s could not be closed: %s", held.region.name, error)

    async def _ask(self, failed: str, frame: frames.ToCopier, descriptor: int = -1) -> None:
        try:
            await self.copier.ask(frame, descriptor)
        except HeadraceError as error:
            raise at(failed, error) from None

    def _find(self, name: str) -> _Held:
        held = self._held.get(name)
        if held is None:
            why = self._gone.get(name)
            state = f"is gone, because the process that held it ended: {why}" if why else "is not registered"
            raise NotFound(f"Unable to find cuda shared memory region: '{name}' {state}")
        return held

    def _on_end(self, cause: str) -> None:
        self._gone = dict.fromkeys(self._held, cause)
        self._held.clear()


def _memory_with(data: Buffer) -> int:
    """A descriptor of memory that has the data."""
    descriptor = os.memfd_create("headrace", os.MFD_CLOEXEC)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _no_memory(region: str, error: OSError) -> Overloaded:
    return Overloaded(f"shared memory region '{region}': there is no memory to copy through: {error}")

"""The system shared memory that clients registered: named parts of the objects below /dev/shm.

An object belongs to its client, who may shorten it at any time, and a mapping of it would then kill this process with
SIGBUS at the next touch. So nothing is mapped: bytes are read and written through the descriptor, which only fails.
"""

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from headrace.core.errors import InvalidRequest, NotFound, Overloaded, Unsupported
from headrace.core.tensor import Buffer

MAX_REGIONS = 4096  # each holds a descriptor
MAX_NAME_CHARACTERS = 1024
FOLDER = Path("/dev/shm")  # noqa: S108 - where shm_open has its objects; the clients choose their names

# O_NONBLOCK: opening what turns out to be a pipe or a file under a lease must not wait.
_FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY


@dataclass(frozen=True, slots=True)
class Region:
    """``byte_size`` bytes from ``offset`` on of the object ``key``, under the name that a client gave them."""

    name: str
    key: str
    offset: int
    byte_size: int


@dataclass(frozen=True, slots=True)
class _Held:
    """A region and the open descriptor of its object, which keeps the memory even when the object is unlinked."""

    region: Region
    descriptor: int


class SharedMemoryRegions:
    """The registered regions. Used on the event loop only: a descriptor is closed when nothing is reading it.

    A region whose object was unlinked is dropped when that is noticed, at its next use or by ``sweep``: its owner
    is done with it or dead, and the memory is freed only when the last descriptor is closed. Without ``allowed``
    every method but ``sweep`` raises Unsupported. ``taken`` tells whether a name is another kind of region's.
    """

    def __init__(self, allowed: bool, folder: Path = FOLDER, taken: Callable[[str], bool] = lambda _: False) -> None:
        self._allowed = allowed
        self._folder = folder
        self._taken = taken
        self._held: dict[str, _Held] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._held

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Open the object ``key`` and call a part of it ``name``.

        Raises:
            InvalidRequest: the name is taken, the key is no object's, or the part is not within the object.
            Overloaded: there are too many regions.
        """
        self._check_allowed()
        check_name(name)
        self._drop_if_gone(name)
        if name in self._held or self._taken(name):
            raise InvalidRequest(f"shared memory region '{name}' already in manager; unregister it first")
        if len(self._held) >= MAX_REGIONS:
            self.sweep()
        if len(self._held) >= MAX_REGIONS:
            raise Overloaded(f"shared memory region '{name}': {MAX_REGIONS} regions are registered, which is the most")
        region = Region(name, key, offset, byte_size)
        self._held[name] = _Held(region, _open(self._folder, region))

    def unregister(self, name: str = "") -> None:
        """Forget the region of that name, or all of them for the empty one.

        It is no error if there is none, as in Triton.
        """
        self._check_allowed()
        for one in [name] if name else list(self._held):
            if one in self._held:
                self._drop(one)

    def status(self, name: str = "") -> list[Region]:
        """The region of that name, or all of them for the empty one.

        Raises:
            NotFound: there is no such region.
        """
        self._check_allowed()
        if name:
            return [self._find(name)[0].region]
        self.sweep()
        return [held.region for held in self._held.values()]

    def sweep(self) -> list[str]:
        """Drop every region whose object was unlinked; their names."""
        return [name for name in list(self._held) if self._drop_if_gone(name)]

    def check(self, region: str, offset: int, byte_size: int) -> None:
        """As ``core.regions.Regions`` has it."""
        held, object_bytes = self._find(region)
        _locate(held.region, object_bytes, offset, byte_size)

    def read(self, region: str, offset: int, byte_size: int) -> bytes:
        """As ``core.regions.Regions`` has it. The caller bounds ``byte_size``: an object may be larger than memory."""
        held, object_bytes = self._find(region)
        position = _locate(held.region, object_bytes, offset, byte_size)
        try:
            data = os.pread(held.descriptor, byte_size, position)
        except OSError as error:
            raise _failed(held.region, "read", error) from error
        if len(data) != byte_size:  # it was shortened between the look at its size and the reading
            raise _shortened(held.region, position + len(data))
        return data

    def write(self, region: str, offset: int, byte_size: int, data: Buffer) -> None:
        """As ``core.regions.Regions`` has it. An object is never made longer."""
        held, object_bytes = self._find(region)
        position = _locate(held.region, object_bytes, offset, byte_size)
        check_room(region, len(data), byte_size)
        rest = memoryview(data)
        try:
            while rest:
                written_bytes = os.pwrite(held.descriptor, rest, position)
                rest = rest[written_bytes:]
                position += written_bytes
        except OSError as error:
            raise _failed(held.region, "written", error) from error

    def _check_allowed(self) -> None:
        if not self._allowed:
            raise Unsupported("shared memory is not enabled on this server; start it with --allow-client-shm")

    def _find(self, name: str) -> tuple[_Held, int]:
        """A region that is there, and how many bytes its object has now."""
        self._check_allowed()
        held = self._held.get(name)
        if held is None:
            raise NotFound(f"Unable to find shared memory region: '{name}' is not registered")
        state = os.fstat(held.descriptor)
        if not state.st_nlink:
            self._drop(name)
            raise NotFound(
                f"Unable to find shared memory region: '{name}' is gone, because its object '{held.region.key}' "
                "was unlinked"
            )
        return held, state.st_size

    def _drop_if_gone(self, name: str) -> bool:
        held = self._held.get(name)
        gone = held is not None and not os.fstat(held.descriptor).st_nlink
        if gone:
            self._drop(name)
        return gone

    def _drop(self, name: str) -> None:
        os.close(self._held.pop(name).descriptor)


def check_name(name: str) -> None:
    """See that a region can be called so.

    Raises:
        InvalidRequest: it cannot.
    """
    if not 0 < len(name) <= MAX_NAME_CHARACTERS:
        raise InvalidRequest(
            f"a shared memory region's name has {len(name)} characters, expected 1 to {MAX_NAME_CHARACTERS}"
        )


def check_within(region: str, region_bytes: int, offset: int, byte_size: int) -> None:
    """See that the bytes that a tensor names lie in a region of so many.

    Raises:
        InvalidRequest: they do not.
    """
    if offset < 0 or byte_size < 0 or offset + byte_size > region_bytes:
        raise InvalidRequest(
            f"shared memory region '{region}' has {region_bytes} bytes, which shared_memory_offset {offset} "
            f"and shared_memory_byte_size {byte_size} do not lie within"
        )


def check_room(region: str, data_bytes: int, byte_size: int) -> None:
    """See that an output fits its place.

    Raises:
        InvalidRequest: it does not.
    """
    if data_bytes > byte_size:
        raise InvalidRequest(
            f"shared memory region '{region}' has too little room: {data_bytes} bytes are needed, and "
            f"shared_memory_byte_size gives {byte_size}"
        )


def _open(folder: Path, region: Region) -> int:
    """A descriptor of the region's object, which is a regular file that has the region's bytes."""
    name = region.key.removeprefix("/")
    if not name or name in {".", ".."} or "/" in name or "\0" in name:
        raise _refused(region, f"the key {region.key[:80]!r} is no object's, expected '/NAME' or 'NAME'")
    try:
        descriptor = os.open(os.fsencode(folder) + b"/" + name.encode(), _FLAGS)
    except OSError as error:
        if error.errno in {errno.EMFILE, errno.ENFILE}:
            raise Overloaded(
                f"cannot register shared memory region '{region.name}': the server has no descriptors left"
            ) from error
        raise _refused(region, f"cannot open the object '{region.key[:80]}': {error.strerror}") from error
    try:
        _check_object(region, os.fstat(descriptor))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _check_object(region: Region, state: os.stat_result) -> None:
    if not stat.S_ISREG(state.st_mode):
        raise _refused(region, f"'{region.key}' is no shared memory object")
    if region.offset < 0 or region.byte_size < 1:
        raise _refused(
            region,
            f"offset {region.offset} and byte_size {region.byte_size}, expected an offset of at least 0 and a size of "
            "at least 1",
        )
    if region.offset + region.byte_size > state.st_size:
        raise _refused(
            region,
            f"offset {region.offset} and byte_size {region.byte_size} reach beyond the object '{region.key}', "
            f"which has {state.st_size} bytes",
        )


def _locate(region: Region, object_bytes: int, offset: int, byte_size: int) -> int:
    """Where in the object the bytes begin that a tensor names by their place in the region."""
    check_within(region.name, region.byte_size, offset, byte_size)
    position = region.offset + offset
    if position + byte_size > object_bytes:
        raise _shortened(region, object_bytes)
    return position


def _shortened(region: Region, object_bytes: int) -> InvalidRequest:
    return InvalidRequest(
        f"shared memory region '{region.name}': its object '{region.key}' was shortened to {object_bytes} bytes, "
        f"expected at least {region.offset + region.byte_size}"
    )


def _failed(region: Region, done: str, error: OSError) -> InvalidRequest:
    return InvalidRequest(
        f"shared memory region '{region.name}': its object '{region.key}' cannot be {done}: {error.strerror}"
    )


def _refused(region: Region, problem: str) -> InvalidRequest:
    return InvalidRequest(f"cannot register shared memory region '{region.name}': {problem}")

"""Answers kept by what was asked: the key of a request, and a bounded cache of responses in this process."""

from collections import OrderedDict
from collections.abc import Awaitable, Sequence
from hashlib import blake2b
from typing import Protocol

from headrace.core.request import Parameters, RequestedOutput
from headrace.core.statistics import CacheUsage
from headrace.core.tensor import Tensor

Outputs = tuple[Tensor, ...]

OWNER_BYTES = 8  # at the beginning of a key: whose answer it is
DIGEST_BYTES = 16

# What an entry takes beside its data, rounded up: its key in two indexes, and the objects of each tensor.
ENTRY_OVERHEAD_BYTES = 512
TENSOR_OVERHEAD_BYTES = 320

# These are the server's business and change no answer.
_NOT_THE_MODELS = frozenset({"timeout", "priority", "binary_data_output"})


class Cache(Protocol):
    """What the engine asks of a cache, whether it is memory or somewhere on a network.

    ``get`` gives the answer itself where it is at hand, so that nobody awaits what is there already::

        found = cache.get(key)
        if found is not None and not isinstance(found, tuple):
            found = await found

    None of the methods raises for trouble with the store: what cannot be read is a miss.
    """

    def get(self, key: bytes) -> Outputs | Awaitable[Outputs | None] | None:
        """The outputs that were put under ``key``, if they are still there."""

    def put(self, key: bytes, outputs: Outputs) -> None:
        """Keep ``outputs`` under ``key``, as far as there is room. Returns at once."""

    def forget(self, model: str, version: str) -> None:
        """The version is served no more, so nobody will ask for its answers."""

    @property
    def usage(self) -> CacheUsage | None:
        """What it holds; None where this process does not hold it."""

    async def close(self) -> None:
        """Let go of connections. Nothing may be asked afterwards."""


def cache_key(
    model: str,
    version: str,
    inputs: Sequence[Tensor | None],
    outputs: Sequence[RequestedOutput],
    parameters: Parameters | None = None,
) -> bytes:
    """What tells requests with different answers apart.

    ``version`` must change with the model's files and configuration, as a served version's print does; a number is
    not enough. ``inputs`` are in the signature's order, as they were checked, None for one left out. Every part is
    hashed with its length before it, so no two requests have the same bytes to hash. The digest is a cryptographic
    one because inputs are strangers': nobody can make two that are taken for each other.
    """
    digest = blake2b(digest_size=DIGEST_BYTES)
    digest.update(_parts(_text(model), _text(version)) + _number(len(inputs)))
    for tensor in inputs:
        if tensor is None:
            digest.update(b"-")
            continue
        shape = b"".join(map(_number, tensor.shape))
        digest.update(b"+" + _parts(_text(tensor.name), _text(tensor.datatype), shape) + _number(len(tensor.data)))
        digest.update(tensor.data)
    digest.update(_number(len(outputs)))
    for output in outputs:
        digest.update(_parts(_text(output.name), _value(output.parameters.get("classification"))))
    for name, value in sorted((parameters or {}).items()):
        if name not in _NOT_THE_MODELS:
            digest.update(_parts(_text(name), _value(value)))
    return owner(model, version) + digest.digest()


def owner(model: str, version: str) -> bytes:
    """What the keys of one version begin with."""
    return blake2b(_parts(_text(model), _text(version)), digest_size=OWNER_BYTES).digest()


def _parts(*parts: bytes) -> bytes:
    return b"".join([_number(len(part)) + part for part in parts])


def _number(number: int) -> bytes:
    return number.to_bytes(8, "little")


def _text(text: str) -> bytes:
    return text.encode(errors="surrogatepass")  # a folder's name need not be UTF-8


def _value(value: object) -> bytes:
    """A parameter's value with its type: 1, 1.0, True and "1" may mean different things to a model."""
    return _text(f"{type(value).__name__} {value!r}")


class ResponseCache:
    """Responses in memory, up to ``max_bytes``; those that were not asked for longest make room.

    Plain data, for one thread. The bytes of what is put belong to the cache afterwards and never change.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[bytes, tuple[Outputs, int]] = OrderedDict()  # with the bytes of each; oldest first
        self._owned: dict[bytes, set[bytes]] = {}  # keys, by owner
        self._bytes = 0
        self._evictions = 0

    @property
    def usage(self) -> CacheUsage:
        """What it holds."""
        return CacheUsage(self._bytes, len(self._entries), self._evictions)

    def get(self, key: bytes) -> Outputs | None:
        """The outputs that were put under ``key``, if they are still there."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry[0]

    def put(self, key: bytes, outputs: Outputs) -> None:
        """Keep ``outputs`` under ``key``; a response that is larger than the whole cache is not kept."""
        size = entry_bytes(outputs)
        if size > self._max_bytes:
            return
        if key in self._entries:
            self._remove(key)
        while self._bytes + size > self._max_bytes:
            self._remove(next(iter(self._entries)))
            self._evictions += 1
        self._entries[key] = (tuple(map(_kept, outputs)), size)
        self._owned.setdefault(key[:OWNER_BYTES], set()).add(key)
        self._bytes += size

    def forget(self, model: str, version: str) -> None:
        """Drop every answer of this version."""
        for key in list(self._owned.get(owner(model, version), ())):
            self._remove(key)

    async def close(self) -> None:
        """Nothing is held but memory."""

    def _remove(self, key: bytes) -> None:
        _, size = self._entries.pop(key)
        self._bytes -= size
        owned = self._owned[key[:OWNER_BYTES]]
        owned.remove(key)
        if not owned:
            del self._owned[key[:OWNER_BYTES]]


def entry_bytes(outputs: Outputs) -> int:
    """The memory that an entry takes, with everything around its data."""
    return ENTRY_OVERHEAD_BYTES + sum(
        TENSOR_OVERHEAD_BYTES + len(tensor.data) + len(tensor.name) + 40 * len(tensor.shape) for tensor in outputs
    )


def _kept(tensor: Tensor) -> Tensor:
    """The tensor with bytes of its own, unless nobody can change those that it has."""
    if isinstance(tensor.data, bytes):
        return tensor
    return Tensor(tensor.name, tensor.datatype, tensor.shape, bytes(tensor.data))

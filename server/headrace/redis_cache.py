"""Responses kept in Redis, where several servers share them and a restart does not lose them."""

import asyncio
import importlib
import logging
from collections.abc import Callable
from time import monotonic
from typing import Any

import msgspec

from headrace.core.statistics import CacheUsage
from headrace.core.tensor import DataType, Tensor
from headrace.response_cache import Outputs

log = logging.getLogger(__name__)

PATIENCE_S = 0.05  # for one answer of Redis: a model that is slower than this is worth caching at all
PAUSE_S = 1.0  # after trouble: until then every lookup is a miss at once, else each would wait its time
LOG_INTERVAL_S = 60.0
CONNECTIONS = 16
MAX_WRITES = 64  # under way at a time; more are not kept
_KEY_PREFIX = b"headrace:1:"  # the number is that of the form of values


class RedisMissing(Exception):
    """The package for Redis is not installed; the message says how to get it."""


class _Stored(msgspec.Struct, array_like=True):
    """One tensor as it lies in Redis."""

    name: str
    datatype: DataType
    shape: tuple[int, ...]
    data: bytes


_DECODER = msgspec.msgpack.Decoder(list[_Stored])
_ENCODER = msgspec.msgpack.Encoder()


class RedisCache:
    """A ``Cache`` over one Redis. It never raises: a Redis that is down or slow is a miss within 50 ms.

    Entries live for ``ttl_s``; keys hold the version's print, so those of a version that has changed are never asked
    for again and end by themselves. How much Redis holds is Redis's own setting (maxmemory).
    """

    usage: CacheUsage | None = None  # nothing of it is in this process

    def __init__(
        self,
        url: str,
        *,
        ttl_s: int = 3600,
        max_entry_bytes: int = 8 * 1024 * 1024,
        patience_s: float = PATIENCE_S,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        """Connects with the first lookup.

        Raises:
            RedisMissing: the package is not installed.
            ValueError: ``url`` is none of Redis.
        """
        redis = _package()
        try:
            self._pool = redis.BlockingConnectionPool.from_url(
                url,
                max_connections=CONNECTIONS,
                timeout=patience_s,
                socket_timeout=patience_s,
                socket_connect_timeout=patience_s,
            )
        except ValueError as error:  # the URL is not told: it may hold a password
            raise ValueError(f"--cache-redis: {error}") from None
        self._redis = redis.Redis(connection_pool=self._pool)
        self._ttl_s = ttl_s
        self._max_entry_bytes = max_entry_bytes
        self._patience_s = patience_s
        self._clock = clock
        self._paused_until_s = -PAUSE_S
        self._logged_at_s = -LOG_INTERVAL_S
        self._writes: set[asyncio.Task[None]] = set()

    async def get(self, key: bytes) -> Outputs | None:
        """The outputs that were put under ``key``, if they are still there and come in time."""
        if self._clock() < self._paused_until_s:
            return None
        try:
            async with asyncio.timeout(self._patience_s):
                value = await self._redis.get(_KEY_PREFIX + key)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with a cache must not fail a request
            self._pause()
            self._complain(error)
            return None
        try:
            return None if value is None else decode(value)
        except msgspec.DecodeError as error:  # the answer that is computed now will take its place
            self._complain(error)
            return None

    def put(self, key: bytes, outputs: Outputs) -> None:
        """Keep ``outputs`` under ``key``, in the background. Too large a response is not kept, nor one too many."""
        size = sum(len(tensor.data) for tensor in outputs)
        if size > self._max_entry_bytes or len(self._writes) >= MAX_WRITES or self._clock() < self._paused_until_s:
            return
        write = asyncio.get_running_loop().create_task(self._write(_KEY_PREFIX + key, encode(outputs)))
        self._writes.add(write)
        write.add_done_callback(self._writes.discard)

    def forget(self, model: str, version: str) -> None:
        """Nothing: another server may serve the same files still, and entries end by themselves."""

    async def close(self) -> None:
        """Give up the writes under way and close every connection."""
        for write in self._writes:
            write.cancel()
        await asyncio.gather(*self._writes, return_exceptions=True)
        await self._redis.aclose()
        await self._pool.disconnect()

    async def _write(self, key: bytes, value: bytes) -> None:
        try:
            async with asyncio.timeout(self._patience_s):
                await self._redis.set(key, value, ex=self._ttl_s)
        except Exception as error:  # noqa: BLE001 - as for get
            self._pause()
            self._complain(error)

    def _pause(self) -> None:
        self._paused_until_s = self._clock() + PAUSE_S

    def _complain(self, error: Exception) -> None:
        """Say once a minute at most what is wrong."""
        now_s = self._clock()
        if now_s - self._logged_at_s >= LOG_INTERVAL_S:
            self._logged_at_s = now_s
            what = f"{type(error).__name__}: {error}"
            log.warning("the response cache in Redis gives no answers, requests are run instead: %s", what)


def encode(outputs: Outputs) -> bytes:
    """Outputs as they lie in Redis."""
    return _ENCODER.encode([(one.name, one.datatype, one.shape, one.data) for one in outputs])


def decode(value: bytes) -> Outputs:
    """What ``encode`` was given.

    Raises:
        msgspec.DecodeError: it was somebody else who wrote this.
    """
    return tuple(Tensor(one.name, one.datatype, one.shape, one.data) for one in _DECODER.decode(value))


def _package() -> Any:
    try:
        return importlib.import_module("redis.asyncio")
    except ImportError as error:
        raise RedisMissing(
            "the response cache in Redis needs a package that is not installed: pip install 'headrace[redis]'"
        ) from error

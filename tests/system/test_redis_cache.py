"""The response cache in Redis, over real sockets: it gives back what was put, and never is in the way."""

import asyncio
import contextlib
import logging
import socket
import threading
import time

import pytest

from headrace import redis_cache
from headrace.core.tensor import DataType, Tensor
from headrace.redis_cache import LOG_INTERVAL_S, PATIENCE_S, PAUSE_S, RedisCache
from headrace.response_cache import Cache, ResponseCache

KEY = b"k" * 24
BUSY_MACHINE_S = 10.0  # for what must come back; what is refused or slow has the ordinary patience


def answer(size):
    return (Tensor("y", DataType.UINT8, (size,), b"a" * size),)


@pytest.fixture
def redis_url():
    """The address of a Redis that lives as long as the test."""
    pytest.importorskip("redis", reason="redis is not installed")
    server_module = pytest.importorskip("fakeredis", reason="fakeredis, a Redis for tests, is not installed")
    server = server_module.TcpFakeServer(("127.0.0.1", 0), server_type="redis")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield f"redis://127.0.0.1:{server.server_address[1]}/0"
    server.shutdown()
    server.server_close()
    thread.join(5)


@pytest.fixture
def needs_redis():
    pytest.importorskip("redis", reason="redis is not installed")


@contextlib.asynccontextmanager
async def redis(url, patience_s=BUSY_MACHINE_S, **options):
    cache = RedisCache(url, patience_s=patience_s, **options)
    try:
        yield cache
    finally:
        await cache.close()


async def written(cache):
    """Wait for the writes under way."""
    await asyncio.gather(*cache._writes)


async def test_redis_gives_back_what_was_put(redis_url):
    async with redis(redis_url) as cache:
        assert await cache.get(KEY) is None
        cache.put(KEY, answer(4))
        await written(cache)
        assert await cache.get(KEY) == answer(4)
        assert await cache.get(bytes(24)) is None
    async with redis(redis_url) as another_server:
        assert await another_server.get(KEY) == answer(4)


async def test_entries_in_redis_end_and_do_not_meet_the_keys_of_others(redis_url):
    async with redis(redis_url, ttl_s=77) as cache:
        cache.put(KEY, answer(3))
        await written(cache)
        [stored] = await cache._redis.keys("*")
        assert stored.startswith(b"headrace:")
        assert 70 < await cache._redis.ttl(stored) <= 77


async def test_what_is_too_large_for_redis_is_not_kept(redis_url):
    async with redis(redis_url, max_entry_bytes=100) as cache:
        cache.put(b"a" * 24, answer(101))
        cache.put(b"b" * 24, answer(100))
        await written(cache)
        assert await cache.get(b"a" * 24) is None
        assert await cache.get(b"b" * 24) == answer(100)


async def test_what_somebody_else_wrote_is_a_miss_and_is_replaced(redis_url, caplog):
    async with redis(redis_url) as cache:
        for garbage in (b"", b"nonsense", b"\x91\x01", b'[["y","NO_TYPE",[1],"a"]]'):
            await cache._redis.set(b"headrace:1:" + KEY, garbage)
            assert await cache.get(KEY) is None
        cache.put(KEY, answer(4))
        await written(cache)
        assert await cache.get(KEY) == answer(4)
    assert len(warnings_in(caplog)) == 1


def warnings_in(caplog):
    return [one for one in caplog.records if one.name == redis_cache.log.name and one.levelno >= logging.WARNING]


class Clock:
    """Time that passes when it is told to."""

    def __init__(self):
        self.now_s = 1000.0

    def __call__(self):
        return self.now_s


@pytest.mark.usefixtures("needs_redis")
async def test_a_redis_that_is_down_is_a_miss_and_is_logged_once_a_minute(caplog):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        clock = Clock()
        async with redis(f"redis://127.0.0.1:{taken.getsockname()[1]}", PATIENCE_S, clock=clock) as cache:
            for _ in range(10):
                assert await cache.get(KEY) is None
                cache.put(KEY, answer(3))
                await written(cache)
                clock.now_s += PAUSE_S + 0.1
            assert len(warnings_in(caplog)) == 1
            clock.now_s += LOG_INTERVAL_S
            assert await cache.get(KEY) is None
            assert len(warnings_in(caplog)) == 2
            assert "Redis" in warnings_in(caplog)[0].getMessage()


@pytest.mark.usefixtures("needs_redis")
async def test_a_redis_that_says_nothing_is_a_miss_in_time_and_then_left_alone_for_a_moment():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        clock = Clock()
        async with redis(f"redis://127.0.0.1:{silent.getsockname()[1]}", PATIENCE_S, clock=clock) as cache:
            assert PATIENCE_S * 0.9 < await timed(cache.get(KEY)) < BUSY_MACHINE_S
            lookup = cache.get(KEY)
            with pytest.raises(StopIteration) as ended:
                lookup.send(None)  # it waits for nothing
            assert ended.value.value is None
            cache.put(KEY, answer(3))
            assert not cache._writes
            clock.now_s += PAUSE_S
            assert await timed(cache.get(KEY)) > PATIENCE_S * 0.9


async def timed(lookup):
    started_s = time.monotonic()
    assert await lookup is None
    return time.monotonic() - started_s


async def test_it_comes_back_with_redis(redis_url):
    clock = Clock()
    async with redis(redis_url, clock=clock) as cache:
        cache.put(KEY, answer(3))
        await written(cache)
        cache._pause()
        assert await cache.get(KEY) is None
        clock.now_s += PAUSE_S
        assert await cache.get(KEY) == answer(3)


async def test_a_client_that_leaves_during_a_lookup_breaks_no_other(redis_url):
    async with redis(redis_url) as cache:
        for number in range(20):
            cache.put(bytes([number]) * 24, answer(number))
        await written(cache)
        for number in range(20):
            lookup = asyncio.ensure_future(cache.get(bytes([number]) * 24))
            for _ in range(number % 5):
                await asyncio.sleep(0)
            lookup.cancel()
            await asyncio.gather(lookup, return_exceptions=True)
            assert await cache.get(bytes([number]) * 24) == answer(number)


@pytest.mark.usefixtures("needs_redis")
async def test_writes_under_way_are_bounded(monkeypatch):
    monkeypatch.setattr(redis_cache, "MAX_WRITES", 3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        async with redis(f"redis://127.0.0.1:{silent.getsockname()[1]}", PATIENCE_S) as cache:
            for number in range(10):
                cache.put(bytes([number]) * 24, answer(3))
            assert len(cache._writes) == 3


async def test_both_are_caches_and_only_one_has_to_be_awaited(redis_url):
    async with redis(redis_url) as remote:
        caches: list[Cache] = [ResponseCache(10_000), remote]
        for cache in caches:
            cache.put(KEY, answer(3))
            await asyncio.gather(*getattr(cache, "_writes", ()))
            found = cache.get(KEY)
            assert isinstance(found, tuple) == isinstance(cache, ResponseCache)
            if found is not None and not isinstance(found, tuple):
                found = await found
            assert found == answer(3)
            cache.forget("m", "1/a")
        assert [cache.usage is None for cache in caches] == [False, True]
        await caches[0].close()

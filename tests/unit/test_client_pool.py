"""The HTTP connections of a client: never two callers on one, never more than allowed, none kept for ever."""

import threading
from contextlib import ExitStack

import pytest

from headrace.client import http_pool
from headrace.client.http_pool import KEEP_IDLE_S, ConnectionPool


class Connection:
    """Knows whether it was closed."""

    def __init__(self):
        self.closed = False

    def close(self):
        assert not self.closed
        self.closed = True


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(http_pool, "monotonic", lambda: now[0])
    return now


def test_callers_share_none_and_the_last_used_comes_first():
    pool = ConnectionPool(Connection, 4)
    with pool.taken(None) as one, pool.taken(None) as other:
        assert one is not other
    with pool.taken(None) as again:
        assert again is one
    pool.close()
    assert one.closed
    assert other.closed


def test_no_more_than_allowed_are_in_use():
    pool = ConnectionPool(Connection, 2)
    with ExitStack() as held:
        held.enter_context(pool.taken(None))
        held.enter_context(pool.taken(None))
        with pytest.raises(TimeoutError, match="in use"), pool.taken(0.001):
            raise AssertionError
    with pool.taken(0.001):
        pass


def test_a_caller_that_fails_gives_its_place_back():
    pool = ConnectionPool(Connection, 1)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), pool.taken(0.001):
            _ = 1 / 0

    def fail():
        raise OSError

    broken = ConnectionPool(fail, 1)
    for _ in range(3):
        with pytest.raises(OSError), broken.taken(0.001):
            raise AssertionError


def test_a_waiting_thread_gets_the_connection_that_is_given_back():
    pool = ConnectionPool(Connection, 1)
    got = []

    def wait():
        with pool.taken(30) as connection:
            got.append(connection)

    with pool.taken(None) as first:
        thread = threading.Thread(target=wait)
        thread.start()
    thread.join()
    assert got == [first]


def test_connections_that_nobody_needs_any_more_are_closed(clock):
    pool = ConnectionPool(Connection, 4)
    with pool.taken(None) as busy, pool.taken(None) as spare:
        pass
    clock[0] += KEEP_IDLE_S - 1
    with pool.taken(None) as found:
        assert found is busy
    assert not spare.closed
    clock[0] += 2
    with pool.taken(None):
        pass
    assert spare.closed
    assert not busy.closed


def test_one_that_is_in_use_when_the_pool_closes_is_closed_when_it_is_given_back():
    pool = ConnectionPool(Connection, 1)
    with pool.taken(None) as connection:
        pool.close()
        assert not connection.closed
    assert connection.closed

"""The response cache: keys tell every two requests apart, and memory is bounded."""

import os
import sys
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.core.request import RequestedOutput
from headrace.core.tensor import DataType, Tensor
from headrace.redis_cache import RedisCache, RedisMissing, decode, encode
from headrace.response_cache import DIGEST_BYTES, OWNER_BYTES, ResponseCache, cache_key, entry_bytes


def tensor(name="x", datatype=DataType.INT32, shape=(1, 2), data=b"12345678"):
    return Tensor(name, datatype, shape, data)


def key(*inputs, model="m", version="1/a", outputs=(), parameters=None):
    return cache_key(model, version, inputs, outputs, parameters)


def answer(size, fill=b"a"):
    return (tensor("y", DataType.UINT8, (size,), fill * size),)


# -- keys


def test_requests_that_differ_in_anything_have_different_keys():
    x = tensor()
    keys = [
        key(x),
        key(x, model="n"),
        key(x, version="1/b"),
        key(tensor(name="z")),
        key(tensor(datatype=DataType.FP32)),
        key(tensor(shape=(2, 1))),
        key(tensor(shape=(2,))),
        key(tensor(shape=(2, 1, 1))),
        key(tensor(data=b"12345679")),
        key(x, x),
        key(x, None),
        key(None, x),
        key(),
        key(None),
        key(x, outputs=[RequestedOutput("y")]),
        key(x, outputs=[RequestedOutput("y"), RequestedOutput("z")]),
        key(x, outputs=[RequestedOutput("z"), RequestedOutput("y")]),
        key(x, outputs=[RequestedOutput("y", {"classification": 1})]),
        key(x, outputs=[RequestedOutput("y", {"classification": 2})]),
        key(x, parameters={"temperature": 1}),
        key(x, parameters={"temperature": 1.0}),
        key(x, parameters={"temperature": True}),
        key(x, parameters={"temperature": "1"}),
        key(x, parameters={"seed": 1}),
    ]
    assert len(set(keys)) == len(keys)
    assert {len(one) for one in keys} == {OWNER_BYTES + DIGEST_BYTES}


def test_parts_do_not_run_into_each_other():
    """The same bytes in the same order, cut at different places."""
    assert key(model="ab", version="c") != key(model="a", version="bc")
    one = key(tensor("ab", DataType.BYTES, (1,), b"c"), tensor("d", DataType.BYTES, (1,), b"e"))
    other = key(tensor("a", DataType.BYTES, (1,), b"bc"), tensor("d", DataType.BYTES, (1,), b"e"))
    assert one != other
    joined = key(tensor("x", DataType.UINT8, (4,), b"1234"), tensor("x", DataType.UINT8, (0,), b""))
    assert joined != key(tensor("x", DataType.UINT8, (2,), b"12"), tensor("x", DataType.UINT8, (2,), b"34"))
    assert key(outputs=[RequestedOutput("ab"), RequestedOutput("c")]) != key(
        outputs=[RequestedOutput("a"), RequestedOutput("bc")]
    )


TENSORS = st.builds(
    Tensor,
    st.sampled_from(["x", "xx", ""]),
    st.sampled_from([DataType.INT8, DataType.UINT8, DataType.BYTES]),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
    st.binary(max_size=4),
)
REQUESTS = st.tuples(
    st.sampled_from(["m", "mm"]),
    st.sampled_from(["1", "m1", ""]),
    st.lists(TENSORS | st.none(), max_size=3).map(tuple),
    st.lists(st.builds(RequestedOutput, st.sampled_from(["x", "y"])), max_size=2).map(tuple),
)


@given(REQUESTS, REQUESTS)
def test_keys_are_equal_exactly_where_requests_are(one, other):
    assert (cache_key(*one) == cache_key(*other)) == (one == other)


def test_what_changes_no_answer_changes_no_key():
    x = tensor()
    assert (
        key(x) == key(x, parameters={}) == key(x, parameters={"timeout": 5, "priority": 1, "binary_data_output": True})
    )
    assert key(x, outputs=[RequestedOutput("y")]) == key(x, outputs=[RequestedOutput("y", {"binary_data": True})])
    assert key(x, parameters={"a": 1, "b": 2}) == key(x, parameters={"b": 2, "a": 1})
    assert key(x) == key(tensor(data=memoryview(bytearray(x.data)))) == key(tensor(data=bytearray(x.data)))


def test_any_name_has_a_key():
    assert key(tensor(name="\udcff"), model="\udcff", parameters={"\udcff": "\udcff"}) != key()


# -- the cache in memory


def test_what_was_put_is_got_until_it_is_replaced():
    cache = ResponseCache(10_000)
    assert cache.get(b"k" * 24) is None
    cache.put(b"k" * 24, answer(10))
    assert cache.get(b"k" * 24) == answer(10)
    cache.put(b"k" * 24, answer(20))
    assert cache.get(b"k" * 24) == answer(20)
    assert cache.usage.entries == 1
    assert cache.usage.bytes == entry_bytes(answer(20))
    assert cache.usage.evictions == 0


def test_what_was_not_asked_for_longest_makes_room():
    size = entry_bytes(answer(1000))
    cache = ResponseCache(3 * size)
    for name in b"abc":
        cache.put(bytes([name]) * 24, answer(1000))
    cache.get(b"a" * 24)
    cache.put(b"d" * 24, answer(1000))
    assert [bool(cache.get(bytes([name]) * 24)) for name in b"abcd"] == [True, False, True, True]
    assert (cache.usage.entries, cache.usage.evictions, cache.usage.bytes) == (3, 1, 3 * size)


def test_what_is_larger_than_the_whole_cache_is_not_kept_and_costs_nobody_his_place():
    cache = ResponseCache(entry_bytes(answer(100)))
    cache.put(b"a" * 24, answer(100))
    cache.put(b"b" * 24, answer(101))
    assert cache.get(b"a" * 24)
    assert cache.get(b"b" * 24) is None
    nothing = ResponseCache(0)
    nothing.put(b"a" * 24, ())
    assert nothing.get(b"a" * 24) is None


def test_nobody_can_change_what_is_kept():
    data = bytearray(b"1234")
    cache = ResponseCache(10_000)
    cache.put(b"a" * 24, (tensor("y", DataType.UINT8, (4,), memoryview(data)),))
    data[:] = b"9999"
    [kept] = cache.get(b"a" * 24)
    assert kept.data == b"1234"
    assert isinstance(kept.data, bytes)


def test_a_version_that_is_served_no_more_is_forgotten():
    cache = ResponseCache(100_000)
    mine = [key(tensor(data=bytes([number]) * 8)) for number in range(5)]
    other = [key(tensor(), version="2/a"), key(tensor(), model="n")]
    for one in (*mine, *other):
        cache.put(one, answer(5))
    cache.forget("m", "1/a")
    assert [cache.get(one) for one in mine] == [None] * 5
    assert all(cache.get(one) for one in other)
    assert (cache.usage.entries, cache.usage.evictions) == (2, 0)
    cache.forget("m", "1/a")
    cache.forget("never", "served")
    assert cache.usage.bytes == 2 * entry_bytes(answer(5))


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["put", "get", "forget"]), st.integers(0, 3), st.integers(0, 5), st.integers(0, 900)),
    max_size=80,
)


@given(ACTIONS)
def test_bounds_and_books_hold_after_every_step(actions):
    limit = 4_000
    cache = ResponseCache(limit)
    newest: dict[bytes, tuple] = {}
    for action, version, number, size in actions:
        one = key(tensor(data=bytes([number]) * 8), version=str(version))
        if action == "put":
            cache.put(one, answer(size))
            newest[one] = answer(size)
        elif action == "get":
            assert cache.get(one) in (None, newest.get(one))
        else:
            cache.forget("m", str(version))
            assert cache.get(one) is None
        kept = [cache._entries[each][0] for each in cache._entries]
        assert cache.usage.bytes == sum(map(entry_bytes, kept)) <= limit
        assert sorted(cache._entries) == sorted(each for owned in cache._owned.values() for each in owned)
        assert all(cache._owned.values())


@pytest.mark.parametrize(("tensors", "dimensions", "size"), [(1, 1, 4), (3, 4, 16), (1, 2, 4096), (2, 32, 8)])
def test_the_bytes_that_are_counted_are_no_less_than_those_that_are_taken(tensors, dimensions, size):
    cache = ResponseCache(1 << 30)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(2000):
            shape = tuple(range(1000, 1000 + dimensions))
            outputs = tuple(tensor(f"y{index}", DataType.UINT8, shape, os.urandom(size)) for index in range(tensors))
            cache.put(number.to_bytes(24, "little"), outputs)
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert taken <= cache.usage.bytes <= 2 * taken


# -- Redis, without one


EVERYTHING = (
    tensor("a", DataType.BYTES, (2,), b"\x01\0\0\0x\0\0\0\0"),
    tensor("b", DataType.BF16, (0, 3), b""),
    tensor("c", DataType.INT32, (), bytearray(b"\0\xff\x80\x7f")),
    tensor("ü", DataType.UINT8, (1, 2, 3), memoryview(b"abcdef")),
)


def test_the_stored_form_comes_back_whole():
    assert decode(encode(EVERYTHING)) == tuple(
        Tensor(one.name, one.datatype, one.shape, bytes(one.data)) for one in EVERYTHING
    )
    assert decode(encode(())) == ()


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "redis.asyncio", None)
    with pytest.raises(RedisMissing, match=r"headrace\[redis\]"):
        RedisCache("redis://127.0.0.1:1")


def test_an_address_that_is_none_of_redis_is_told_with_the_option_and_without_the_address():
    with pytest.raises(ValueError, match=r"^--cache-redis: .*redis://") as refused:
        RedisCache("sesame@127.0.0.1:6379")
    assert "sesame" not in str(refused.value)

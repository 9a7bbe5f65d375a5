"""Messages cut out of a stream wherever it is cut, their bounds, and their compression."""

import gzip
import time
import zlib
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.core.errors import InvalidRequest, Unsupported
from headrace.frontends import grpc_message
from headrace.frontends.grpc_message import (
    COMPRESS_ABOVE_BYTES,
    PREFIX_BYTES,
    MessageReader,
    MessageTooLarge,
    check_encoding,
    is_whole,
    prefixed,
    unpacked,
)


def _whole(message: bytes, flag: int = 0) -> bytes:
    return bytes((flag,)) + len(message).to_bytes(4, "big") + message


@given(st.lists(st.tuples(st.integers(0, 1), st.binary(max_size=3000))), st.lists(st.integers(0, 9000), max_size=20))
def test_messages_are_the_same_wherever_the_stream_is_cut(messages, cuts):
    data = b"".join(_whole(message, flag) for flag, message in messages)
    places = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    reader = MessageReader(10_000)
    found = []
    for start, end in pairwise(places):
        found += reader.feed(data[start:end])
    assert found == messages
    assert reader.size == 0


def test_every_cut_of_two_messages():
    data = _whole(b"one") + _whole(b"", 1)
    for first in range(len(data)):
        for second in range(first, len(data)):
            reader = MessageReader(3)
            found = reader.feed(data[:first]) + reader.feed(data[first:second])
            assert reader.size == second - sum(PREFIX_BYTES + len(message) for _, message in found)
            assert found + reader.feed(data[second:]) == [(0, b"one"), (1, b"")]


@pytest.mark.parametrize("piece", [1, 100, 2000, 16_384])
def test_a_large_message_in_pieces_of_any_size_is_one_copy(piece):
    message = bytes(range(256)) * 4096
    data = _whole(message)
    reader = MessageReader(len(message))
    found = []
    for start in range(0, len(data), piece):
        found += reader.feed(data[start : start + piece])
        assert len(reader._chunks) + len(reader._crumbs) <= 256 + len(data) // 256
    assert found == [(0, message)]


def test_many_messages_at_once_take_no_longer_than_their_bytes():
    data = _whole(b"") * 200_000
    started = time.process_time()
    assert len(MessageReader(10).feed(data)) == 200_000
    assert time.process_time() - started < 3


def test_a_message_that_will_be_too_large_is_refused_before_it_comes():
    reader = MessageReader(10)
    assert reader.feed(_whole(b"0123456789")) == [(0, b"0123456789")]
    with pytest.raises(MessageTooLarge, match=r"11 vs\. 10"):
        reader.feed(b"\0\0\0\0\x0b")


def test_a_flag_that_is_none_is_refused():
    with pytest.raises(InvalidRequest, match="begins with 2"):
        MessageReader(10).feed(_whole(b"", 2))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (_whole(b"0123456789"), True),
        (_whole(b""), True),
        (_whole(b"01234567890"), False),
        (_whole(b"x", 1), False),
        (_whole(b"x", 2), False),
        (_whole(b"x") + b"y", False),
        (_whole(b"xy")[:-1], False),
        (b"\0\0\0\0", False),
        (b"", False),
    ],
)
def test_what_is_one_plain_message(data, expected):
    assert is_whole(data, 10) is expected


def _raw_deflate(message: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(message) + packer.flush()


@pytest.mark.parametrize(
    ("pack", "encoding"), [(gzip.compress, "gzip"), (zlib.compress, "deflate"), (_raw_deflate, "deflate")]
)
def test_packed_messages_are_unpacked(pack, encoding):
    assert unpacked((1, pack(b"hello")), encoding, 5) == b"hello"
    assert unpacked((0, b"hello"), encoding, 5) == b"hello"


@pytest.mark.parametrize(
    ("payload", "encoding"),
    [
        (b"hello", ""),
        (b"hello", "identity"),
        (b"hello", "gzip"),
        (b"", "gzip"),
        (gzip.compress(b"hello", mtime=0)[:-1], "gzip"),
        (gzip.compress(b"hello", mtime=0) + b"x", "gzip"),
        (zlib.compress(b"hello"), "gzip"),
        (gzip.compress(b"hello", mtime=0), "deflate"),
    ],
)
def test_what_is_not_packed_as_it_is_said_to_be(payload, encoding):
    with pytest.raises(InvalidRequest):
        unpacked((1, payload), encoding, 100)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_bomb_is_unpacked_no_further_than_the_bound(encoding):
    bomb = (gzip if encoding == "gzip" else zlib).compress(bytes(50_000_000))
    with pytest.raises(MessageTooLarge, match="100000"):
        unpacked((1, bomb), encoding, 100_000)


def test_a_bomb_below_the_bound_is_one_all_the_same(monkeypatch):
    monkeypatch.setattr(grpc_message, "FREE_BYTES", 20_000)
    bomb = gzip.compress(bytes(1_000_000))
    with pytest.raises(MessageTooLarge, match=str(grpc_message.MOST_TIMES * len(bomb))):
        unpacked((1, bomb), "gzip", 10**9)
    few, packable = bytes(20_000), bytes(range(256)) * 400
    assert unpacked((1, gzip.compress(few)), "gzip", 10**9) == few
    assert len(packable) > 5 * 20_000
    assert unpacked((1, gzip.compress(packable, 1)), "gzip", 10**9) == packable


@pytest.mark.parametrize("encoding", ["", "gzip", "deflate"])
def test_what_is_packed_is_what_was_there_and_small_messages_are_not(encoding):
    for message in (b"", bytes(COMPRESS_ABOVE_BYTES - 1), bytes(COMPRESS_ABOVE_BYTES)):
        ((flag, payload),) = MessageReader(1000).feed(prefixed(message, encoding))
        assert unpacked((flag, payload), encoding, 1000) == message
        assert flag == (bool(encoding) and len(message) >= COMPRESS_ABOVE_BYTES)


def test_encodings():
    assert [check_encoding(one) for one in ("", "identity", "gzip", "deflate")] == [None] * 4
    for one in ("br", "GZIP", "gzip, gzip", "x-gzip"):
        assert isinstance(check_encoding(one), Unsupported)

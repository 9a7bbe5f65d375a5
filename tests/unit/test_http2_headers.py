"""Header blocks: what is remembered is what would be read again, and nothing takes longer than its bytes."""

import random
import time

import pytest
from hpack import Decoder, Encoder
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.http2.frames import ConnectionFault, ErrorCode
from headrace.http2.headers import MAX_HEADER_BYTES, HeaderReader, HeadersTooLarge, header_block

REQUEST = [(b":method", b"POST"), (b":path", b"/inference.GRPCInferenceService/ModelInfer"), (b"te", b"trailers")]


def _reader():
    """A reader that gives the headers themselves, and the list of those that it had to parse."""
    parsed = []

    def parse(headers):
        parsed.append(headers)
        return tuple(headers)

    return HeaderReader(parse), parsed


def test_a_block_that_comes_again_is_not_parsed_again():
    reader, parsed = _reader()
    encoder = Encoder()
    first = encoder.encode(REQUEST)
    again = encoder.encode(REQUEST)
    assert first != again
    assert [reader.read(block) for block in (first, again, again, again)] == [tuple(REQUEST)] * 4
    assert len(parsed) == 2


def test_what_was_remembered_is_forgotten_when_the_table_changes():
    reader, _ = _reader()
    encoder = Encoder()
    for value in (b"1", b"2"):
        headers = [*REQUEST, (b"x", value)]
        for _ in range(3):
            assert reader.read(encoder.encode(headers)) == tuple(headers)
    # The same bytes now name another entry of the table.
    block = bytes((0x80 | 62,))
    assert reader.read(block) == ((b"x", b"2"),)
    assert reader.read(b"\x40\x01y\x013") == ((b"y", b"3"),)
    assert reader.read(block) == ((b"y", b"3"),)


def test_an_entry_that_was_pushed_out_is_gone():
    reader, _ = _reader()
    reader.read(b"\x40\x01y\x013")
    first, second = bytes((0x80 | 62,)), bytes((0x80 | 63,))
    assert reader.read(first) == reader.read(first) == ((b"y", b"3"),)
    reader.read(b"\x40\x01z\x014")
    assert reader.read(second) == reader.read(second) == ((b"y", b"3"),)
    reader.read(b"\x40\x01z\x7f\xc9\x1e" + b"v" * 4040)
    assert reader.read(first) == ((b"z", b"v" * 4040),)
    with pytest.raises(ConnectionFault):
        reader.read(second)


def test_an_entry_too_large_for_the_table_empties_it():
    reader, _ = _reader()
    reader.read(b"\x40\x01y\x013")
    first = bytes((0x80 | 62,))
    assert reader.read(first) == reader.read(first) == ((b"y", b"3"),)
    reader.read(b"\x40\x01z\x7f\x89\x26" + b"v" * 5000)
    with pytest.raises(ConnectionFault):
        reader.read(first)


def test_a_table_of_another_size_is_another_table():
    reader, _ = _reader()
    reader.read(b"\x40\x01y\x013")
    block = bytes((0x80 | 62,))
    assert reader.read(block) == reader.read(block) == ((b"y", b"3"),)
    assert reader.read(b"\x20\x3f\xe1\x1f") == ()  # to nothing, and back to 4096
    with pytest.raises(ConnectionFault):
        reader.read(block)


def test_a_resize_in_front_of_headers_is_never_remembered():
    reader, parsed = _reader()
    reader.read(b"\x40\x01y\x013")
    for _ in range(3):
        assert reader.read(b"\x3f\xe1\x1f\xbe") == ((b"y", b"3"),)
    assert len(parsed) == 4


names = st.sampled_from([b":path", b"x", b"y-bin", b"te"])
values = st.sampled_from([b"", b"1", b"trailers", b"v" * 1500, b"w" * 3000])
headers = st.lists(st.tuples(names, values), max_size=5)
sizes = st.none() | st.sampled_from([0, 40, 100, 4096])


@given(st.lists(st.tuples(headers, sizes, st.booleans()), max_size=30), st.integers(0, 2**32))
@settings(max_examples=3 * settings().max_examples // 2)
def test_reading_with_a_memory_is_reading(requests, seed):
    """Against a decoder that remembers nothing, whatever an encoder does to the table."""
    encoder, plain = Encoder(), Decoder()
    reader, _ = _reader()
    chance = random.Random(seed)
    blocks: list[bytes] = []
    for given_headers, size, again in requests:
        if size is not None:
            encoder.header_table_size = size
        block = encoder.encode([(name, value, chance.random() < 0.3) for name, value in given_headers])
        if again and blocks and size is None:
            # Bytes that came before may mean something else by now, or nothing.
            old = chance.choice(blocks)
            if all(piece & 0x80 for piece in old):  # indexed only: reading it changes no table
                try:
                    expected = tuple(map(tuple, plain.decode(old, raw=True)))
                except Exception:  # noqa: BLE001 - the decoder's own; both are at their end
                    with pytest.raises(ConnectionFault):
                        reader.read(old)
                    return
                assert reader.read(old) == expected
        blocks.append(block)
        assert reader.read(block) == tuple(map(tuple, plain.decode(block, raw=True))) == tuple(given_headers)


@given(st.binary(max_size=100))
@settings(max_examples=3 * settings().max_examples)
def test_whatever_comes_is_read_or_a_fault_of_the_peer(block):
    reader, _ = _reader()
    faults = []
    for _ in range(2):
        try:
            reader.read(block)
        except ConnectionFault as fault:
            faults.append(fault.code)
    assert set(faults) <= {ErrorCode.COMPRESSION_ERROR}


@pytest.mark.parametrize(
    ("block", "code"),
    [
        (b"\x00\x01x\x7f\x81\xff\x03" + b"v" * (MAX_HEADER_BYTES + 1), ErrorCode.ENHANCE_YOUR_CALM),
        (b"\x00\x01x\xff\x81\xff\x07" + b"\x00" * 2 * MAX_HEADER_BYTES, ErrorCode.ENHANCE_YOUR_CALM),
        (b"\x20" * 1000, ErrorCode.COMPRESSION_ERROR),
        (b"\x3f\xe1\x1f\x20\x3f\xe1\x1f", ErrorCode.COMPRESSION_ERROR),
        (b"\x3f\xe2\x1f", ErrorCode.COMPRESSION_ERROR),  # 4097
        (b"\x82\x20", ErrorCode.COMPRESSION_ERROR),
        (b"\xff" * 60_000, ErrorCode.COMPRESSION_ERROR),
        (b"\x80", ErrorCode.COMPRESSION_ERROR),
        (b"\x00", ErrorCode.COMPRESSION_ERROR),
        (b"\x00\x85\xff\xff\xff\xff\xff", ErrorCode.COMPRESSION_ERROR),  # Huffman code's end of string
    ],
)
def test_blocks_that_are_refused(block, code):
    reader, _ = _reader()
    started = time.process_time()
    with pytest.raises(ConnectionFault) as caught:
        reader.read(block)
    assert caught.value.code is code
    assert time.process_time() - started < 0.5


def test_a_few_bytes_that_stand_for_many_headers_are_refused_and_small_numbers_of_them_not_kept():
    reader, parsed = _reader()
    reader.read(b"\x40\x01x\x7f\xa1\x1e" + b"v" * 4000)
    for _ in range(3):
        assert len(reader.read(b"\xbe" * 10)) == 10
    assert len(parsed) == 4, "40 KB of headers are not remembered for 10 bytes"
    with pytest.raises(HeadersTooLarge):
        reader.read(b"\xbe" * 20)
    assert len(reader.read(b"\xbe" * 10)) == 10, "what was too large was read all the same"
    with pytest.raises(ConnectionFault):
        reader.read(b"\xbe" * 40)


def test_memory_is_bounded():
    reader, parsed = _reader()
    for index in range(2000):
        reader.read(b"\x00\x01x\x04%04d" % index)
    assert len(reader._remembered) <= 256
    assert len(parsed) == 2000


@given(st.lists(st.tuples(st.binary(max_size=300), st.binary(max_size=20_000))))
@settings(max_examples=settings().max_examples // 2)
def test_any_decoder_reads_what_is_written_at_any_time(given_headers):
    block = header_block([(b":status", b"200"), *given_headers])
    decoder = Decoder(max_header_list_size=2**24)
    for _ in range(2):
        assert [tuple(one) for one in decoder.decode(block, raw=True)] == [(b":status", b"200"), *given_headers]
    assert not decoder.header_table.dynamic_entries

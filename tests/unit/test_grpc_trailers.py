"""How a gRPC response begins and ends, as a client's HPACK reads it."""

from urllib.parse import unquote_to_bytes

import pytest
from hpack import Decoder

from headrace.frontends.grpc_trailers import (
    COMPRESSED,
    MAX_ENCODED_LENGTH,
    MAX_MESSAGE_LENGTH,
    OK,
    RESPONSE,
    trailers,
)
from headrace.frontends.status import StatusCode


def read(block):
    return dict(Decoder().decode(block, raw=True))


def message_of(text):
    return read(trailers(StatusCode.INTERNAL, text, alone=False)).get(b"grpc-message")


def test_what_a_response_begins_with_says_how_it_is_packed():
    assert read(RESPONSE)[b":status"] == b"200"
    assert b"grpc-encoding" not in read(RESPONSE)
    for encoding, block in COMPRESSED.items():
        assert read(block) == {**read(RESPONSE), b"grpc-encoding": encoding.encode()}


def test_trailers_that_are_the_whole_response_begin_it_as_well():
    assert read(OK) == read(trailers(StatusCode.OK, "", alone=False)) == {b"grpc-status": b"0"}
    alone = read(trailers(StatusCode.NOT_FOUND, "no model", alone=True))
    assert alone == {**read(RESPONSE), b"grpc-status": b"5", b"grpc-message": b"no model"}


@pytest.mark.parametrize("text", ["100 % of it", "caf\u00e9", "two\nlines", "\u4e2d" * 10, "~ !"])
def test_a_message_comes_as_it_was(text):
    assert unquote_to_bytes(message_of(text)).decode() == text


def test_a_message_has_room_and_no_more():
    assert message_of("") is None
    assert len(message_of("x" * 5000)) == MAX_MESSAGE_LENGTH
    long = message_of("\U0001f600" * MAX_MESSAGE_LENGTH)  # twelve bytes of header each
    assert MAX_ENCODED_LENGTH - 12 < len(long) <= MAX_ENCODED_LENGTH
    assert set(unquote_to_bytes(long).decode()) == {"\U0001f600"}


def test_half_a_character_is_no_trouble():
    assert message_of("\ud800") == b"?"

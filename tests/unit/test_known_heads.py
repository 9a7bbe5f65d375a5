"""Heads that were seen before: found only for the very same bytes, with a body that is just as long as they say."""

import pytest

from headrace.frontends.infer import InferHeaders
from headrace.frontends.known_heads import KnownHead, KnownHeads

HEAD = b"POST /v2/models/m/infer HTTP/1.1\r\nhost: h\r\ncontent-length: 4\r\n\r\n"
KNOWN = KnownHead("m", "", InferHeaders(content_length=4))


@pytest.fixture
def heads():
    known = KnownHeads()
    known.remember(HEAD + b"body", KNOWN)
    return known


def test_the_same_head_with_another_body_of_its_length(heads):
    assert heads.find(HEAD + b"more") == (KNOWN, len(HEAD))
    assert heads.find(HEAD + b"\r\n\r\n") == (KNOWN, len(HEAD))


@pytest.mark.parametrize(
    "data",
    [
        HEAD + b"bod",
        HEAD + b"bodyP",
        HEAD,
        HEAD[:-2],
        b"",
        b"\r\n" + HEAD + b"body",
        HEAD.replace(b"models/m/", b"models/n/") + b"body",
        HEAD.replace(b"host: h", b"host: i") + b"body",
        b"body",
        b"\r\n\r\n",
    ],
)
def test_anything_else_is_for_the_parser(heads, data):
    assert heads.find(data) is None


def test_a_request_whose_body_is_not_as_its_head_says_is_not_remembered():
    # It came in chunks, or with another one behind it.
    known = KnownHeads()
    known.remember(HEAD + b"4\r\nbody\r\n0\r\n\r\n", KNOWN)
    assert known.find(HEAD + b"body") is None


def test_long_heads_are_not_kept_and_many_are_bounded():
    known = KnownHeads()
    long = HEAD.replace(b"host: h", b"host: " + b"h" * 4000)
    known.remember(long + b"body", KNOWN)
    assert known.find(long + b"body") is None
    for number in range(5000):
        head = HEAD.replace(b"host: h", b"host: %d" % number)
        known.remember(head + b"body", KNOWN)
        assert known.find(head + b"body") is not None
    assert len(known._heads) <= 1024

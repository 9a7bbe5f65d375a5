"""What a call's headers say, right and wrong."""

import base64

import pytest

from headrace.core.errors import InvalidRequest, Restricted, Unsupported
from headrace.frontends.grpc_head import Procedure, parse_head
from headrace.frontends.restrictions import Restrictions


async def _answer(*_):
    raise AssertionError("nobody calls it")


PATH = b"/service/Method"
PROCEDURE = Procedure("ModelInfer", _answer, None)
BASE = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", PATH), (b":authority", b"test")]
TYPE = (b"content-type", b"application/grpc")


def _head(*headers, base=(*BASE, TYPE), restrictions=None):
    return parse_head([*base, *headers], {PATH: PROCEDURE}, restrictions)


def test_a_plain_head():
    head = _head((b"te", b"trailers"), (b"user-agent", b"test/1"), (b"grpc-accept-encoding", b"identity, gzip"))
    assert head.procedure is PROCEDURE
    assert (head.path, head.timeout_ns, head.encoding, head.http_status) == (PATH.decode(), 0, "", 200)
    assert head.refusal is None
    assert head.metadata == (("user-agent", "test/1"),)
    assert head.accepts == {"identity", "gzip"}


def test_a_path_that_is_not_known_is_kept():
    head = parse_head([*BASE[:2], (b":path", b"/other\xff"), TYPE], {PATH: PROCEDURE})
    assert (head.procedure, head.path) == (None, "/other\xff")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"1n", 1),
        (b"1u", 1000),
        (b"20m", 20_000_000),
        (b"3S", 3_000_000_000),
        (b"2M", 120_000_000_000),
        (b"1H", 3_600_000_000_000),
        (b"0n", 1),
        (b"0H", 1),
        (b"00000001S", 1_000_000_000),
        (b"99999999S", 99_999_999_000_000_000),
        (b"99999999M", 0),
        (b"99999999H", 0),
    ],
)
def test_timeouts(value, expected):
    head = _head((b"grpc-timeout", value))
    assert (head.timeout_ns, head.refusal) == (expected, None)


@pytest.mark.parametrize("value", [b"", b"1", b"m", b"-1m", b"1.5S", b"123456789m", b"1 m", b"1ms", b"1x", b"\xb2m"])
def test_timeouts_that_are_none(value):
    assert isinstance(_head((b"grpc-timeout", value)).refusal, InvalidRequest)


BINARY = bytes(range(256))


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 255])
def test_binary_metadata_with_and_without_padding(length, padded):
    value = base64.b64encode(BINARY[:length])
    head = _head((b"x-bin", value if padded else value.rstrip(b"=")))
    assert head.metadata == (("x-bin", BINARY[:length]),)


def test_several_binary_values_in_one_header():
    one, two = base64.b64encode(b"one!"), base64.b64encode(b"2").rstrip(b"=")
    head = _head((b"x-bin", one + b"," + two + b", " + one), (b"x-bin", two), (b"y", b"a,b"))
    assert head.metadata == (
        ("x-bin", b"one!"),
        ("x-bin", b"2"),
        ("x-bin", b"one!"),
        ("x-bin", b"2"),
        ("y", "a,b"),
    )


@pytest.mark.parametrize("value", [b"!", b"abcde", b"a", b"ab=c", b"\xff\xff", b"YQ==YQ=="])
def test_binary_metadata_that_is_none(value):
    refusal = _head((b"x-bin", value)).refusal
    assert isinstance(refusal, InvalidRequest)
    assert "x-bin" in str(refusal)


def test_metadata_that_is_no_ascii_is_passed_on_as_latin_1():
    assert _head((b"x", b"\xe9\xff")).metadata == (("x", "\xe9\xff"),)


def test_what_a_client_accepts_may_be_said_in_several_headers():
    assert _head((b"grpc-accept-encoding", b"gzip"), (b"grpc-accept-encoding", b"deflate")).accepts >= {
        "gzip",
        "deflate",
    }


def test_an_encoding_that_is_not_offered():
    refusal = _head((b"grpc-encoding", b"snappy")).refusal
    assert isinstance(refusal, Unsupported)
    assert "gzip" in str(refusal)


@pytest.mark.parametrize(
    ("given", "status"),
    [
        (b"application/grpc", 200),
        (b"application/grpc+proto", 200),
        (b"Application/GRPC;charset=utf-8", 200),
        (b"application/grpc-web", 415),
        (b"application/grpc-web+proto", 415),
        (b"application/grpcx", 415),
        (b"application/json", 415),
        (b"", 415),
    ],
)
def test_content_types(given, status):
    assert _head((b"content-type", given), base=BASE).http_status == status


def test_no_content_type():
    assert _head(base=BASE).http_status == 415


@pytest.mark.parametrize("method", [b"GET", b"post", b"OPTIONS"])
def test_other_methods(method):
    assert _head(base=[(b":method", method), *BASE[1:], TYPE]).http_status == 405


@pytest.mark.parametrize(
    "extra",
    [
        (b":path", PATH),
        (b":status", b"200"),
        (b":method", b"POST"),
        (b":", b""),
        (b"", b""),
        (b"X-Upper", b"1"),
        (b"connection", b"close"),
        (b"transfer-encoding", b"chunked"),
        (b"te", b"gzip"),
    ],
)
def test_headers_that_http2_forbids(extra):
    assert _head(extra).http_status == 400


def test_a_pseudo_header_behind_others():
    assert parse_head([*BASE[:2], TYPE, BASE[2]], {PATH: PROCEDURE}).http_status == 400


def test_restrictions_look_at_the_metadata():
    restrictions = Restrictions.parse(["inference:key=sesame"])
    assert isinstance(_head(restrictions=restrictions).refusal, Restricted)
    assert _head((b"triton-grpc-protocol-key", b"sesame"), restrictions=restrictions).refusal is None

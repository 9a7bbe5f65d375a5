"""The client's errors: one class for one trouble, whichever protocol brought it."""

import pickle

import pytest

from headrace.client import (
    ClientError,
    ConnectionFailed,
    DeadlineError,
    InferenceError,
    InvalidRequestError,
    NotFoundError,
    ProtocolError,
    UnavailableError,
    UnsupportedError,
)
from headrace.client.address import parse_address
from headrace.client.errors import of_grpc, of_http
from headrace.core.errors import Kind
from headrace.frontends.status import GRPC_STATUS, HTTP_STATUS


@pytest.mark.parametrize("kind", Kind)
def test_every_kind_of_the_server_is_one_class_over_both_protocols(kind):
    message = "Request timeout expired: model 'm'" if kind is Kind.DEADLINE else "model 'm' is unwell"
    over_http = of_http(HTTP_STATUS[kind], message)
    over_grpc = of_grpc(GRPC_STATUS[kind].name, message)
    assert type(over_http) is type(over_grpc)
    assert str(over_http) == str(over_grpc) == over_http.message == message
    assert (over_http.status, over_grpc.status) == (HTTP_STATUS[kind], GRPC_STATUS[kind].name)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Kind.INVALID, InvalidRequestError),
        (Kind.TOO_LARGE, InvalidRequestError),
        (Kind.NOT_FOUND, NotFoundError),
        (Kind.OVERLOADED, UnavailableError),
        (Kind.UNSUPPORTED, UnsupportedError),
        (Kind.INTERNAL, InferenceError),
    ],
)
def test_kinds_have_the_classes_that_their_names_promise(kind, expected):
    assert type(of_http(HTTP_STATUS[kind], "x")) is expected


def test_a_deadline_is_told_from_an_overload_that_has_the_same_status():
    assert type(of_http(503, "Request timeout expired: late")) is DeadlineError
    assert type(of_http(503, "Exceeds maximum queue size")) is UnavailableError


def test_a_broken_connection_is_told_from_an_unavailable_server():
    assert type(of_grpc("UNAVAILABLE", "failed to connect to all addresses; last error: refused")) is ConnectionFailed
    assert type(of_grpc("UNAVAILABLE", "the queue of model 'm' is full")) is UnavailableError


def test_a_message_over_a_bound_is_whose_bound_it_is():
    text = "Received message larger than max (9 vs. 4)"
    assert type(of_grpc("RESOURCE_EXHAUSTED", f"CLIENT: {text}")) is ProtocolError
    assert type(of_grpc("RESOURCE_EXHAUSTED", f"SERVER: {text}")) is InvalidRequestError
    assert type(of_grpc("RESOURCE_EXHAUSTED", "come again")) is UnavailableError


def test_errors_cross_process_borders():
    error = pickle.loads(pickle.dumps(NotFoundError(404, "no model 'm'")))
    assert (type(error), error.status, str(error)) == (NotFoundError, 404, "no model 'm'")


@pytest.mark.parametrize(
    ("url", "protocol", "target", "tls"),
    [
        ("127.0.0.1:8000", "http", "http://127.0.0.1:8000", False),
        ("localhost:9", "http", "http://localhost:9", False),
        ("localhost", "http", "http://localhost:8000", False),
        ("http://localhost", "http", "http://localhost", False),
        ("http://gateway/models/", "http", "http://gateway/models", False),
        ("https://a.example:443", "http", "https://a.example:443", True),
        ("grpc://127.0.0.1:8001", "grpc", "127.0.0.1:8001", False),
        ("grpc://somewhere", "grpc", "somewhere:8001", False),
        ("grpcs://somewhere:1/", "grpc", "somewhere:1", True),
        ("grpc://[::1]:8001", "grpc", "[::1]:8001", False),
        ("[::1]:8000", "http", "http://[::1]:8000", False),
    ],
)
def test_addresses(url, protocol, target, tls):
    address = parse_address(url)
    assert (address.protocol, address.target, address.tls) == (protocol, target, tls)


@pytest.mark.parametrize(
    "url", ["", "ftp://a:1", "http://", "http://a:port", "http://a:99999", "grpc://a:1/path", "http://a:1?x=1", "a b:1"]
)
def test_what_is_no_address_is_refused_by_name(url):
    with pytest.raises(ClientError, match="no server's address") as caught:
        parse_address(url)
    assert f"'{url}'" in str(caught.value)

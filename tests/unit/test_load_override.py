"""The parameters of load and unload requests."""

import base64

import pytest

from headrace.core.errors import InvalidRequest
from headrace.frontends.load_override import load_override, unload_dependents

CONFIG = '{"backend": "python"}'


def test_without_parameters_nothing_is_overridden():
    assert load_override("m", {}) == ("", {})


def test_files_are_base64_in_http_and_bytes_in_grpc():
    text = base64.b64encode(b"\0\1model").decode()
    for given in (text, b"\0\1model"):
        config, files = load_override("m", {"config": CONFIG, "file:1/model.py": given, "file:2/a/b": b""})
        assert config == CONFIG
        assert files == {"1/model.py": b"\0\1model", "2/a/b": b""}


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"config": 5}, "'config' is int, expected a string"),
        ({"config": b"{}"}, "'config' is bytes, expected a string"),
        ({"config": None}, "'config' is NoneType"),
        ({"config": {"a": 1}}, "'config' is dict"),
        ({"config": CONFIG, "file:1/a": 5}, "'file:1/a' is int, expected a string"),
        ({"config": CONFIG, "file:1/a": ["x"]}, "'file:1/a' is list"),
        ({"config": CONFIG, "file:1/a": "no base64!"}, "'file:1/a' is not base64"),
        ({"config": CONFIG, "file:1/a": "YQ"}, "'file:1/a' is not base64"),
        ({"config": CONFIG, "file:1/a": "ä"}, "'file:1/a' is not base64"),
        ({"file:1/a": "YQ=="}, "need the parameter config"),
        ({"config": "", "file:1/a": "YQ=="}, "need the parameter config"),
        ({"Config": CONFIG}, "'Config' is unknown, expected config or file:VERSION/NAME"),
        ({"files:1/a": "YQ=="}, "'files:1/a' is unknown"),
    ],
)
def test_what_a_load_request_cannot_have(parameters, message):
    with pytest.raises(InvalidRequest, match=f"model 'm': load parameter.*{message}"):
        load_override("m", parameters)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [({}, False), ({"unload_dependents": True}, True), ({"unload_dependents": False}, False)],
)
def test_dependents_go_only_when_asked_to(parameters, expected):
    assert unload_dependents("m", parameters) is expected


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"unload_dependents": 1}, "unload_dependents is 1, expected true or false"),
        ({"unload_dependents": "true"}, "unload_dependents is 'true'"),
        ({"unload_dependents": None}, "unload_dependents is None"),
        ({"dependents": True}, "unload parameter 'dependents' is unknown, expected unload_dependents"),
    ],
)
def test_what_an_unload_request_cannot_have(parameters, message):
    with pytest.raises(InvalidRequest, match=f"model 'm': {message}"):
        unload_dependents("m", parameters)

"""Which headers become parameters."""

import pytest

from headrace.core.request import InferRequest
from headrace.frontends.forwarding import HeaderForwarding, with_forwarded

HTTP = [(b"Host", b"h"), (b"X-User", b"ann"), (b"x-tenant", b"t"), (b"triton_x", b"1"), (b"x-user", b"bob")]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("x-.*", {"x-user": "ann, bob", "x-tenant": "t"}),
        ("x-tenant", {"x-tenant": "t"}),
        ("tenant|x", {}),
        ("X-.*", {}),
        (".*", {"host": "h", "x-user": "ann, bob", "x-tenant": "t"}),
        ("triton_x", {}),
        ("", {}),
    ],
)
def test_names_that_match_whole_are_picked(pattern, expected):
    forwarding = HeaderForwarding(pattern)
    assert forwarding.parameters(HTTP) == expected
    assert forwarding.metadata_parameters([(name.decode(), value.decode()) for name, value in HTTP]) == expected
    assert forwarding.active is bool(pattern)


@pytest.mark.parametrize(
    "name", ["priority", "timeout", "sequence_id", "sequence_start", "sequence_end", "binary_data_output", "TRITON_a"]
)
def test_a_header_never_says_what_the_server_itself_reads(name):
    forwarding = HeaderForwarding(".*")
    assert forwarding.parameters([(name.encode(), b"u=1")]) == {}
    assert forwarding.metadata_parameters([(name, "u=1")]) == {}


@pytest.mark.parametrize(
    ("raw", "text"),
    [("caf\u00e9".encode(), "caf\u00e9"), (b"caf\xe9", "caf\u00e9"), (b"", ""), (b"\x80\xff", "\x80\xff")],
)
def test_bytes_of_any_kind_become_text(raw, text):
    forwarding = HeaderForwarding(".*")
    assert forwarding.parameters([(b"x", raw)]) == {"x": text}
    assert forwarding.metadata_parameters([("x-bin", raw)]) == {"x-bin": text}
    forwarding.parameters([(b"x", raw)])["x"].encode()  # nothing that could not be sent on
    assert list(forwarding.parameters([(raw, b"v")])) == [text.lower()]


@pytest.mark.parametrize("pattern", ["(", "[a", "*", "a{1,99999999999999999999}", "(?P<a>x)(?P<a>y)"])
def test_what_is_no_expression_is_refused_with_its_flag(pattern):
    with pytest.raises(ValueError, match="--forward-headers") as caught:
        HeaderForwarding(pattern)
    assert pattern in str(caught.value)


def test_a_header_wins_over_a_parameter_and_the_rest_stays():
    request = InferRequest("m", "1", "id", (), parameters={"x-user": "mallory", "timeout": 5}, deadline_ns=7)
    changed = with_forwarded(request, {"x-user": "ann", "x-tenant": "t"})
    assert changed.parameters == {"x-user": "ann", "x-tenant": "t", "timeout": 5}
    assert (changed.model, changed.version, changed.id, changed.deadline_ns) == ("m", "1", "id", 7)
    assert request.parameters == {"x-user": "mallory", "timeout": 5}
    assert with_forwarded(request, {}) is request

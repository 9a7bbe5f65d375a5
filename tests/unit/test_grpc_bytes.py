"""The plain way through a ModelInferRequest, held against protobuf: the same request, or none."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from headrace.core.errors import HeadraceError
from headrace.core.request import InferRequest, InferResponse
from headrace.core.tensor import DataType, Tensor
from headrace.wire import grpc_v2, pb
from headrace.wire.grpc_bytes import REMEMBERED_BYTES, decode_request, encode_response

DEADLINE_NS = 77

texts = st.text(max_size=8)
names = st.sampled_from(["x", "y", "", "é", "x" * 200])
datatypes = st.sampled_from(["FP32", "INT64", "BYTES", "BOOL", "BF16", "", "FP31"])
shapes = st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 4), max_size=4)


def _message() -> pb.ModelInferRequest:
    message = pb.ModelInferRequest(model_name="m", id="7", raw_input_contents=[b"1234"])
    message.inputs.add(name="x", datatype="FP32", shape=[1])
    return message


@st.composite
def parameters(draw, into):
    for name in draw(st.lists(st.sampled_from(["a", "timeout", "shared_memory_region", "classification"]), max_size=2)):
        field, value = draw(
            st.sampled_from(
                [("int64_param", 3), ("string_param", "s"), ("bool_param", True), ("double_param", 0.5), (None, None)]
            )
        )
        if field is None:
            into[name].SetInParent()
        else:
            setattr(into[name], field, value)


@st.composite
def messages(draw):
    """Messages that say all kinds of things, right and wrong."""
    message = pb.ModelInferRequest(
        model_name=draw(texts), model_version=draw(texts), id=draw(st.just("") | texts | st.text(min_size=130))
    )
    for _ in range(draw(st.integers(0, 3))):
        tensor = message.inputs.add(name=draw(names), datatype=draw(datatypes), shape=draw(shapes))
        if draw(st.integers(0, 5)) == 0:
            draw(parameters(tensor.parameters))
        kind = draw(st.integers(0, 8))
        if kind == 0:
            tensor.contents.fp32_contents.extend([1.0])
        elif kind == 1:
            tensor.contents.SetInParent()
    for _ in range(draw(st.integers(0, 2))):
        output = message.outputs.add(name=draw(names))
        if draw(st.integers(0, 3)) == 0:
            draw(parameters(output.parameters))
    if draw(st.integers(0, 3)) == 0:
        draw(parameters(message.parameters))
    count = len(message.inputs) + draw(st.sampled_from([0, 0, 0, 0, 0, 1, -1]))
    message.raw_input_contents.extend(draw(st.binary(max_size=200)) for _ in range(max(0, count)))
    return message


def _varint(value: int, length: int = 0) -> bytes:
    """A varint of ``length`` bytes at least, which is more than it needs."""
    encoded = bytearray()
    while value >= 0x80 or len(encoded) + 1 < length:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


@st.composite
def rewritten(draw):
    """A message's fields written as no library would: in any order, twice, with long varints, and others between."""
    fields: list[tuple[int, int, bytes]] = []
    for _ in range(draw(st.integers(1, 2))):
        message = draw(messages())
        fields += [(1, 2, message.model_name.encode()), (3, 2, message.id.encode())]
        fields += [(5, 2, tensor.SerializeToString()) for tensor in message.inputs]
        fields += [(6, 2, output.SerializeToString()) for output in message.outputs]
        fields += [(7, 2, bytes(raw)) for raw in message.raw_input_contents]
    odd = draw(
        st.lists(
            st.tuples(st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 15, 16, 100]), st.integers(0, 7), st.binary(max_size=9)),
            max_size=2,
        )
    )
    order = draw(st.integers(0, 3))
    fields = draw(st.permutations(fields)) if order == 0 else fields
    for one in odd:
        fields.insert(draw(st.integers(0, len(fields))), one)
    data = b""
    for number, kind, payload in fields:
        data += _varint(number << 3 | kind, draw(st.sampled_from([0, 0, 0, 2, 5])))
        if kind == 2:
            data += _varint(len(payload), draw(st.sampled_from([0, 0, 0, 2, 5, 6, 10])))
        elif kind == 0:
            data += _varint(int.from_bytes(payload, "big"))
            continue
        data += payload
    return data


def _agrees(data: bytes, prefix: bytes = b"") -> InferRequest | None:
    """What the plain way makes of ``data``, once that is seen to be what protobuf makes of it."""
    found = decode_request(prefix + data, len(prefix), DEADLINE_NS)
    if found is None:
        return None
    try:
        expected = grpc_v2.decode_request(pb.ModelInferRequest.FromString(data), DEADLINE_NS)
    except (HeadraceError, ValueError) as error:
        raise AssertionError(f"{data!r} is refused: {error}") from error
    assert (found.model, found.version, found.id) == (expected.model, expected.version, expected.id)
    assert [(one.name, one.datatype, one.shape, bytes(one.data)) for one in found.inputs] == [
        (one.name, one.datatype, one.shape, bytes(one.data)) for one in expected.inputs
    ]
    assert (found.outputs, found.parameters) == (expected.outputs, expected.parameters)
    assert (found.deadline_ns, found.callers, found.borrows) == (DEADLINE_NS, expected.callers, expected.borrows)
    return found


@given(messages(), st.sampled_from([b"", b"\0\0\0\0\1"]))
@settings(max_examples=2 * settings().max_examples)
def test_any_message_as_protobuf_writes_it(message, prefix):
    _agrees(message.SerializeToString(), prefix)


@given(rewritten())
@settings(max_examples=4 * settings().max_examples)
@example(b"")
@example(b"\x1a\x01\xff")  # an id that is not UTF-8
@example(b"\x1a\x03\xed\xa0\x80")  # half of a surrogate pair
@example(b"\x0a\x01\xff")
@example(b"\x1a\x011\x1a\x012")  # two ids
@example(b"\x0a\x01a\x0a\x01b")  # two names
@example(b"\x3a\x00\x0a\x01m")  # data first
@example(b"\x3a\x81\x80\x80\x80\x10a")  # a length of more than 32 bits
def test_fields_as_nobody_writes_them(data):
    _agrees(data)


@given(messages(), st.data())
@settings(max_examples=2 * settings().max_examples)
def test_broken_messages(message, data):
    whole = bytearray(message.SerializeToString())
    if whole and data.draw(st.booleans()):
        whole = whole[: data.draw(st.integers(0, len(whole)))]
    for _ in range(data.draw(st.integers(0, 3)) if whole else 0):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    _agrees(bytes(whole))


@given(st.binary(max_size=60))
@settings(max_examples=2 * settings().max_examples)
def test_any_bytes(data):
    _agrees(data)


def test_what_clients_send_is_plain():
    """Else the tests above could pass by never looking at anything."""
    found = _agrees(_message().SerializeToString(), b"\0\0\0\0\1")
    assert found is not None
    assert isinstance(found.inputs[0].data, memoryview), "the data is used where it lies"


def test_an_id_between_other_fields_is_found_and_the_rest_is_still_the_rest():
    name, version, tensor = b"\x0a\x01m", b"\x12\x011", _message().inputs[0].SerializeToString()
    rest = b"\x2a" + bytes((len(tensor),)) + tensor + b"\x3a\x041234"
    found = _agrees(name + b"\x1a\x03abc" + version + rest)
    assert found is not None
    assert (found.model, found.version, found.id) == ("m", "1", "abc")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda message: message.inputs[0].contents.SetInParent(),
        lambda message: message.inputs[0].parameters["shared_memory_region"].SetInParent(),
        lambda message: message.outputs.add().parameters["shared_memory_region"].SetInParent(),
        lambda message: message.parameters["p"].SetInParent(),
        lambda message: message.raw_input_contents.append(b""),
        lambda message: message.raw_input_contents.pop(),
        lambda message: message.inputs.add(name="y", datatype="FP32", shape=[1]),
        lambda message: message.inputs[0].__setattr__("datatype", "FP31"),
        lambda message: message.__setattr__("model_version", "v" * REMEMBERED_BYTES),
    ],
)
def test_what_is_less_plain_is_left_to_protobuf(spoil):
    message = _message()
    spoil(message)
    assert decode_request(message.SerializeToString(), 0, 0) is None


tensors = st.builds(
    Tensor,
    texts,
    st.sampled_from(list(DataType)),
    st.lists(st.integers(0, 2**40), max_size=3).map(tuple),
    st.binary(max_size=300) | st.binary(max_size=300).map(bytearray) | st.binary(max_size=300).map(memoryview),
)


@given(st.builds(InferResponse, texts, texts, st.just("") | st.text(max_size=200), st.lists(tensors).map(tuple)))
@settings(max_examples=2 * settings().max_examples)
def test_a_response_reads_as_protobuf_would_have_written_it(response):
    pieces, size = encode_response(response)
    data = b"".join(pieces)
    assert len(data) == size
    assert pb.ModelInferResponse.FromString(data) == grpc_v2.encode_response(response)


def test_a_large_response_is_not_copied():
    data = bytearray(300_000)
    pieces, size = encode_response(InferResponse("m", "1", "", (Tensor("y", DataType.UINT8, (300_000,), data),)))
    assert any(piece is data for piece in pieces)
    assert size == sum(map(len, pieces))
    assert pb.ModelInferResponse.FromString(b"".join(pieces)).raw_output_contents == [bytes(data)]

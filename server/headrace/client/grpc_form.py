"""Calls as gRPC messages and messages as values, pure."""

import base64
from collections.abc import Mapping
from typing import Any, cast

import msgspec
import numpy as np
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from headrace.client.errors import InferenceError, InvalidRequestError, ProtocolError
from headrace.client.operations import Operation, Value
from headrace.client.result import InferResult, array_of, datatype_named
from headrace.core.errors import InvalidRequest
from headrace.core.request import InferRequest
from headrace.core.tensor import NUMPY_DTYPES, Array, DataType, pack_bytes
from headrace.wire import pb
from headrace.wire.grpc_v2 import decode_parameters, encode_parameters

_CONTENTS = (
    "bool_contents",
    "int_contents",
    "int64_contents",
    "uint_contents",
    "uint64_contents",
    "fp32_contents",
    "fp64_contents",
    "bytes_contents",
)


def encode_operation(operation: Operation[Any]) -> Message:
    """The message for anything but inference."""
    plain = {key: value for key, value in operation.fields.items() if key != "parameters"}
    try:
        message: Any = pb.RPCS[operation.rpc].request(**plain)
        for name, value in operation.fields.get("parameters", {}).items():
            field = {bool: "bool_param", str: "string_param", bytes: "bytes_param"}[type(value)]
            setattr(message.parameters[name], field, value)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(None, f"the request {operation.rpc} cannot be written: {error}") from error
    return cast("Message", message)


def encode_infer(request: InferRequest) -> pb.ModelInferRequest:
    """An inference request with raw contents."""
    try:
        message = pb.ModelInferRequest(model_name=request.model, model_version=request.version, id=request.id)
        encode_parameters(request.parameters, message.parameters)
        for tensor in request.inputs:
            message.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
            message.raw_input_contents.append(bytes(tensor.data))
        for output in request.outputs:
            encode_parameters(output.parameters, message.outputs.add(name=output.name).parameters)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(None, f"model '{request.model}': the request cannot be written: {error}") from error
    return message


def decode_operation(operation: Operation[Value], message: Message) -> Value:
    """The answer's value.

    Raises:
        ProtocolError: the message is not the answer to this operation.
    """
    value: Any = to_plain(message)
    if operation.rpc_key:
        value = value.get(operation.rpc_key, {})
    try:
        return cast("Value", msgspec.convert(value, operation.answer))
    except msgspec.ValidationError as error:
        raise ProtocolError(f"the answer to {operation.rpc} is not what the protocol says: {error}") from None


def decode_infer(message: Any) -> InferResult:
    """The result in a ModelInferResponse.

    Raises:
        ProtocolError: the message breaks the protocol.
    """
    raw = message.raw_output_contents
    if raw and len(raw) != len(message.outputs):
        raise ProtocolError(f"the answer has {len(raw)} raw_output_contents for {len(message.outputs)} outputs")
    outputs: dict[str, Array] = {}
    for index, output in enumerate(message.outputs):
        datatype = datatype_named(output.datatype, output.name)
        data = bytearray(raw[index]) if raw else _from_contents(output.contents, datatype, output.name)
        outputs[output.name] = array_of(data, datatype, tuple(output.shape), output.name)
    try:
        parameters = decode_parameters(message.parameters)
    except InvalidRequest as error:
        raise ProtocolError(f"the answer's {error}") from None
    return InferResult(message.model_name, message.model_version, message.id, parameters, outputs)


def decode_part(message: Any) -> InferResult:
    """The result in a ModelStreamInferResponse.

    Raises:
        InferenceError: it says that the request failed.
        ProtocolError: the message breaks the protocol.
    """
    if message.error_message:
        raise InferenceError(None, message.error_message)
    return decode_infer(message.infer_response)


def to_plain(message: Message) -> dict[str, Any]:
    """A message as the protocol's JSON has it: enums by name, bytes as base64, 64-bit integers as numbers.

    Messages that are not set are left out, as are the members of a oneof but the one that is.
    """
    held = {field.name for field, _ in message.ListFields()}
    plain: dict[str, Any] = {}
    fields: Any = message.DESCRIPTOR.fields  # of one class in protobuf's C, of another in its Python
    for field in fields:
        value = getattr(message, field.name)
        if field.name not in held and (isinstance(value, Message) or field.containing_oneof is not None):
            continue
        if isinstance(value, Message):
            plain[field.name] = to_plain(value)
        elif isinstance(value, Mapping):
            values = field.message_type.fields_by_name["value"]
            plain[field.name] = {str(key): _plain_value(values, one) for key, one in value.items()}
        elif isinstance(value, str | bytes | int | float):
            plain[field.name] = _plain_value(field, value)
        else:
            plain[field.name] = [_plain_value(field, one) for one in value]
    return plain


def _plain_value(field: Any, value: Any) -> Any:
    if isinstance(value, Message):
        return to_plain(value)
    if field.enum_type is not None:
        named = field.enum_type.values_by_number.get(value)
        return value if named is None else named.name
    if field.cpp_type == FieldDescriptor.CPPTYPE_FLOAT:
        return float(str(np.float32(value)))  # 0.1 rather than 0.10000000149011612
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value


def _from_contents(contents: Any, datatype: DataType, output: str) -> bytearray:
    """The raw form of typed contents, which some servers answer with."""
    values = next((held for name in _CONTENTS if (held := getattr(contents, name))), ())
    try:
        if datatype is DataType.BYTES:
            return bytearray(pack_bytes(list(values)))
        return bytearray(np.array(values, NUMPY_DTYPES[datatype]).tobytes())
    except (TypeError, ValueError, OverflowError) as error:
        raise ProtocolError(f"output '{output}' is {datatype}, but its contents are not: {error}") from None

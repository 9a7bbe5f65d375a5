"""Protobuf messages in the JSON form that Triton gives them."""

from collections.abc import Mapping
from typing import Any

from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message


def to_json(message: Message) -> dict[str, Any]:
    """A message in Triton's JSON form.

    That is protobuf's own, with the fields' names as in the source and those that hold nothing given too, but with
    64-bit integers as numbers.
    """
    plain = json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    _restore_integers(plain, message.DESCRIPTOR)
    return plain


def _restore_integers(plain: dict[str, Any], descriptor: Any) -> None:
    for field in descriptor.fields:
        if field.name not in plain:
            continue
        value = plain[field.name]
        held = field.message_type.fields_by_name["value"] if is_map(field) else field
        if held.message_type is not None:
            for one in value.values() if is_map(field) else value if isinstance(value, list) else (value,):
                _restore_integers(one, held.message_type)
        elif held.cpp_type in (FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64):
            plain[field.name] = _integers(value)


def _integers(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: int(one) for key, one in value.items()}
    return [int(one) for one in value] if isinstance(value, list) else int(value)


def is_map(field: Any) -> bool:  # protobuf's two implementations have two classes of fields
    """Whether a field of a message holds a map."""
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)

"""Message classes, enums and procedures out of a compiled descriptor set."""

from pathlib import Path
from typing import NamedTuple

from google.protobuf.descriptor import Descriptor, FileDescriptor, ServiceDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass


class Rpc(NamedTuple):
    """One procedure of a service."""

    request: type[Message]
    response: type[Message]
    client_streaming: bool
    server_streaming: bool


def load(path: Path) -> list[FileDescriptor]:
    """The files of a descriptor set, each after those that it imports.

    They live in a pool of their own: the default one belongs to the whole process, and tritonclient registers
    other definitions of the same names there.
    """
    pool = DescriptorPool()
    files = FileDescriptorSet.FromString(path.read_bytes()).file
    for file in files:
        pool.AddSerializedFile(file.SerializeToString())
    return [pool.FindFileByName(file.name) for file in files]


def types_of(file: FileDescriptor) -> dict[str, type[Message] | EnumTypeWrapper]:
    """A file's top-level messages and enums, by name."""
    messages = {name: _message_class(message) for name, message in file.message_types_by_name.items()}
    enums = {name: EnumTypeWrapper(enum) for name, enum in file.enum_types_by_name.items()}
    return {**messages, **enums}


def rpcs_of(service: ServiceDescriptor) -> dict[str, Rpc]:
    """A service's procedures, by name, in the order of its source."""
    return {
        method.name: Rpc(
            GetMessageClass(method.input_type),
            GetMessageClass(method.output_type),
            method.client_streaming,
            method.server_streaming,
        )
        for method in service.methods
    }


def _message_class(descriptor: Descriptor) -> type[Message]:
    message = GetMessageClass(descriptor)
    # protobuf's C implementation finds nested messages by itself; its pure Python one does not.
    for nested in descriptor.nested_types:
        if not hasattr(message, nested.name):
            setattr(message, nested.name, _message_class(nested))
    return message

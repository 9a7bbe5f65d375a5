"""What the front process asks of the copier, over their socket. Each frame is answered by one Answer, in order."""

import msgspec


class Open(msgspec.Struct, frozen=True, tag=1, array_like=True):
    """Open memory of a GPU by the handle of the process that allocated it; it is ``region`` from then on."""

    region: int
    device: int
    handle: bytes
    nbytes: int


class Close(msgspec.Struct, frozen=True, tag=2, array_like=True):
    """Let go of a region, if it is open."""

    region: int


class Read(msgspec.Struct, frozen=True, tag=3, array_like=True):
    """Copy a part of a region to the memory whose descriptor comes along."""

    region: int
    offset: int
    nbytes: int


class Write(msgspec.Struct, frozen=True, tag=4, array_like=True):
    """Copy the memory whose descriptor comes along to a part of a region."""

    region: int
    offset: int
    nbytes: int


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """It is done; or it is not, with a core.errors.Kind value and the reason. After NOT_READY there are no more."""

    kind: str = ""
    message: str = ""


ToCopier = Open | Close | Read | Write

encode = msgspec.msgpack.Encoder().encode
decode_to_copier = msgspec.msgpack.Decoder(ToCopier).decode
decode_answer = msgspec.msgpack.Decoder(Answer).decode

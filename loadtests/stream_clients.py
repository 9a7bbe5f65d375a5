"""Clients of one stream or sequence, over HTTP and gRPC, each of which checks every answer it gets."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np

from headrace.wire import pb
from loadtests.http_message import BadResponse, header_value
from loadtests.server import HOST

CLIENT_TIMEOUT_S = 300.0  # for one stream or sequence from its first byte to its last

_METHOD = f"/{pb.SERVICE}/ModelStreamInfer"

Arrive = Callable[[], Awaitable[None]]  # called after the first answer; returns when all clients have theirs


@dataclass(slots=True)
class Tally:
    """What came of one phase."""

    responses: int = 0
    errors: Counter[str] = field(default_factory=Counter)

    def expect(self, got: int, expected: int, what: str) -> None:
        """One response, which has to be this.

        Raises:
            BadResponse: it is not.
        """
        if got != expected:
            raise BadResponse(f"{what} is wrong")
        self.responses += 1


# ---- clients over HTTP, on plain sockets ----


async def _read_head(reader: asyncio.StreamReader) -> bytes:
    head = (await reader.readuntil(b"\r\n\r\n"))[:-4]
    if head[9:12] != b"200":
        raise BadResponse(f"status {head[9:12].decode()}: {(await reader.read(200)).decode(errors='replace')}")
    return head


async def events(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """The events of a chunked response, up to its end.

    Raises:
        BadResponse: an event is not a JSON object.
        IncompleteReadError: the connection broke before the end.
    """
    waiting = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        waiting += (await reader.readexactly(size + 2))[:-2]
        *whole, waiting = waiting.split(b"\n\n")
        for event in whole:
            if not event.startswith(b"data: "):
                raise BadResponse(f"an event is {event[:60]!r}, expected it to start with 'data: '")
            yield json.loads(event[len(b"data: ") :])
    await reader.readexactly(2)
    if waiting:
        raise BadResponse(f"the stream ends in the middle of an event: {waiting[:60]!r}")


def _post(path: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


async def http_stream(port: int, responses: int, arrive: Arrive, tally: Tally) -> None:
    """One stream of ``generate_stream``, on a connection of its own.

    Raises:
        BadResponse: an answer is wrong, an error or missing.
        OSError, IncompleteReadError: the connection broke.
    """
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        writer.write(_post("/v2/models/counter/generate_stream", {"count": responses}))
        await _read_head(reader)
        expected = 0
        async for event in events(reader):
            if "error" in event:
                raise BadResponse(str(event["error"]))
            tally.expect(event["index"], expected, "the index of an event")
            if not expected:
                await arrive()
            expected += 1
        if expected != responses:
            raise BadResponse(f"{expected} events came, expected {responses}")
    finally:
        writer.close()


def steps_of(sequence: int, steps: int) -> list[int]:
    """The numbers that a sequence sends: different in each, below zero too."""
    return [(sequence * 31 + step * 17) % 1999 - 999 for step in range(steps)]


async def http_sequence(port: int, sequence: int, steps: int, arrive: Arrive, tally: Tally) -> None:
    """One sequence, a request for each step, on a connection of its own.

    Raises:
        BadResponse: an answer is wrong or an error.
        OSError, IncompleteReadError: the connection broke.
    """
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        total = 0
        for step, number in enumerate(steps_of(sequence, steps)):
            tensor = {"name": "x", "datatype": "INT32", "shape": [1, 1], "data": [number]}
            flags = {"sequence_start": step == 0, "sequence_end": step == steps - 1}
            body = {"inputs": [tensor], "parameters": {"sequence_id": sequence, **flags}}
            writer.write(_post("/v2/models/adder/infer", body))
            length = int(header_value(await _read_head(reader), "content-length") or 0)
            answer = json.loads(await reader.readexactly(length))
            total += number
            tally.expect(answer["outputs"][0]["data"][0], total, "the sum of a sequence over HTTP")
            if not step:
                await arrive()
    finally:
        writer.close()


# ---- clients over gRPC ----


def _message(model: str, name: str, shape: Sequence[int], value: int) -> pb.ModelInferRequest:
    message = pb.ModelInferRequest(model_name=model, raw_input_contents=[np.int32(value).tobytes()])
    message.inputs.add(name=name, datatype="INT32", shape=shape)
    return message


async def _read(call: Any) -> int | None:
    """The number in the next response; None at the end."""
    answer = await call.read()
    if answer is grpc.aio.EOF:  # type: ignore[attr-defined]  # the stubs do not have it
        return None
    if answer.error_message:
        raise BadResponse(answer.error_message)
    return int(np.frombuffer(answer.infer_response.raw_output_contents[0], np.int32)[0])


def _call(channel: grpc.aio.Channel) -> Any:
    method: Any = channel.stream_stream(
        _METHOD, pb.ModelInferRequest.SerializeToString, pb.ModelStreamInferResponse.FromString
    )
    return method(timeout=CLIENT_TIMEOUT_S)


async def grpc_stream(channel: grpc.aio.Channel, responses: int, arrive: Arrive, tally: Tally) -> None:
    """One call of ``ModelStreamInfer`` with one request, which gets many responses.

    Raises:
        BadResponse: an answer is wrong, an error or missing.
        AioRpcError: the call failed.
    """
    call = _call(channel)
    try:
        await call.write(_message("counter", "count", [1], responses))
        await call.done_writing()
        for expected in range(responses):
            index = await _read(call)
            if index is None:
                raise BadResponse(f"{expected} responses came, expected {responses}")
            tally.expect(index, expected, "the index of a response")
            if not expected:
                await arrive()
        if await _read(call) is not None:
            raise BadResponse(f"more responses came, expected {responses}")
    finally:
        call.cancel()


async def grpc_sequence(channel: grpc.aio.Channel, sequence: int, steps: int, arrive: Arrive, tally: Tally) -> None:
    """One sequence, all of its steps in one call of ``ModelStreamInfer``.

    Raises:
        BadResponse: an answer is wrong, an error or missing.
        AioRpcError: the call failed.
    """
    call = _call(channel)
    try:
        total = 0
        for step, number in enumerate(steps_of(sequence, steps)):
            message = _message("adder", "x", [1, 1], number)
            message.parameters["sequence_id"].int64_param = sequence
            message.parameters["sequence_start"].bool_param = step == 0
            message.parameters["sequence_end"].bool_param = step == steps - 1
            await call.write(message)
            got = await _read(call)
            if got is None:
                raise BadResponse(f"the stream ended after {step} of {steps} steps")
            total += number
            tally.expect(got, total, "the sum of a sequence over gRPC")
            if not step:
                await arrive()
        await call.done_writing()
    finally:
        call.cancel()

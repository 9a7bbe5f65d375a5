"""A gRPC client for one request, made beforehand: bytes in and out, no protobuf objects."""

import asyncio
from collections.abc import Callable

import grpc

from loadtests.client import Done, LengthCheck
from loadtests.grpc_message import METHOD, check_response
from loadtests.http_message import BadResponse

# 1, 2 and 4 measured alike within noise; several, so that a server sees more than one connection.
MAX_CHANNELS = 4
_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),  # without it every channel would share one connection
)


class GrpcClient:
    """The client of one run over gRPC, as client.py wants it."""

    def __init__(
        self,
        host: str,
        port: int,
        request: bytes,
        slots: int,
        check: Callable[[bytes], object] = check_response,
    ) -> None:
        self._check_first = check
        self._address = f"{host}:{port}"
        self._request = request
        self._slots = slots
        self._channels: list[grpc.aio.Channel] = []
        self._calls: set[asyncio.Task[None]] = set()

    async def open(self, done: Done) -> None:
        """See Client."""
        for _ in range(min(self._slots, MAX_CHANNELS)):
            self._channels.append(grpc.aio.insecure_channel(self._address, options=_OPTIONS))
        self._infers = [channel.unary_unary(METHOD, None, None) for channel in self._channels]
        first = b""
        for infer in self._infers:
            try:
                first = await infer(self._request)
            except grpc.aio.AioRpcError as error:
                raise BadResponse(_refusal(error)) from error
        self._check_first(first)
        self._done = done
        self._check = LengthCheck(len(first), exact=True)

    def send(self, slot: int) -> None:
        """See Client."""
        task = asyncio.get_running_loop().create_task(self._exchange(slot))
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    async def close(self) -> None:
        """See Client."""
        calls = tuple(self._calls)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        for channel in self._channels:
            await channel.close(None)

    async def _exchange(self, slot: int) -> None:
        try:
            answer = await self._infers[slot % len(self._infers)](self._request)
        except grpc.aio.AioRpcError as error:
            problem: str | None = _refusal(error)
        else:
            problem = self._check.problem(len(answer))
        self._done(slot, problem)


def _refusal(error: grpc.aio.AioRpcError) -> str:
    return f"{error.code().name}: {(error.details() or '')[:160]}"

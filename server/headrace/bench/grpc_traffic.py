"""Clients over gRPC: a few connections for all, the message serialized beforehand, answers counted unread."""

import asyncio
from time import monotonic_ns

import grpc
import grpc.aio

from headrace.bench.tally import Tally
from headrace.bench.traffic import PROBLEM_CHARACTERS, Traffic
from headrace.client.address import Address
from headrace.wire import pb

_MOST_CHANNELS = 4  # as a few client processes would have; more measured alike
_RETRY_S = 0.05
_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),  # without it all channels would share one connection
    ("grpc.max_reconnect_backoff_ms", 1000),
)


class GrpcTraffic(Traffic):
    """Channels last for all steps."""

    def __init__(self, address: Address, message: bytes) -> None:
        self._address = address
        self._message = message
        self._channels: list[grpc.aio.Channel] = []

    async def run(self, clients: int, tally: Tally) -> None:
        """See Traffic."""
        while len(self._channels) < min(clients, _MOST_CHANNELS):
            self._channels.append(self._open())
        async with asyncio.TaskGroup() as group:
            for client in range(clients):
                group.create_task(self._client(self._channels[client % len(self._channels)], tally))

    async def close(self) -> None:
        """See Traffic."""
        for channel in self._channels:
            await channel.close(None)

    def _open(self) -> grpc.aio.Channel:
        if self._address.tls:
            return grpc.aio.secure_channel(self._address.target, grpc.ssl_channel_credentials(), options=_OPTIONS)
        return grpc.aio.insecure_channel(self._address.target, options=_OPTIONS)

    async def _client(self, channel: grpc.aio.Channel, tally: Tally) -> None:
        infer = channel.unary_unary(f"/{pb.SERVICE}/ModelInfer", None, None)  # no serializers: bytes in, bytes out
        go_on = True
        while go_on:
            started_ns = monotonic_ns()
            problem, unavailable = None, False
            try:
                await infer(self._message)
            except grpc.aio.AioRpcError as error:
                problem = f"{error.code().name}: {(error.details() or '')[:PROBLEM_CHARACTERS]}"
                unavailable = error.code() is grpc.StatusCode.UNAVAILABLE
            go_on = tally.add(started_ns, monotonic_ns(), problem)
            if go_on and unavailable:
                await asyncio.sleep(_RETRY_S)

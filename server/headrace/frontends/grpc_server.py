"""A listening gRPC port: procedures by their paths, a start and a drain."""

import asyncio
import logging
import socket
from collections.abc import Mapping, Sequence
from time import monotonic_ns
from typing import Any

from headrace.frontends.arrivals import Arrivals
from headrace.frontends.grpc_call import GrpcConnection, SimpleCall, Terms
from headrace.frontends.grpc_head import CallHead, Procedure, parse_head
from headrace.frontends.grpc_lane import InferCall, InferLane
from headrace.frontends.grpc_message import MAX_BYTES
from headrace.frontends.grpc_streaming_call import StreamingCall
from headrace.frontends.restrictions import Restrictions
from headrace.http2.connection import Connection
from headrace.http2.headers import Headers
from headrace.http2.stream import Stream
from headrace.wire import pb

log = logging.getLogger(__name__)

BACKLOG = 2048
POLL_S = 0.02
WATCH_INTERVAL_S = 1.0


class GrpcServer:
    """Serves procedures on one socket until it is drained. Inference goes by way of the ``lane``."""

    def __init__(
        self,
        services: Mapping[str, tuple[Any, Sequence[object]]],
        lane: InferLane,
        sock: socket.socket,
        max_bytes: int,
        arrivals: Arrivals,
        *,
        compression: str = "none",
        restrictions: Restrictions | None = None,
    ) -> None:
        """Make a server that is not started yet.

        ``services`` has, by the service's name, its RPCs and the objects that have methods of their names. Messages
        have up to ``max_bytes``, -1 for what the protocol has room for; requests that are not whole yet are counted
        among the ``arrivals``.
        """
        self._infer = Procedure("ModelInfer", lane.is_called, pb.ModelInferRequest)
        self._procedures = {
            f"/{service}/{procedure.name}".encode(): procedure
            for service, (rpcs, parts) in services.items()
            for procedure in _procedures(rpcs, parts)
        }
        self._procedures[f"/{pb.SERVICE}/ModelInfer".encode()] = self._infer
        self._leaving = [part.leave for _, parts in services.values() for part in parts if hasattr(part, "leave")]
        self._lane = lane
        self._sock = sock
        self._terms = Terms(
            max_bytes if 0 <= max_bytes < MAX_BYTES else MAX_BYTES,
            "" if compression == "none" else compression,
            arrivals,
        )
        self._restrictions = restrictions if restrictions is not None and restrictions.active else None
        self._connections: set[Connection[CallHead]] = set()
        self._server: asyncio.Server | None = None
        self._watch: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """The port that was bound."""
        port: int = self._sock.getsockname()[1]
        return port

    async def start(self) -> None:
        """Accept calls."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: Connection(self._accept, self._parse, self._connections), sock=self._sock, backlog=BACKLOG
        )
        self._watch = loop.create_task(self._keep_watch())

    async def drain(self, timeout_s: float) -> None:
        """Accept no more calls and finish those under way; what is left after ``timeout_s`` is told of the end."""
        if self._server is None:
            return
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        self._server.close()
        for leave in self._leaving:
            leave()
        for connection in list(self._connections):
            connection.leave()
        while self._connections and loop.time() < deadline:
            await asyncio.sleep(POLL_S)
        for connection in list(self._connections):
            connection.give_up()
        if self._connections:
            await asyncio.sleep(0.1)  # for the last answers to leave
        for connection in list(self._connections):
            connection.transport.abort()
        if self._watch is not None:
            self._watch.cancel()

    async def _keep_watch(self) -> None:
        """End calls that are past their deadlines, whatever it is that they wait for.

        Inference in the queue has a timer there, and calls with a task have their own; this one is for requests that
        do not arrive and for responses that are not taken.
        """
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            now_ns = monotonic_ns()
            for connection in list(self._connections):
                try:
                    connection.check_time(now_ns)
                except Exception:
                    log.exception("the deadlines of a gRPC connection could not be checked")

    def _parse(self, headers: Headers) -> CallHead:
        return parse_head(headers, self._procedures, self._restrictions)

    def _accept(self, connection: GrpcConnection, stream_id: int, head: CallHead, ended: bool) -> Stream:
        procedure = head.procedure
        if procedure is self._infer:
            call: InferCall | SimpleCall | StreamingCall = InferCall(
                connection, stream_id, head, self._terms, self._lane
            )
        elif procedure is None or not procedure.client_streaming:
            call = SimpleCall(connection, stream_id, head, self._terms)
        else:
            call = StreamingCall(connection, stream_id, head, self._terms)
        if procedure is None or head.refusal is not None or head.http_status != 200:
            call.remote_ended = ended
            call.refuse()
        elif isinstance(call, StreamingCall):
            call.run()
        return call


def _procedures(rpcs: Mapping[str, Any], parts: Sequence[object]) -> list[Procedure]:
    """The RPCs that one of ``parts`` has a method for; the others are answered with UNIMPLEMENTED."""
    found = []
    for name, rpc in rpcs.items():
        method = next((getattr(part, name) for part in parts if hasattr(part, name)), None)
        if method is not None:
            found.append(Procedure(name, method, rpc.request, rpc.client_streaming, rpc.server_streaming))
    return found

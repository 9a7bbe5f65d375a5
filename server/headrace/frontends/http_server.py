"""A listening HTTP port: uvicorn's protocol and application stack, with a start and a drain of our own."""

import asyncio
import contextlib
import ctypes
import socket
import struct
from typing import Any

import uvicorn
from uvicorn.server import ServerState

KEEP_ALIVE_S = 75  # clients keep idle connections for a minute; closing first would reset their next request
IDLE_GRACE_S = 0.5  # while draining: how long an idle connection may still bring a request
WATCH_INTERVAL_S = 1.0
BACKLOG = 2048
_SO_ATTACH_FILTER = 26
_BPF_RETURN = 0x06


def bind(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        OSError: the port is taken, or the address is not this machine's.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    sock.setblocking(False)
    return sock


class HttpServer:
    """Serves one application on one socket until it is drained."""

    def __init__(self, app: Any, sock: socket.socket, protocol: type[asyncio.Protocol], read_timeout_s: float) -> None:
        self._config = uvicorn.Config(
            app,
            http=protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            proxy_headers=False,
        )
        self._sock = sock
        self._read_timeout_s = read_timeout_s
        self._state = ServerState()
        self._server: asyncio.Server | None = None
        self._watch: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """The port that was bound."""
        port: int = self._sock.getsockname()[1]
        return port

    async def start(self) -> None:
        """Accept connections."""
        loop = asyncio.get_running_loop()
        self._config.load()

        def protocol() -> asyncio.Protocol:
            made: asyncio.Protocol = self._config.http_protocol_class(  # type: ignore[call-arg] # as uvicorn's server calls it
                config=self._config, server_state=self._state, app_state={}, _loop=loop
            )
            return made

        self._server = await loop.create_server(protocol, sock=self._sock, backlog=BACKLOG)
        self._watch = loop.create_task(self._keep_watch())

    async def drain(self, timeout_s: float) -> None:
        """Accept no more connections; answer what is under way and close each connection behind its answer."""
        if self._server is None:
            return
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        self._tell_connections()
        await self._stop_listening(self._server)
        self._tell_connections()  # those that were accepted meanwhile too
        grace_ends = min(deadline, loop.time() + IDLE_GRACE_S)
        while self._state.connections and loop.time() < grace_ends:
            await asyncio.sleep(0.02)
        while self._state.connections and loop.time() < deadline:
            for connection in self._connections():
                connection.close_if_idle()
            await asyncio.sleep(0.02)
        for connection in self._connections():
            connection.give_up()
        if self._state.connections:
            await asyncio.sleep(0.1)  # for the last answers to leave
        for connection in self._connections():
            connection.transport.abort()
        if self._watch is not None:
            self._watch.cancel()

    async def _stop_listening(self, server: asyncio.Server) -> None:
        """Close the listener without resetting a connection that the kernel has accepted and this process has not.

        A filter that lets nothing through makes the kernel accept no more; what it had accepted is taken then.
        """
        program = ctypes.create_string_buffer(struct.pack("HBBI", _BPF_RETURN, 0, 0, 0))
        with contextlib.suppress(OSError):
            self._sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HL", 1, ctypes.addressof(program)))
        await asyncio.sleep(0.05)
        server.close()

    def _tell_connections(self) -> None:
        """What is answered from now on says that it is the last answer."""
        for connection in self._connections():
            connection.shutdown()

    def _connections(self) -> list[Any]:
        return list(self._state.connections)

    async def _keep_watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            now = loop.time()
            for connection in self._connections():
                connection.check_time(now, self._read_timeout_s)

"""The servers that the conformance tests talk to, and the front ends to send cases through."""

import threading

import echo_repository
import grpc
import pytest
from fronts import UNLIMITED, Answer, Call, GrpcFront, HttpFront
from running_server import RunningServer

FRONTS = ("lane_binary", "lane_json", "route_binary", "route_json", "grpc_raw", "grpc_typed")
MAX_REQUEST_BYTES = 4 * 1024 * 1024


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory):
    """A server whose models may be loaded and unloaded by request."""
    repository = echo_repository.write(tmp_path_factory.mktemp("conformance"))
    flags = ["--model-control", "explicit", "--load-model", "*", "--max-request-bytes", str(MAX_REQUEST_BYTES)]
    with RunningServer(repository, *flags, "--max-own-workers", "4", "--max-shared-workers", "2") as running:
        yield running


@pytest.fixture(scope="session")
def channel(server: RunningServer):
    """A gRPC channel to it."""
    with grpc.insecure_channel(server.grpc, options=UNLIMITED) as opened:
        yield opened


class Fronts:
    """Every front end of the server, by name; one connection for each thread."""

    def __init__(self, server: RunningServer) -> None:
        self._server = server
        self._mine = threading.local()
        self._all: list[HttpFront | GrpcFront] = []

    def open(self, name: str) -> HttpFront | GrpcFront:
        """This thread's connection to a front end."""
        mine = self._mine.__dict__
        if name not in mine:
            way, _, form = name.partition("_")
            if way == "grpc":
                mine[name] = GrpcFront(self._server.grpc, raw=form == "raw")
            else:
                mine[name] = HttpFront(self._server.http, binary=form == "binary", ordinary=way == "route")
            self._all.append(mine[name])
        return mine[name]

    def infer(self, name: str, call: Call) -> Answer:
        """Send a case over this thread's connection."""
        return self.open(name).infer(call)

    def close(self) -> None:
        for front in self._all:
            front.close()


@pytest.fixture(scope="session")
def fronts(server: RunningServer):
    """Every front end of the server, by name."""
    made = Fronts(server)
    yield made
    made.close()


@pytest.fixture(params=FRONTS)
def front(request: pytest.FixtureRequest, fronts: Fronts):
    """One front end after the other."""
    return fronts.open(request.param)

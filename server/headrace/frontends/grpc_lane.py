"""The fast lane of gRPC: ModelInfer is read, queued and answered by callback, without a task or a message object.

The same conformance cases run over it as over every other way in.
"""

import asyncio
import logging

from headrace.core.errors import HeadraceError, InternalError, released
from headrace.core.request import InferRequest, InferResponse
from headrace.engine import Engine
from headrace.frontends.device_tensors import DeviceTensors
from headrace.frontends.grpc_call import GrpcConnection, Terms, UnaryCall
from headrace.frontends.grpc_head import CallHead
from headrace.frontends.grpc_infer import GrpcInfer

log = logging.getLogger(__name__)


class InferLane:
    """What every inference call is answered with. One for a server."""

    def __init__(self, engine: Engine, reader: GrpcInfer, device_tensors: DeviceTensors | None = None) -> None:
        self.runs = device_tensors or engine
        self.reader = reader

    async def is_called(self, _: object, __: object) -> None:
        """Never called: it fills ModelInfer's place in the table of procedures, and an ``InferCall`` answers itself."""
        raise AssertionError("an InferCall answers itself")


class InferCall(UnaryCall):
    """One ModelInfer call."""

    __slots__ = ("_asked", "_lane")

    def __init__(
        self, connection: GrpcConnection, stream_id: int, head: CallHead, terms: Terms, lane: InferLane
    ) -> None:
        super().__init__(connection, stream_id, head, terms)
        self._lane = lane
        self._asked: InferRequest | None = None

    def answer(self, data: bytes, start: int) -> None:
        """Run the model on the request's inputs."""
        lane = self._lane
        try:
            self._asked, _ = lane.reader.decode(data, start, self.deadline_ns, self.head.metadata)
            future = self._work = lane.runs.infer(self._asked)
        except HeadraceError as error:
            self.fail(error)
        except Exception:
            log.exception("could not read a gRPC request")
            self.fail(InternalError("the request could not be read; the server's log says why"))
        else:
            future.add_done_callback(self._on_done)

    def _on_done(self, future: asyncio.Future[InferResponse]) -> None:
        if future.cancelled():
            return
        error = future.exception()  # asked for in any case: one that nobody asks for is logged
        if self.over:
            return
        asked = self._asked
        assert asked is not None, "what was not asked is not answered"
        if error is None:
            try:
                self.respond(*self._lane.reader.encode(future.result(), asked))
            except HeadraceError as refusal:
                error = released(refusal)
            except Exception:
                log.exception("could not write the response of model %s", asked.model)
                error = InternalError("the response could not be written; the server's log says why")
            else:
                return
        if not isinstance(error, HeadraceError):
            log.error("model %s", asked.model, exc_info=error)
            error = InternalError("the request failed; the server's log says why")
        self.fail(error)

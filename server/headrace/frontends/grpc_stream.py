"""ModelStreamInfer: many requests on one stream, each answered when its responses are made."""

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from headrace.batching.response_stream import ResponseStream
from headrace.core.errors import HeadraceError, InternalError, NotReady, released
from headrace.core.request import InferRequest, InferResponse
from headrace.engine import Engine
from headrace.frontends.device_tensors import DeviceTensors
from headrace.frontends.grpc_infer import GrpcInfer, request_id
from headrace.frontends.grpc_streaming_call import StreamingCall
from headrace.wire import pb

log = logging.getLogger(__name__)

MAX_UNANSWERED = 1024  # requests of one stream; it is not read on before some are answered
ERRORS_AS_STATUS = "triton_grpc_error"
FINAL = "triton_final_response"


class StreamService:
    """The RPC ModelStreamInfer of inference.GRPCInferenceService."""

    def __init__(self, engine: Engine, reader: GrpcInfer, device_tensors: DeviceTensors | None = None) -> None:
        self._engine = engine
        self._reader = reader
        self._device_tensors = device_tensors
        self._open: set[_Conversation] = set()
        self._leaving = False

    async def ModelStreamInfer(self, requests: AsyncIterator[bytes], call: StreamingCall) -> None:  # noqa: N802 - the protocol's name
        """Answer every request of the stream; responses of different requests come as they are made."""
        conversation = _Conversation(self._engine, self._reader, self._device_tensors, call)
        self._open.add(conversation)
        if self._leaving:
            conversation.leave()
        try:
            await conversation.serve(requests)
        finally:
            self._open.discard(conversation)
            conversation.close()
        if conversation.failure is not None:
            call.fail(conversation.failure)  # raised it would refer to the conversation, which has it

    def leave(self) -> None:
        """The server stops: end each stream as soon as everything on it is answered."""
        self._leaving = True
        for conversation in self._open:
            conversation.leave()


class _Conversation:
    """One stream."""

    def __init__(
        self, engine: Engine, reader: GrpcInfer, device_tensors: DeviceTensors | None, call: StreamingCall
    ) -> None:
        self.failure: HeadraceError | None = None  # that ends the stream
        self._engine = engine
        self._reader = reader
        self._device_tensors = device_tensors
        self._call = call
        self._metadata = tuple(call.metadata)
        self._errors_end_it = (ERRORS_AS_STATUS, "true") in self._metadata
        self._leaving = False
        self._fetching = False  # a request that was read and is not accepted yet
        self._writing = asyncio.Lock()
        self._room = asyncio.Semaphore(MAX_UNANSWERED)
        self._answering: set[asyncio.Task[None]] = set()
        self._failed = asyncio.Event()

    def leave(self) -> None:
        """End the stream as soon as everything on it is answered."""
        self._leaving = True
        if not self._answering and not self._fetching:
            self._fail(NotReady("the server is stopping"))

    async def serve(self, requests: AsyncIterator[bytes]) -> None:
        """Return when the client has said all and everything is answered, or when the stream has failed."""
        reading = asyncio.get_running_loop().create_task(self._read(requests))
        failed = asyncio.get_running_loop().create_task(self._failed.wait())
        try:
            await asyncio.wait({reading, failed}, return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                reading.result()
            while self._answering and not failed.done():
                await asyncio.wait({*self._answering, failed}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            reading.cancel()
            failed.cancel()

    def close(self) -> None:
        """Take back what is not answered."""
        for task in self._answering:
            task.cancel()

    async def _read(self, requests: AsyncIterator[bytes]) -> None:
        async for data in requests:
            await self._room.acquire()
            # Accepted here, in the order of the stream: the requests of a sequence must not overtake each other.
            try:
                asked, final = self._reader.decode(data, 0, 0, self._metadata)
                if asked.to_fetch:
                    asked = await self._fetched(asked)
                stream = self._engine.stream(asked)
            except HeadraceError as error:
                self._start(self._refuse(error, request_id(data)))
            except Exception:
                log.exception("ModelStreamInfer could not read a request")
                ours = InternalError("the request could not be read; the server's log says why")
                self._start(self._refuse(ours, request_id(data)))
            else:
                task = self._start(self._answer(stream, asked, final))
                # Not in the task: one that is cancelled before its first step never comes to its end.
                task.add_done_callback(lambda _, stream=stream: stream.cancel())  # type: ignore[misc] # bound now

    async def _fetched(self, asked: InferRequest) -> InferRequest:
        assert self._device_tensors is not None, "without them there is nothing to fetch"
        self._fetching = True
        try:
            return await self._device_tensors.fetched(asked)
        finally:
            self._fetching = False

    def _start(self, answer: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(answer)
        self._answering.add(task)
        task.add_done_callback(self._on_answered)
        return task

    def _on_answered(self, task: asyncio.Task[None]) -> None:
        self._answering.discard(task)
        self._room.release()
        if not task.cancelled() and task.exception() is not None:
            log.debug("a response could not be sent", exc_info=task.exception())
        if self._leaving and not self._answering and not self._fetching:
            self._fail(NotReady("the server is stopping"))

    def _fail(self, error: HeadraceError) -> None:
        if self.failure is None:
            self.failure = released(error)
            self._failed.set()

    async def _answer(self, stream: ResponseStream, asked: InferRequest, final: bool) -> None:
        async for item in stream:
            if isinstance(item, InferResponse):
                await self._respond(item, asked, is_final=not stream.decoupled)
            else:
                await self._refuse(item, asked.id)
        if stream.decoupled and final:
            last = pb.ModelInferResponse(model_name=asked.model, model_version=asked.version, id=asked.id)
            last.parameters[FINAL].bool_param = True
            await self._write(pb.ModelStreamInferResponse(infer_response=last))

    async def _respond(self, response: InferResponse, asked: InferRequest, *, is_final: bool) -> None:
        try:
            if self._device_tensors is not None:
                response = await self._device_tensors.delivered(response, asked)
            message = self._reader.message(response, asked)
        except HeadraceError as error:
            await self._refuse(error, asked.id)
            return
        except Exception:
            log.exception("ModelStreamInfer could not write a response of model %s", asked.model)
            ours = InternalError("the response could not be written; the server's log says why")
            await self._refuse(ours, asked.id)
            return
        message.parameters[FINAL].bool_param = is_final
        await self._write(pb.ModelStreamInferResponse(infer_response=message))

    async def _refuse(self, error: HeadraceError, request_id: str) -> None:
        if self._errors_end_it:
            self._fail(error)
            return
        message = pb.ModelStreamInferResponse(error_message=str(error))
        message.infer_response.id = request_id
        await self._write(message)

    async def _write(self, message: Any) -> None:
        async with self._writing:
            if not self._failed.is_set():
                await self._call.write(message)

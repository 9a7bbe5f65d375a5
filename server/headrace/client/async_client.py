"""The client for asyncio: the same calls, awaited."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self

from headrace.client import operations
from headrace.client.answers import IndexEntry, ModelMetadata, ModelStatistics, ServerMetadata
from headrace.client.errors import DeadlineError, InvalidRequestError
from headrace.client.request import Inputs, Outputs, Sequence, build_request
from headrace.client.result import InferResult
from headrace.client.session import (
    DEFAULT_LOAD_TIMEOUT_S,
    DEFAULT_MAX_ANSWER_BYTES,
    DEFAULT_MAX_CONNECTIONS,
    DEFAULT_TIMEOUT_S,
    NOT_READY,
    POLL_S,
    Session,
    health_operation,
    models_of,
    not_ready_message,
)
from headrace.client.tensors import needs_metadata
from headrace.client.terms import Terms
from headrace.client.transport import open_async_transport
from headrace.core.request import Parameter


class AsyncClient:
    """As ``Client``, for the tasks of one event loop. A call whose task is cancelled takes its request back.

    ``url`` is http://HOST:PORT, https://..., grpc://HOST:PORT or grpcs://...; HOST:PORT alone is HTTP. ``timeout_s``
    is for every call that has none of its own, None for no limit; ``headers`` go with every call. No call is ever
    sent twice. Every method raises a ClientError when it fails, and nothing else.

    Over HTTP up to ``max_connections`` calls run at a time, and others wait for their turn.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
        headers: Mapping[str, str] | None = None,
        max_connections: int = DEFAULT_MAX_CONNECTIONS,
        max_answer_bytes: int = DEFAULT_MAX_ANSWER_BYTES,
    ) -> None:
        self._session = Session(url, timeout_s, headers, max_connections, max_answer_bytes)
        self._transport = open_async_transport(self._session.address, self._session.limits)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End every connection. Calls that other tasks still wait for may be broken off."""
        if not self._session.closed:
            self._session.closed = True
            await self._transport.close()

    async def infer(
        self,
        model: str,
        inputs: Inputs,
        *,
        outputs: Outputs = (),
        version: str = "",
        id: str = "",  # noqa: A002 - the protocol's name
        parameters: Mapping[str, Parameter] | None = None,
        timeout_s: float | None = None,
        sequence: Sequence | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> InferResult:
        """Run a model on ``inputs``, by name: arrays as they are, lists and scalars as the model declares the input.

        ``outputs`` are the names of those wanted, all of them unless given, or a dict of their parameters by name.
        ``timeout_s`` bounds the whole call, and the server drops the request when it is over.
        """
        terms = self._session.terms(timeout_s, headers)
        metadata = await self._metadata_for(model, version, inputs, terms)
        request = build_request(
            model, inputs, metadata, outputs=outputs, version=version, id=id, parameters=parameters, sequence=sequence
        )
        try:
            return await self._transport.infer(request, terms)
        except InvalidRequestError:
            self._session.forget(model)  # what is remembered of the model may be why
            raise

    async def stream(
        self,
        model: str,
        inputs: Inputs,
        *,
        outputs: Outputs = (),
        version: str = "",
        id: str = "",  # noqa: A002
        parameters: Mapping[str, Parameter] | None = None,
        timeout_s: float | None = None,
        sequence: Sequence | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncGenerator[InferResult, None]:
        """As ``infer``, for a model that answers in parts: each as it comes.

        ``timeout_s`` bounds the whole stream, which may take any time unless it is given. A caller that stops early
        cancels the request; ``contextlib.aclosing`` around the stream does so at once.
        """
        terms = self._session.terms(timeout_s, headers, whole_stream=True)
        metadata = await self._metadata_for(model, version, inputs, terms)
        request = build_request(
            model, inputs, metadata, outputs=outputs, version=version, id=id, parameters=parameters, sequence=sequence
        )
        try:
            async with aclosing(self._transport.stream(request, terms)) as parts:
                async for part in parts:
                    yield part
        except InvalidRequestError:
            self._session.forget(model)
            raise

    async def is_live(self) -> bool:
        """Whether the server answers at all; False also where nothing listens."""
        try:
            return (await self._transport.call(operations.server_live(), self._session.terms())).live
        except NOT_READY:
            return False

    async def is_ready(self, model: str | None = None, version: str = "") -> bool:
        """Whether the server, or one of its models, takes requests now; False also where nothing listens."""
        try:
            return (await self._transport.call(health_operation(model, version), self._session.terms())).ready
        except NOT_READY:
            return False

    async def wait_until_ready(self, timeout_s: float = 30.0, model: str | None = None, version: str = "") -> None:
        """Return when the server, or one of its models, takes requests.

        Raises:
            DeadlineError: it did not within ``timeout_s``; the message has the last reason.
        """
        terms = self._session.terms(timeout_s)
        reason: Exception | None = None
        while not terms.over:
            try:
                if (await self._transport.call(health_operation(model, version), terms)).ready:
                    return
            except NOT_READY as error:
                reason = reason if isinstance(error, DeadlineError) else error
            await asyncio.sleep(min(POLL_S, terms.remaining_s or POLL_S))
        raise DeadlineError(None, not_ready_message(self._session.address.url, model, timeout_s, reason))

    async def server(self) -> ServerMetadata:
        """The server's name and version, and the extensions of the protocol that it offers."""
        return await self._transport.call(operations.server_metadata(), self._session.terms())

    async def models(self) -> list[str]:
        """The names of all models in the server's repository, ready or not."""
        return models_of(await self.index())

    async def metadata(self, model: str, version: str = "") -> ModelMetadata:
        """A model's versions, inputs and outputs."""
        return await self._transport.call(operations.model_metadata(model, version), self._session.terms())

    async def config(self, model: str, version: str = "") -> dict[str, Any]:
        """A model's configuration, in the form of Triton's."""
        return await self._transport.call(operations.model_config(model, version), self._session.terms())

    async def statistics(self, model: str = "", version: str = "") -> tuple[ModelStatistics, ...]:
        """What happened to each version of a model, or of all models."""
        return await self._transport.call(operations.statistics(model, version), self._session.terms())

    async def index(self, *, ready: bool = False) -> tuple[IndexEntry, ...]:
        """Every version in the server's repository and its state, or only those that are ready."""
        return await self._transport.call(operations.index(ready), self._session.terms())

    async def load(
        self,
        model: str,
        config: Mapping[str, Any] | str | None = None,
        files: Mapping[str, bytes] | None = None,
        *,
        timeout_s: float = DEFAULT_LOAD_TIMEOUT_S,
    ) -> None:
        """Load a model, or reload it when its files have changed.

        With ``config`` it is loaded with that instead of its own, and with ``files``, by path as ``1/model.onnx``,
        from these alone.
        """
        self._session.forget(model)
        await self._transport.call(operations.load(model, config, files), self._session.terms(timeout_s))

    async def unload(
        self, model: str, *, unload_dependents: bool = False, timeout_s: float = DEFAULT_LOAD_TIMEOUT_S
    ) -> None:
        """Stop serving a model, and with ``unload_dependents`` those that only it uses."""
        self._session.forget(model)
        await self._transport.call(operations.unload(model, unload_dependents), self._session.terms(timeout_s))

    async def _metadata_for(self, model: str, version: str, inputs: Inputs, terms: Terms) -> ModelMetadata | None:
        """What the inputs need to be made into tensors."""
        if not needs_metadata(inputs):
            return None
        metadata = self._session.known(model, version)
        if metadata is None:
            metadata = await self._transport.call(operations.model_metadata(model, version), terms)
            self._session.keep(model, version, metadata)
        return metadata

"""A request with more rows than one batch may have: its parts run as requests of their own."""

import asyncio
from collections.abc import Sequence
from time import monotonic_ns

from headrace.batching.pending import Pending, count_failure
from headrace.core.errors import InternalError
from headrace.core.request import InferRequest, InferResponse
from headrace.core.rows import join_rows
from headrace.core.statistics import Statistics


class SplitRequest:
    """Joins the answers of ``parts``, which must have no statistics of their own, into ``future``.

    The first part that fails fails the whole, and the others are taken back. So are all of them when the future
    is cancelled.
    """

    def __init__(self, request: InferRequest, version: str, parts: Sequence[Pending], statistics: Statistics) -> None:
        self.future: asyncio.Future[InferResponse] = parts[0].future.get_loop().create_future()
        self._request = request
        self._version = version
        self._parts = parts
        self._statistics = statistics
        self._started_ns = monotonic_ns()
        self._missing = len(parts)
        for part in parts:
            part.future.add_done_callback(self._on_part)
        self.future.add_done_callback(self._on_whole)

    def _on_part(self, part: asyncio.Future[InferResponse]) -> None:
        self._missing -= 1
        error = None if part.cancelled() else part.exception()
        if self.future.done():
            return
        if part.cancelled():
            self.future.cancel()
        elif error is not None:
            count_failure(self._statistics, error, monotonic_ns() - self._started_ns)
            self.future.set_exception(error)
        elif not self._missing:
            self._join()

    def _join(self) -> None:
        try:
            outputs = join_rows(
                [part.future.result().outputs for part in self._parts], [part.rows for part in self._parts]
            )
        except InternalError as error:
            count_failure(self._statistics, error, monotonic_ns() - self._started_ns)
            self.future.set_exception(InternalError(f"model '{self._request.model}': {error}"))
            return
        queue_ns = min(part.taken_at_ns for part in self._parts) - self._started_ns
        self._statistics.succeeded(monotonic_ns() - self._started_ns, max(0, queue_ns))
        self.future.set_result(InferResponse(self._request.model, self._version, self._request.id, outputs))

    def _on_whole(self, whole: asyncio.Future[InferResponse]) -> None:
        if whole.cancelled():
            self._statistics.failed("CANCELED", monotonic_ns() - self._started_ns)
        for part in self._parts:
            part.future.cancel()

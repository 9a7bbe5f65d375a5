"""Answers that need not be computed: looked for in the response cache before a request is run, and kept there."""

import asyncio
from collections.abc import Callable
from time import monotonic_ns

from headrace.core.request import InferRequest, InferResponse
from headrace.core.validation import ModelInputs
from headrace.repository.repository import Repository, Served
from headrace.repository.served_ensemble import ServedEnsemble
from headrace.response_cache import Cache, Outputs, cache_key

Answer = asyncio.Future[InferResponse]


class CachedAnswers:
    """``run`` computes what is not found; it raises at once for what cannot be accepted.

    ``ask`` takes a request as if it came now: a version may end while the cache is asked, and would run nothing more.
    What belongs to a version that has ended is forgotten.
    """

    def __init__(
        self,
        cache: Cache,
        repository: Repository,
        run: Callable[[Served, InferRequest, ModelInputs], Answer],
        ask: Callable[[InferRequest], Answer],
    ) -> None:
        self._cache = cache
        self._repository = repository
        self._run = run
        self._ask = ask
        self._loop = asyncio.get_running_loop()
        repository.on_retired = lambda served: cache.forget(served.folder.name, self._identity(served))

    def infer(self, served: Served, request: InferRequest, inputs: ModelInputs) -> Answer:
        """The answer to a request that was checked.

        Raises:
            HeadraceError: it is not in the cache, and cannot be accepted.
        """
        started_ns = monotonic_ns()
        identity = self._identity(served)
        key = cache_key(request.model, identity, inputs.tensors, request.outputs, request.parameters)
        found = self._cache.get(key)
        if found is None:
            return self._run_and_keep(key, identity, served, request, inputs, monotonic_ns() - started_ns)
        if isinstance(found, tuple):
            future: Answer = self._loop.create_future()
            future.set_result(_from_cache(served, request, found, started_ns))
            return future

        async def look_elsewhere() -> InferResponse:
            outputs = await found
            if outputs is not None:
                return _from_cache(served, request, outputs, started_ns)
            if self._repository.find(request.model, request.version) is not served:
                return await self._ask(request)
            return await self._run_and_keep(key, identity, served, request, inputs, monotonic_ns() - started_ns)

        return self._loop.create_task(look_elsewhere())

    def _identity(self, served: Served) -> str:
        """What changes when the same request may have another answer."""
        identity = served.identity
        if isinstance(served, ServedEnsemble):
            parts = [self._repository.find(*planned.step.part) for planned in served.plan.steps]
            identity = "|".join([identity, *(self._identity(part) for part in parts if part is not None)])
        return identity

    def _run_and_keep(
        self,
        key: bytes,
        identity: str,
        served: Served,
        request: InferRequest,
        inputs: ModelInputs,
        lookup_ns: int,
    ) -> Answer:
        future = self._run(served, request, inputs)

        def keep(done: Answer) -> None:
            started_ns = monotonic_ns()
            answered = not done.cancelled() and done.exception() is None and not done.result().parameters
            # A model of an ensemble may have been replaced meanwhile: then it is not known whose answer this is.
            if answered and self._identity(served) == identity:
                self._cache.put(key, done.result().outputs)
            served.statistics.cache_miss(lookup_ns + monotonic_ns() - started_ns)

        future.add_done_callback(keep)
        return future


def _from_cache(served: Served, request: InferRequest, outputs: Outputs, started_ns: int) -> InferResponse:
    served.statistics.cache_hit(monotonic_ns() - started_ns)
    return InferResponse(request.model, served.version, request.id, outputs)

"""One protocol's steps, one number of clients after the other: a thin shell around ``knee.py`` and ``tally.py``."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from headrace.bench.knee import Point, next_clients
from headrace.bench.tally import Latencies, Tally
from headrace.bench.traffic import Traffic
from headrace.client.answers import ModelStatistics
from headrace.client.async_client import AsyncClient
from headrace.client.errors import ClientError

_LONGER = 3  # a window in which nothing was answered is tried again so much longer, once


@dataclass(frozen=True, slots=True)
class Limits:
    """How long things may take, in seconds. ``all_s`` is for one protocol; the step under way then still ends."""

    warmup_s: float
    window_s: float
    answer_s: float
    all_s: float


@dataclass(frozen=True, slots=True)
class Step:
    """What so many clients saw. ``batch_rows`` is None where the server does not tell."""

    clients: int
    requests_per_s: float
    latencies: Latencies | None
    batch_rows: float | None
    client_cpu_share: float
    errors: Counter[str] = field(default_factory=Counter)

    @property
    def point(self) -> Point:
        """What the knee is found from."""
        return Point(self.clients, self.requests_per_s)


class Sweep:
    """Drives one model over one protocol. ``client`` asks for statistics, between steps only."""

    def __init__(
        self,
        traffic: Traffic,
        client: AsyncClient,
        model: str,
        version: str,
        limits: Limits,
        told: Callable[[int], None],
    ) -> None:
        self._traffic = traffic
        self._client = client
        self._model = model
        self._version = version
        self._limits = limits
        self._told = told  # of the number of clients that begin

    async def run(self, clients: Sequence[int], most: int) -> tuple[list[Step], bool]:
        """The steps, and whether time was up before all were made: those given, or else as many as find the knee."""
        ends_at = time.monotonic() + self._limits.all_s
        steps: list[Step] = []
        waiting = list(clients)
        while (count := self._next(steps, waiting, most, fixed=bool(clients))) is not None:
            if steps and time.monotonic() >= ends_at:
                return steps, True
            self._told(count)
            step = await self._step(count, self._limits.window_s)
            if not step.requests_per_s and not step.errors:  # each answer takes longer than the window
                step = await self._step(count, self._limits.window_s * _LONGER)
            steps.append(step)
        return steps, False

    @staticmethod
    def _next(steps: Sequence[Step], waiting: list[int], most: int, *, fixed: bool) -> int | None:
        if fixed:
            return waiting.pop(0) if waiting else None
        return next_clients([step.point for step in steps], most)

    async def _step(self, clients: int, window_s: float) -> Step:
        before = await self._executed()
        now_ns = time.monotonic_ns()
        from_ns = now_ns + int(self._limits.warmup_s * 1e9)
        tally = Tally(from_ns, from_ns + int(window_s * 1e9))
        window = asyncio.create_task(_client_cpu_share(tally))
        try:
            async with asyncio.timeout(self._limits.warmup_s + window_s + self._limits.answer_s):
                await self._traffic.run(clients, tally)
        except TimeoutError:
            tally.fail(f"no answer within {self._limits.answer_s:g} s")
        share = await window
        after = await self._executed()
        return Step(clients, tally.requests_per_s, tally.latencies(), _mean(before, after), share, tally.errors)

    async def _executed(self) -> tuple[int, int] | None:
        """Rows and batches so far, over all versions or the one that is asked; None where the server does not tell."""
        try:
            found: Sequence[ModelStatistics] = await self._client.statistics(self._model, self._version)
        except ClientError:
            return None
        return sum(one.inference_count for one in found), sum(one.execution_count for one in found)


def _mean(before: tuple[int, int] | None, after: tuple[int, int] | None) -> float | None:
    if before is None or after is None or after[1] <= before[1]:
        return None
    return (after[0] - before[0]) / (after[1] - before[1])


async def _client_cpu_share(tally: Tally) -> float:
    """Of one core, within the window. Where this nears 1, the numbers are the client's and not the server's."""
    await asyncio.sleep((tally.from_ns - time.monotonic_ns()) / 1e9)
    cpu_ns, at_ns = time.process_time_ns(), time.monotonic_ns()
    await asyncio.sleep((tally.to_ns - time.monotonic_ns()) / 1e9)
    return (time.process_time_ns() - cpu_ns) / max(time.monotonic_ns() - at_ns, 1)

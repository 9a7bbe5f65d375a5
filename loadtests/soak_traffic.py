"""A mix of models and protocols whose arrivals have no end, recorded in memory that does not grow."""

import asyncio
import random
from array import array
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, exp, log
from time import monotonic_ns

import numpy as np

from loadtests.client import Client, Done
from loadtests.recorder import Recorder
from loadtests.timer import PreciseTimer

MAX_BACKLOG = 20_000  # requests that wait for a slot; more are given up and counted as errors
_DRAWN = 1024  # gaps at a time
_FOREVER_NS = 1 << 62
_STEPS = 50  # of a histogram, for each factor of e: a step is 2 %


@dataclass(frozen=True, slots=True)
class Stream:
    """One model asked in one way; ``share`` is its part of all requests."""

    model: str
    wire: str
    share: float

    @property
    def name(self) -> str:
        """For the table."""
        return f"{self.model}, {self.wire}"


class Mix:
    """A client whose every slot sends any of the streams, drawn by their shares: for a closed loop."""

    def __init__(self, streams: Sequence[Stream], clients: Sequence[Client], seed: int) -> None:
        self._clients = clients
        self._random = random.Random(seed)
        self._cumulative = np.cumsum([stream.share for stream in streams]).tolist()

    async def open(self, done: Done) -> None:
        """See Client."""
        for client in self._clients:
            await client.open(done)

    def send(self, slot: int) -> None:
        """See Client."""
        (client,) = self._random.choices(self._clients, cum_weights=self._cumulative)
        client.send(slot)

    async def close(self) -> None:
        """See Client."""
        for client in self._clients:
            await client.close()


@dataclass(slots=True)
class Histogram:
    """Any number of latencies within 2 %, in some hundred numbers."""

    counts: Counter[int] = field(default_factory=Counter)

    def add(self, latency_ns: int) -> None:
        """One more."""
        self.counts[int(log(max(1, latency_ns)) * _STEPS)] += 1

    @property
    def count(self) -> int:
        """How many there are."""
        return self.counts.total()

    def percentile_ms(self, fraction: float) -> float:
        """Nearest rank, the upper edge of its step; 0 where there is none."""
        missing = max(1, ceil(fraction * self.count))
        for step in sorted(self.counts):
            missing -= self.counts[step]
            if missing <= 0:
                return exp((step + 1) / _STEPS) * 1e-6
        return 0.0


class Ledger:
    """What happens to the requests of all streams. Each belongs to the window in which it ends."""

    def __init__(self) -> None:
        self.window = Recorder(0, _FOREVER_NS, by_start=False)
        self.lags_ns = array("q")

    def take(self) -> tuple[Recorder, "array[int]"]:
        """What happened since the last time, and how late each request was sent."""
        taken = self.window, self.lags_ns
        self.window, self.lags_ns = Recorder(0, _FOREVER_NS, by_start=False), array("q")
        return taken

    def failed(self, problem: str, count: int = 1) -> None:
        """Something went wrong in the window of now."""
        self.window.failed(problem, count)


class EndlessLoop:
    """One stream of Poisson arrivals, drawn as they come, until it is told to stop.

    As in ``OpenLoop``, latency counts from when a request was meant to be sent. Each stream has slots of its own: a
    model that is late then keeps nobody else waiting.
    """

    def __init__(self, client: Client, slots: int, rate_per_s: float, seed: int, ledger: Ledger) -> None:
        self._client = client
        self._ledger = ledger
        self._random = np.random.default_rng(seed)
        self._mean_gap_ns = 1e9 / rate_per_s
        self._gaps_ns: deque[int] = deque()
        self._next_ns = _FOREVER_NS
        self._free = deque(range(slots))
        self._slots = slots
        self._intended_ns = [0] * slots
        self._backlog: deque[int] = deque()
        self._timer = PreciseTimer(self._due)
        self._stopped = False
        self.histogram = Histogram()
        self.idle = asyncio.Event()

    def start(self) -> None:
        """Wait for the first arrival."""
        self._next_ns = monotonic_ns() + self._gap_ns()
        self._timer.arm(self._next_ns)

    def stop(self) -> None:
        """Nothing arrives any more; ``idle`` is set once everything is answered."""
        self._stopped = True
        self._tell_idle()

    def done(self, slot: int, problem: str | None) -> None:
        """Told by the client: record, and give the slot to who waits longest."""
        now_ns = monotonic_ns()
        self._ledger.window.add(self._intended_ns[slot], now_ns, problem)
        if problem is None:
            self.histogram.add(now_ns - self._intended_ns[slot])
        if self._backlog:
            self._send(slot, self._backlog.popleft())
            return
        self._free.append(slot)
        self._tell_idle()

    def unanswered(self) -> int:
        """How many requests are under way or wait."""
        return self._slots - len(self._free) + len(self._backlog)

    def close(self) -> None:
        """Give the timer back."""
        self._stopped = True
        self._timer.close()

    def _due(self) -> None:
        now_ns = monotonic_ns()
        while not self._stopped and self._next_ns <= now_ns:
            if self._free:
                self._send(self._free.popleft(), self._next_ns)
            elif len(self._backlog) < MAX_BACKLOG:
                self._backlog.append(self._next_ns)
            else:
                self._ledger.failed(f"not sent: {MAX_BACKLOG} requests wait for a connection")
            self._next_ns += self._gap_ns()
        if not self._stopped:
            self._timer.arm(self._next_ns)

    def _gap_ns(self) -> int:
        if not self._gaps_ns:
            self._gaps_ns.extend(self._random.exponential(self._mean_gap_ns, _DRAWN).astype(np.int64).tolist())
        return self._gaps_ns.popleft()

    def _send(self, slot: int, intended_ns: int) -> None:
        self._intended_ns[slot] = intended_ns
        self._ledger.lags_ns.append(monotonic_ns() - intended_ns)
        self._client.send(slot)

    def _tell_idle(self) -> None:
        if self._stopped and not self.unanswered():
            self.idle.set()

"""The two ways to put a server under load: so many clients, or so many requests a second."""

import asyncio
from array import array
from collections import deque
from collections.abc import Sequence
from time import monotonic_ns

from loadtests.client import Client
from loadtests.recorder import Recorder
from loadtests.timer import PreciseTimer


class ClosedLoop:
    """As many clients as slots, each sending its next request when its last one is answered."""

    def __init__(self, client: Client, slots: int, recorder: Recorder) -> None:
        self._client = client
        self._recorder = recorder
        self._started_ns = [0] * slots
        self._active = slots
        self.idle = asyncio.Event()

    def start(self) -> None:
        """Send the first request of every client."""
        for slot in range(len(self._started_ns)):
            self._send(slot)

    def done(self, slot: int, problem: str | None) -> None:
        """Told by the client: record, and send again until the window is over."""
        now_ns = monotonic_ns()
        self._recorder.add(self._started_ns[slot], now_ns, problem)
        if now_ns < self._recorder.to_ns:
            self._send(slot)
            return
        self._active -= 1
        if not self._active:
            self.idle.set()

    def unanswered(self) -> int:
        """How many requests are still under way."""
        return self._active

    def close(self) -> None:
        """Nothing is held."""

    def _send(self, slot: int) -> None:
        self._started_ns[slot] = monotonic_ns()
        self._client.send(slot)


class OpenLoop:
    """Requests at times set beforehand, whether or not earlier ones are answered.

    When every slot is taken a request waits here, and its latency counts from when it was meant to be sent.
    """

    def __init__(self, client: Client, slots: int, recorder: Recorder, times_ns: Sequence[int]) -> None:
        self._client = client
        self._recorder = recorder
        self._times_ns = times_ns
        self._next = 0
        self._intended_ns = [0] * slots
        self._free = list(range(slots))
        self._timer = PreciseTimer(self._due)
        self._backlog: deque[int] = deque()  # bounded by the schedule
        self.lags_ns = array("q")
        self.idle = asyncio.Event()

    def start(self) -> None:
        """Wait for the first send time."""
        if self._times_ns:
            self._timer.arm(self._times_ns[0])
        else:
            self.idle.set()

    def done(self, slot: int, problem: str | None) -> None:
        """Told by the client: record, and give the slot to who waits longest."""
        self._recorder.add(self._intended_ns[slot], monotonic_ns(), problem)
        if self._backlog:
            self._send(slot, self._backlog.popleft())
            return
        self._free.append(slot)
        if self._next == len(self._times_ns) and len(self._free) == len(self._intended_ns):
            self.idle.set()

    def unanswered(self) -> int:
        """How many requests of the window have no answer."""
        taken = set(range(len(self._intended_ns))) - set(self._free)
        pending = [*(self._intended_ns[slot] for slot in taken), *self._backlog, *self._times_ns[self._next :]]
        return sum(self._recorder.from_ns <= intended_ns < self._recorder.to_ns for intended_ns in pending)

    def close(self) -> None:
        """Give the timer back."""
        self._timer.close()

    def _due(self) -> None:
        now_ns = monotonic_ns()
        while self._next < len(self._times_ns) and self._times_ns[self._next] <= now_ns:
            intended_ns = self._times_ns[self._next]
            self._next += 1
            if self._free:
                self._send(self._free.pop(), intended_ns)
            else:
                self._backlog.append(intended_ns)
        if self._next < len(self._times_ns):
            self._timer.arm(self._times_ns[self._next])

    def _send(self, slot: int, intended_ns: int) -> None:
        self._intended_ns[slot] = intended_ns
        self.lags_ns.append(monotonic_ns() - intended_ns)
        self._client.send(slot)

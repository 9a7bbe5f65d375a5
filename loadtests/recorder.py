"""What happened to each request of a run."""

from array import array
from collections import Counter

MAX_PROBLEMS = 20  # kinds of problem told apart; what comes later is counted together


class Recorder:
    """Counts the requests of the measured window, which lies between two moments of the monotonic clock.

    A closed loop's latencies belong to the window they end in. An open loop's belong to the one they were
    meant to start in, however long they take: leaving out the late ones would flatter the server.
    """

    __slots__ = ("_by_start", "answered", "errors", "finished_in_window", "from_ns", "latencies_ns", "to_ns")

    def __init__(self, from_ns: int, to_ns: int, *, by_start: bool) -> None:
        self.from_ns = from_ns
        self.to_ns = to_ns
        self._by_start = by_start
        self.latencies_ns = array("q")
        self.errors: Counter[str] = Counter()
        self.finished_in_window = 0  # good answers
        self.answered = 0  # of any kind, since the start of the run

    def add(self, started_ns: int, finished_ns: int, problem: str | None) -> None:
        """One request is over; ``started_ns`` is when it was sent or, in an open loop, meant to be."""
        self.answered += 1
        if problem is None and self.from_ns <= finished_ns < self.to_ns:
            self.finished_in_window += 1
        if not self.from_ns <= (started_ns if self._by_start else finished_ns) < self.to_ns:
            return
        if problem is None:
            self.latencies_ns.append(finished_ns - started_ns)
        else:
            self.failed(problem)

    def failed(self, problem: str, count: int = 1) -> None:
        """Requests of the window that got no good answer."""
        known = problem in self.errors or len(self.errors) < MAX_PROBLEMS
        self.errors[problem if known else "other problems"] += count

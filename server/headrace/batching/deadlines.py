"""Whether a request can still be answered by its deadline, by what waits in its queue and what executes."""

from collections.abc import Callable, Sequence

from headrace.batching.admission import Admission
from headrace.batching.backlog import AnyBacklog
from headrace.batching.pending import rank_of
from headrace.batching.sweep import Sweep
from headrace.core.errors import DeadlineExceeded, Overloaded


class Deadlines:
    """What one queue asks its ``admission``, and tells it; without one only what is over already is refused.

    Nothing is learned before the first request with a deadline comes. From then on ``observe`` is where to tell the
    rows of each batch and what it took, and the queue itself notes in ``taken_at`` and ``finished_ns`` what executes.
    """

    def __init__(self, model: str, admission: Admission | None, sweep: Sweep, clock: Callable[[], int]) -> None:
        self.observe: Callable[[int, int], None] | None = None
        self.taken_at: dict[int, int] = {}  # of batches that execute: when they were taken, and their requests
        self.finished_ns = 0  # when the last one was
        self._model = model
        self._admission = admission
        self._sweep = sweep
        self._clock = clock

    def set_max_rows(self, max_rows: int) -> None:
        """What a batch holds."""
        if self._admission is not None:
            self._admission.max_rows = max_rows

    def check(self, backlog: AnyBacklog, priority: int, deadline_ns: int, rows: int, late_ns: int) -> None:
        """See that a request of so many rows, from 1, can be answered by its deadline, behind what is in ``backlog``.

        Raises:
            DeadlineExceeded: its time is up already.
            Overloaded: it would be answered too late.
        """
        now_ns = self._clock()
        left_ns = deadline_ns - now_ns
        if left_ns <= 0:
            raise DeadlineExceeded(
                f"Request timeout expired: the time of the request for model '{self._model}' was over "
                f"{-left_ns * 1e-6:.1f} ms before it could be queued"
            )
        admission = self._admission
        if admission is None:
            return
        self.observe = self._observe
        rank_ns = rank_of(now_ns, deadline_ns, late_ns)
        ahead = backlog.rows_before(priority, rank_ns)
        running = self._running(admission)
        finish_ns = admission.finish_ns(ahead, rows, running, now_ns)
        if finish_ns is None or finish_ns <= left_ns:
            return
        if self._sweep.due(now_ns):
            backlog.drop_dead()
            ahead = backlog.rows_before(priority, rank_ns)
            finish_ns = admission.finish_ns(ahead, rows, running, now_ns)
            if finish_ns is None or finish_ns <= left_ns:
                return
        raise Overloaded(
            f"Refused at arrival: model '{self._model}' would answer in {finish_ns * 1e-6:.1f} ms at the earliest, "
            f"with {ahead} rows before the request's {rows}, and the request has {left_ns * 1e-6:.1f} ms",
            "too_late",
        )

    def _running(self, admission: Admission) -> Sequence[tuple[int, int]]:
        """Batches that execute: since when they can have run, and the rows that they have at the least."""
        running = list(self.taken_at.items())
        if admission.instances == 1 and running:
            # What a lone instance runs was perhaps staged until the batch before it had ended.
            taken_ns, requests = running[0]
            running[0] = max(taken_ns, self.finished_ns), requests
        return running

    def _observe(self, rows: int, took_ns: int) -> None:
        if self._admission is not None:
            self._admission.observe(rows or 1, took_ns, self._clock())

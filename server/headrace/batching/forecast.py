"""When instances are free, and when rows that come now would start and be answered. Pure: time is handed in."""

from collections.abc import Hashable, Iterable

from headrace.batching.curve import LatencyCurve, LatencyCurves
from headrace.core.validation import BatchKey

OVERDUE = 0.5  # a batch that is late is expected to take so much longer again as it is late already

# What waits: rows, by what may share a batch.
Waiting = Iterable[tuple[BatchKey, int]]


class Place:
    """One instance: what it has taken and not finished, in order, with the time that each is expected to take."""

    __slots__ = ("_began_ns", "_running")

    def __init__(self) -> None:
        self._running: dict[Hashable, float] = {}
        self._began_ns = 0  # when the first of them began to run

    def __len__(self) -> int:
        return len(self._running)

    def taken(self, batch: Hashable, expected_ns: float, now_ns: int) -> None:
        """It has taken a batch."""
        if not self._running:
            self._began_ns = now_ns
        self._running[batch] = expected_ns

    def ended(self, batch: Hashable, now_ns: int) -> None:
        """One of its batches is finished, however it ended."""
        if self._running.pop(batch, None) is not None:
            self._began_ns = now_ns

    def free_ns(self, now_ns: int) -> float:
        """When it will have finished all of them."""
        if not self._running:
            return now_ns
        expected = iter(self._running.values())
        ends_ns = self._began_ns + next(expected)
        if ends_ns < now_ns:
            ends_ns = now_ns + OVERDUE * (now_ns - ends_ns)
        return ends_ns + sum(expected)


class Forecast:
    """Follows the instances of one model version, and foresees.

    It is not told which of them took a batch: they are alike, so an idle one is taken to have gone first, or the one
    that is free soonest where none is idle.
    """

    def __init__(self, curves: LatencyCurves, instances: int = 0) -> None:
        self._curves = curves
        self._places = [Place() for _ in range(instances)]
        self._place_of: dict[Hashable, Place] = {}

    @property
    def instances(self) -> int:
        """How many are up."""
        return len(self._places)

    def up(self) -> None:
        """One more instance takes batches."""
        self._places.append(Place())

    def down(self) -> None:
        """One of them takes no more. The end of what it was running is told as ever."""
        self._places.remove(min(self._places, key=len))

    def taken(self, batch: Hashable, key: BatchKey, rows: int, now_ns: int) -> None:
        """An instance has taken a batch; ``batch`` is what ``ended`` will be told."""
        if not self._places:
            return
        place = self._soonest(now_ns)
        place.taken(batch, self.expected_ns(key, rows), now_ns)
        self._place_of[batch] = place

    def ended(self, batch: Hashable, now_ns: int) -> None:
        """A batch is finished, however it ended."""
        place = self._place_of.pop(batch, None)
        if place is not None:
            place.ended(batch, now_ns)

    def expected_ns(self, key: BatchKey, rows: int) -> float:
        """What a batch takes on average; 0 where nothing is known."""
        curve = self._curves.of(key)
        return curve.mean_ns(rows) if curve is not None else 0.0

    def free_ns(self, now_ns: int) -> list[float]:
        """When each instance is free, the soonest first."""
        if len(self._places) == 1:
            return [self._places[0].free_ns(now_ns)]
        return sorted(place.free_ns(now_ns) for place in self._places)

    def start_ns(self, curve: LatencyCurve, size: int, rows_ahead: int, others_ns: float, now_ns: int) -> float:
        """When a row would start that has ``rows_ahead`` of its key ahead of it, in batches of ``size``.

        ``others_ns`` is the work of other keys that goes before. At least one instance has to be up.
        """
        free_ns = self.free_ns(now_ns)
        rounds, place = divmod(rows_ahead // size, len(free_ns))
        start_ns = free_ns[place] + others_ns / len(free_ns)
        return start_ns + rounds * curve.mean_ns(size) if rounds else start_ns

    def work_ns(self, key: BatchKey, rows: int, size: int) -> float:
        """How long one instance would be busy with these rows in batches of up to ``size``."""
        curve = self._curves.of(key)
        if curve is None:
            return 0.0
        full, rest = divmod(rows, size)
        return full * curve.mean_ns(size) + (curve.mean_ns(rest) if rest else 0.0)

    def finish_ns(self, rows_ahead: int, rows: int, now_ns: int, size: int, key: BatchKey = None) -> int | None:
        """When ``rows`` more would be answered, with ``rows_ahead`` of their key in the queue; None where unknown."""
        curve = self._curves.of(key)
        if curve is None or not self._places:
            return None
        start_ns = self.start_ns(curve, size, rows_ahead, 0.0, now_ns)
        return int(start_ns + self.work_ns(key, rows_ahead % size + rows, size))

    def _soonest(self, now_ns: int) -> Place:
        if len(self._places) == 1:
            return self._places[0]
        return min(self._places, key=lambda place: place.free_ns(now_ns))

"""How long a batch of so many rows takes, learned from the batches that ran. Pure: no clock, no I/O.

One curve serves all instances of a model version: what it predicts is asked before anybody knows which instance will
run the batch, it learns as many times faster, and instances of one model on like devices differ by no more than two
batches of one instance do. Where a model has instances on unlike devices its spread is wide, so that predictions are
cautious.
"""

from collections import OrderedDict
from math import prod, sqrt

from headrace.core.validation import BatchKey

MAX_BUCKETS = 16  # shape buckets of one model; the one that was not used for longest makes room
SLOWEST = 1 / 64  # weight of one batch in its knot, once that is settled: the shape of the curve hardly changes
SPEED = 1 / 16  # weight of one batch in the speed of them all: a noisy neighbour slows every size at once
SETTLED = 8  # batches after which a knot is trusted to judge the speed
HIGH = 3.0  # mean absolute deviations over the mean: what one batch in a hundred takes longer than, if it is normal
FIRST_DEVIATION = 0.1  # of the mean, until more is known
HOPE = 2.0  # mean absolute deviations, over the root of the batches seen: how much better than seen it may be
SURPRISE = 1.5  # times what the other sizes foretell: the first batch of a new size counts as no more
CLIP = 4.0  # deviations: an outlier moves the mean no further than this
LARGEST = 1 << 30  # rows: more than any batch has
FORGOTTEN = 2000  # batches after which the size of larger ones is tried anew


class _Knot:
    """Batches of similar size, from just over a power of two to the next: decayed means of their rows and times."""

    __slots__ = ("batches", "deviation_ns", "last", "mean_ns", "rows")

    def __init__(self, rows: int, mean_ns: float, last: int) -> None:
        self.rows = float(rows)
        self.mean_ns = mean_ns
        self.deviation_ns = mean_ns * FIRST_DEVIATION
        self.batches = 1
        self.last = last  # the number of the last batch that it saw


class LatencyCurve:
    """Piecewise linear over batch sizes, monotone as it is read.

    A knot stands where the batches of its range of sizes were on average, so that a straight line is read as one
    wherever they fell. Times are kept as they would be at ordinary speed, and the present ``speed`` is one factor for
    all: sizes that have not run lately follow a slower or a faster machine, too.
    """

    __slots__ = ("_highs", "_hopes", "_knots", "_lines_are_old", "_means", "_rows", "batches", "speed")

    def __init__(self) -> None:
        self.batches = 0
        self.speed = 1.0
        self._knots: list[_Knot | None] = [None]
        self._lines_are_old = False
        self._rows: list[float] = []
        self._means: list[float] = []
        self._highs: list[float] = []
        self._hopes: list[float] = []

    def observe(self, rows: int, took_ns: int) -> None:
        """A batch of ``rows`` took so long."""
        self.batches += 1
        self._lines_are_old = True
        index = (rows - 1).bit_length()
        nominal_ns = took_ns / self.speed
        knot = self._knots[index] if index < len(self._knots) else None
        if knot is None:
            self._begin(index, rows, nominal_ns)
            return
        knot.last = self.batches
        knot.batches += 1
        ahead = rows - knot.rows
        step_ns = self._slope(index, knot) * ahead if ahead else 0.0
        error_ns = nominal_ns - knot.mean_ns - step_ns
        most_ns = CLIP * knot.deviation_ns
        distance_ns = min(abs(error_ns), 2 * most_ns)
        if knot.batches > SETTLED:
            ratio = nominal_ns / max(1.0, knot.mean_ns + step_ns)
            self.speed *= 1.0 + SPEED * (min(2.0, max(0.5, ratio)) - 1.0)
            error_ns = max(-most_ns, error_ns)  # a young one may have begun with an outlier, so it may fall freely
        error_ns = min(most_ns, error_ns)
        weight = max(SLOWEST, 1.0 / knot.batches)
        knot.rows += weight * ahead
        knot.mean_ns += weight * (step_ns + error_ns)
        # Never nothing: a model that is as regular as a clock still has to be believed when it changes.
        least_ns = 0.01 * knot.mean_ns
        knot.deviation_ns += max(weight, 1 / 32) * (max(distance_ns, least_ns) - knot.deviation_ns)

    def _begin(self, index: int, rows: int, nominal_ns: float) -> None:
        """The first batch of a range of sizes. It may be an outlier: what others foretell bounds it."""
        if any(knot is not None and knot.batches > SETTLED for knot in self._knots):
            nominal_ns = min(nominal_ns, SURPRISE * self.mean_ns(rows) / self.speed)
        self._knots.extend([None] * (index + 1 - len(self._knots)))
        self._knots[index] = _Knot(rows, nominal_ns, self.batches)
        self._lines_are_old = True

    def _slope(self, index: int, knot: _Knot) -> float:
        """Nanoseconds a row near this knot, by the next smaller one."""
        for below in range(index - 1, -1, -1):
            other = self._knots[below]
            if other is not None and other.rows < knot.rows:
                slope = (knot.mean_ns - other.mean_ns) / (knot.rows - other.rows)
                return min(max(slope, 0.0), knot.mean_ns / knot.rows)
        return knot.mean_ns / knot.rows

    # -- reading ------------------------------------------------------------------------------------------

    @property
    def known_rows(self) -> int:
        """The size up to which batches have run, as a power of two; 0 before the first. What is larger is a guess."""
        if self._lines_are_old:
            self._draw()
        return 1 << (int(self._rows[-1] + 0.999) - 1).bit_length() if self._rows else 0

    @property
    def is_point(self) -> bool:
        """Whether batches of one size only have run, so that nothing tells how times grow with the size."""
        if self._lines_are_old:
            self._draw()
        return len(self._rows) == 1

    def mean_ns(self, rows: int) -> float:
        """What a batch of so many rows takes on average; 0 before the first."""
        if self._lines_are_old:
            self._draw()
        return self._read(self._means, rows)

    def high_ns(self, rows: int) -> float:
        """What one batch in a hundred takes longer than; 0 before the first."""
        if self._lines_are_old:
            self._draw()
        return max(self._read(self._highs, rows), self._read(self._means, rows))

    def hopeful_ns(self, rows: int) -> float:
        """What a batch of so many rows may take on average, if the few that have run were unlucky.

        Sizes are to be chosen by it: one that looked bad once would never be tried again otherwise.
        """
        if self._lines_are_old:
            self._draw()
        return min(self._read(self._hopes, rows), self._read(self._means, rows))

    def most_rows(self, within_ns: float) -> int:
        """The largest size whose ``hopeful_ns`` is within so much; 0 where none is, or nothing is known."""
        if self._lines_are_old:
            self._draw()
        rows, means, within_ns = self._rows, self._hopes, within_ns / self.speed
        if not rows or within_ns < means[0]:
            return 0
        last = len(rows) - 1
        index = last
        while means[index] > within_ns:
            index -= 1
        if index == last:
            slope = self._last_slope(means)
        else:
            slope = (means[index + 1] - means[index]) / (rows[index + 1] - rows[index])
        return int(rows[index] + (within_ns - means[index]) / slope) if slope > 0 else LARGEST

    def sizes(self) -> list[int]:
        """The powers of two up to which batches have run, for people: each has a knot of its own."""
        return [1 << index for index, knot in enumerate(self._knots) if knot is not None]

    def _draw(self) -> None:
        """The lines through the knots, each no lower than those before it."""
        self._lines_are_old = False
        knots = [knot for knot in self._knots if knot is not None]
        while len(knots) > 1 and self.batches - knots[-1].last > FORGOTTEN:
            knots.pop()  # it may be what keeps such batches from running, so it must not keep them for ever
        mean_ns = high_ns = hope_ns = 0.0
        self._rows, self._means, self._highs, self._hopes = [], [], [], []
        for knot in knots:
            hope_ns = max(hope_ns, knot.mean_ns - HOPE * knot.deviation_ns / sqrt(knot.batches), 0.5 * knot.mean_ns)
            mean_ns = max(mean_ns, knot.mean_ns)
            high_ns = max(high_ns, knot.mean_ns + HIGH * knot.deviation_ns)
            self._rows.append(knot.rows)
            self._means.append(mean_ns)
            self._highs.append(high_ns)
            self._hopes.append(hope_ns)

    def _read(self, values: list[float], rows: float) -> float:
        known = self._rows
        if not known:
            return 0.0
        if rows <= known[0]:
            return values[0] * self.speed
        for index in range(1, len(known)):
            if rows <= known[index]:
                share = (rows - known[index - 1]) / (known[index] - known[index - 1])
                return (values[index - 1] + share * (values[index] - values[index - 1])) * self.speed
        return (values[-1] + (rows - known[-1]) * self._last_slope(values)) * self.speed

    def _last_slope(self, values: list[float]) -> float:
        """Beyond the largest size: on as from half of it, or in proportion where nothing tells."""
        known = self._rows
        for index in range(len(known) - 2, -1, -1):
            if known[index] <= known[-1] / 1.5:
                return (values[-1] - values[index]) / (known[-1] - known[index])
        return values[-1] / known[-1]


class LatencyCurves:
    """The curves of one model version, one for each bucket of shapes that may not share a batch.

    Requests of one bucket have up to twice the elements of another: a model of any sequence length would have a curve
    for each length otherwise, and learn none.
    """

    __slots__ = ("_curves",)

    def __init__(self) -> None:
        self._curves: OrderedDict[int, LatencyCurve] = OrderedDict()

    def __len__(self) -> int:
        return len(self._curves)

    def observe(self, key: BatchKey, rows: int, took_ns: int) -> None:
        """A batch of ``rows`` of such shapes took so long."""
        bucket = 0 if key is None else shape_bucket(key)
        curve = self._curves.get(bucket)
        if curve is None:
            if len(self._curves) >= MAX_BUCKETS:
                self._curves.popitem(last=False)
            curve = self._curves[bucket] = LatencyCurve()
        elif len(self._curves) > 1:
            self._curves.move_to_end(bucket)
        curve.observe(rows, took_ns)

    def of(self, key: BatchKey) -> LatencyCurve | None:
        """The curve of such shapes; None while no batch of them has run."""
        return self._curves.get(0 if key is None else shape_bucket(key))

    def named(self) -> list[tuple[int, LatencyCurve]]:
        """All of them, each with the elements that a row of its bucket has at most; 0 where shapes do not differ."""
        return sorted((1 << bucket if bucket else 0, curve) for bucket, curve in self._curves.items())


def shape_bucket(key: BatchKey) -> int:
    """The bucket of a key: the bits of the number of elements that a row has, so at most some fifty; 0 for no key."""
    if key is None:
        return 0
    return max(1, (sum(prod(shape) for shape in key if shape is not None) - 1).bit_length())

"""What an hour's samples say: whether memory grew, as a table and as a plot."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from rich.table import Table

from loadtests.soak_processes import Reading

FLAT_MIB_PER_HOUR = 4.0
NOISE_MIB = 2.0  # growth that is never called one: a short run tells nothing about an hour
NOISE_DESCRIPTORS = 16
_SETTLED = 0.25  # of the samples are left out at the start, while pools and caches get their size
_MIN_SAMPLES = 4


@dataclass(frozen=True, slots=True)
class Use:
    """A process in one window; ``cpu`` is a share of one core."""

    reading: Reading
    cpu: float


@dataclass(frozen=True, slots=True)
class Sample:
    """One window. ``busy`` is how many cores of the machine were, whoever used them; ``driver`` is ourselves."""

    at_s: float
    seconds: float
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    max_ms: float
    lag_p99_ms: float
    errors: Mapping[str, int]
    busy: float
    driver: Use
    server: Sequence[Use]
    counters: Mapping[str, float] = field(default_factory=dict)  # the server's own, since its start

    @property
    def own_mib(self) -> float:
        """Of the whole tree: what its processes share counts once, and files do not."""
        return sum(use.reading.own_mib for use in self.server)


@dataclass(frozen=True, slots=True)
class Growth:
    """How one thing's memory went once it had settled: medians of the first and last tenth, and a robust slope."""

    name: str
    samples: int
    first_mib: float
    last_mib: float
    most_mib: float
    mib_per_hour: float
    grown_mib: float  # by the slope, in the time that was looked at
    first_descriptors: float
    last_descriptors: float
    threads: int
    cpu: float

    @property
    def share_per_hour(self) -> float:
        """Of what it had."""
        return self.mib_per_hour / self.first_mib

    @property
    def flat(self) -> bool:
        """Neither memory nor descriptors have grown."""
        slow = self.mib_per_hour <= FLAT_MIB_PER_HOUR or self.grown_mib <= NOISE_MIB
        return slow and self.last_descriptors - self.first_descriptors <= NOISE_DESCRIPTORS


def growths(samples: Sequence[Sample]) -> list[Growth]:
    """Of each process that lived through four samples or more (resident), and of the tree (own)."""
    settled = samples[int(len(samples) * _SETTLED) :]
    places: dict[tuple[int, int], list[tuple[float, Use]]] = {}
    for sample in settled:
        for use in sample.server:
            places.setdefault((use.reading.pid, use.reading.started_ticks), []).append((sample.at_s, use))
    found = [
        _growth(
            uses[0][1].reading.name,
            [at_s for at_s, _ in uses],
            [use.reading.rss_mib for _, use in uses],
            [use for _, use in uses],
        )
        for uses in places.values()
        if len(uses) >= _MIN_SAMPLES
    ]
    if len(settled) >= _MIN_SAMPLES:
        together = [_together(sample.server) for sample in settled]
        times = [sample.at_s for sample in settled]
        found.append(_growth("all, no files", times, [sample.own_mib for sample in settled], together))
    return found


def _together(uses: Sequence[Use]) -> Use:
    """The sums over the tree; memory is that of no process alone and told apart."""
    descriptors = sum(use.reading.descriptors for use in uses)
    threads = sum(use.reading.threads for use in uses)
    return Use(Reading(0, 0, "", 0.0, 0.0, 0.0, 0, descriptors, threads), sum(use.cpu for use in uses))


def _growth(name: str, times_s: Sequence[float], memory_mib: Sequence[float], uses: Sequence[Use]) -> Growth:
    tenth = max(1, len(uses) // 10)
    descriptors = [use.reading.descriptors for use in uses]
    slope = robust_slope(times_s, memory_mib)
    return Growth(
        name=name,
        samples=len(uses),
        first_mib=median(memory_mib[:tenth]),
        last_mib=median(memory_mib[-tenth:]),
        most_mib=max(memory_mib),
        mib_per_hour=slope * 3600,
        grown_mib=slope * (times_s[-1] - times_s[0]),
        first_descriptors=median(descriptors[:tenth]),
        last_descriptors=median(descriptors[-tenth:]),
        threads=uses[-1].reading.threads,
        cpu=mean(use.cpu for use in uses),
    )


def robust_slope(times: Sequence[float], values: Sequence[float]) -> float:
    """The median of the slopes between all pairs (Theil-Sen): a peak, or a step near an end, does not move it.

    Raises:
        ValueError: there are fewer than two points.
    """
    if len(times) < 2:
        raise ValueError(f"a slope of {len(times)} points was asked for; expected at least two")
    first, second = np.triu_indices(len(times), 1)
    at, value = np.asarray(times), np.asarray(values)
    return float(np.median((value[second] - value[first]) / (at[second] - at[first])))


def growth_table(rows: Sequence[Growth]) -> Table:
    """A line for each process and one for all."""
    drawn = Table(title=f"memory after the first quarter; flat: up to {FLAT_MIB_PER_HOUR:g} MiB an hour")
    drawn.add_column("process")
    headings = ("MiB, first", "last", "most", "MiB/hour", "%/hour", "descriptors", "threads", "CPU", "verdict")
    for heading in headings:
        drawn.add_column(heading, justify="right")
    for row in rows:
        drawn.add_row(
            *(row.name, f"{row.first_mib:.1f}", f"{row.last_mib:.1f}", f"{row.most_mib:.1f}"),
            *(f"{row.mib_per_hour:+.2f}", f"{row.share_per_hour:+.1%}"),
            f"{row.first_descriptors:.0f} to {row.last_descriptors:.0f}",
            *(str(row.threads), f"{row.cpu:.0%}", "flat" if row.flat else "GROWS"),
        )
    return drawn


def stream_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """A line for each model and protocol."""
    drawn = Table(title=title)
    drawn.add_column("asked")
    for heading in ("good answers", "p50 ms", "p99 ms", "p99.9 ms"):
        drawn.add_column(heading, justify="right")
    for row in rows:
        figures = (f"{row[key]:.2f}" for key in ("p50_ms", "p99_ms", "p999_ms"))
        drawn.add_row(row["name"], f"{row['count']:,}", *figures)
    return drawn


# ---- the plot ----


def plot(samples: Sequence[Sample], title: str, path: Path) -> None:
    """Memory, requests, latency, CPU and descriptors over time, one above the other, as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 14), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(5, 1, sharex=True)
    minutes = [sample.at_s / 60 for sample in samples]
    names = list(dict.fromkeys((use.reading.pid, use.reading.name) for sample in samples for use in sample.server))
    for pid, name in names:
        mine = [(sample.at_s / 60, use) for sample in samples for use in sample.server if use.reading.pid == pid]
        times = [at for at, _ in mine]
        panels[0].plot(times, [use.reading.rss_mib for _, use in mine], label=f"{name}, resident")
        panels[3].plot(times, [use.cpu for _, use in mine], label=name)
        panels[4].plot(times, [use.reading.descriptors for _, use in mine], label=name)
    panels[0].plot(minutes, [sample.own_mib for sample in samples], color="black", label="all, no files")
    panels[1].plot(minutes, [sample.requests_per_s for sample in samples], label="good answers")
    errors = [sum(sample.errors.values()) / sample.seconds for sample in samples]
    panels[1].plot(minutes, errors, color="red", label="errors")
    panels[2].plot(minutes, [sample.p99_ms for sample in samples], label="p99")
    panels[2].plot(minutes, [sample.p50_ms for sample in samples], label="p50")
    panels[2].set_yscale("log")
    panels[3].plot(minutes, [sample.driver.cpu for sample in samples], linestyle="dotted", label="driver")
    panels[3].plot(minutes, [sample.busy for sample in samples], color="black", linestyle="dashed", label="machine")
    labels = ("memory, MiB", "a second", "latency, ms", "CPU, cores", "open descriptors")
    for axes, label in zip(panels, labels, strict=True):
        axes.set_ylabel(label)
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
        if axes is not panels[2]:
            axes.set_ylim(bottom=0)
    panels[0].set_title(title)
    panels[-1].set_xlabel("minutes")
    figure.savefig(path, dpi=110)

"""What was measured, for people, for programs and as a picture."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.bench.knee import knee
from headrace.bench.sweep import Step

CLIENT_LIMIT = 0.8  # of a core: above it the client is likely to be what is measured
_HEADINGS = ("clients", "requests/s", "p50 ms", "p90 ms", "p99 ms", "batch", "errors", "client CPU")
_BAR_CHARACTERS = 40
_MARK = "<- knee"


@dataclass(frozen=True, slots=True)
class Protocol:
    """One protocol's steps; ``cut_short`` where time was up before the knee was certain."""

    name: str
    url: str
    steps: tuple[Step, ...]
    cut_short: bool

    @property
    def ordered(self) -> list[Step]:
        """By the number of clients."""
        return sorted(self.steps, key=lambda step: step.clients)

    @property
    def answered(self) -> bool:
        """Whether anything was."""
        return any(step.requests_per_s for step in self.steps)

    @property
    def knee(self) -> Step | None:
        """The step at the knee; None where nothing was answered, or one step alone has nothing to be compared with."""
        if len(self.steps) < 2:
            return None
        found = knee([step.point for step in self.steps])
        return None if found is None else next(step for step in self.steps if step.point == found)


def describe(protocol: Protocol) -> str:
    """A table, bars of throughput, and what they mean."""
    found = protocol.knee
    lines = [f"{protocol.name}, {protocol.url}", *_table(protocol.ordered, found), "", *_bars(protocol.ordered, found)]
    if found is not None and found.latencies is not None:
        who = f"{found.clients} client{'s' if found.clients > 1 else ''}"
        lines.append(
            f"\nknee: {who}, {found.requests_per_s:,.1f} requests/s, p99 {found.latencies.p99_ms:.2f} ms: "
            "the fewest that reach 95 % of the best throughput"
        )
    lines += _remarks(protocol, found)
    return "\n".join(lines)


def _table(steps: Sequence[Step], found: Step | None) -> list[str]:
    rows = [_HEADINGS, *(_row(step) for step in steps)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    marks = ["", *(_MARK if step is found else "" for step in steps)]
    return [
        ("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + f"  {mark}").rstrip()
        for row, mark in zip(rows, marks, strict=True)
    ]


def _row(step: Step) -> tuple[str, ...]:
    latencies = step.latencies
    percentiles = (latencies.p50_ms, latencies.p90_ms, latencies.p99_ms) if latencies else (None, None, None)
    return (
        str(step.clients),
        f"{step.requests_per_s:,.1f}",
        *("-" if value is None else f"{value:.2f}" for value in percentiles),
        "-" if step.batch_rows is None else f"{step.batch_rows:.1f}",
        str(step.errors.total()),
        f"{step.client_cpu_share:.0%}",
    )


def _bars(steps: Sequence[Step], found: Step | None) -> list[str]:
    best = max((step.requests_per_s for step in steps), default=0.0)
    width = max((len(str(step.clients)) for step in steps), default=1)
    return [
        f"{step.clients:>{width}} |{'█' * round(step.requests_per_s / best * _BAR_CHARACTERS) if best else ''}"
        f"{' ' + _MARK if step is found else ''}"
        for step in steps
    ]


def _remarks(protocol: Protocol, found: Step | None) -> list[str]:
    lines = []
    if not protocol.answered:
        lines.append("nothing was answered")
    elif found is protocol.ordered[-1]:
        lines.append("the knee is the most that was tried; there may be more to gain beyond it")
    if protocol.cut_short:
        lines.append("time was up before all steps were made: --max-seconds")
    if any(step.client_cpu_share > CLIENT_LIMIT for step in protocol.steps):
        lines.append(
            f"this client took over {CLIENT_LIMIT:.0%} of a core in some steps: there the server may do more than it "
            "shows; run several at once, or the other protocol"
        )
    errors = sum((step.errors for step in protocol.steps), start=type(protocol.steps[0].errors)())
    lines += [f"{count} x {problem}" for problem, count in errors.most_common()]
    return lines


def to_document(model: str, inputs: Sequence[str], protocols: Sequence[Protocol]) -> dict[str, Any]:
    """Everything, for programs."""
    return {
        "model": model,
        "inputs": list(inputs),
        "protocols": [
            {
                "protocol": protocol.name,
                "url": protocol.url,
                "knee_clients": None if protocol.knee is None else protocol.knee.clients,
                "cut_short": protocol.cut_short,
                "steps": [_step_document(step) for step in protocol.ordered],
            }
            for protocol in protocols
        ],
    }


def _step_document(step: Step) -> dict[str, Any]:
    latencies = step.latencies
    return {
        "clients": step.clients,
        "requests_per_s": step.requests_per_s,
        "p50_ms": latencies and latencies.p50_ms,
        "p90_ms": latencies and latencies.p90_ms,
        "p99_ms": latencies and latencies.p99_ms,
        "batch_rows": step.batch_rows,
        "client_cpu_share": step.client_cpu_share,
        "errors": dict(step.errors),
    }


def write_json(document: dict[str, Any], path: Path) -> None:
    """One JSON file."""
    path.write_text(json.dumps(document, indent=1) + "\n")


def draw(model: str, protocols: Sequence[Protocol], path: Path) -> None:
    """Throughput and latency over the number of clients, the knees marked. Needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    throughput, latency = figure.subplots(1, 2)
    for index, protocol in enumerate(protocols):
        color = f"C{index}"
        steps = [step for step in protocol.ordered if step.latencies is not None]
        clients = [step.clients for step in steps]
        throughput.plot(clients, [step.requests_per_s for step in steps], marker="o", color=color, label=protocol.name)
        for name, style in (("p50_ms", ":"), ("p99_ms", "-")):
            values = [getattr(step.latencies, name) for step in steps]
            label = f"{protocol.name} {name.removesuffix('_ms')}"
            latency.plot(clients, values, style, marker=".", color=color, label=label)
        if protocol.knee is not None:
            for panel in (throughput, latency):
                panel.axvline(protocol.knee.clients, color=color, linestyle="--", alpha=0.5)
    throughput.set_ylabel("requests/s")
    throughput.set_ylim(bottom=0)
    latency.set_ylabel("ms")
    latency.set_yscale("log")
    tried = sorted(
        {step.clients for protocol in protocols for step in protocol.steps if not step.clients & step.clients - 1}
    )
    for panel in (throughput, latency):
        panel.set_xscale("log", base=2)
        panel.set_xticks(tried, [str(clients) for clients in tried])
        panel.set_xlabel("clients (dashed: the knee)")
        panel.grid(visible=True, alpha=0.3)
        panel.legend(fontsize="small")
    figure.suptitle(model)
    figure.savefig(path, dpi=120)

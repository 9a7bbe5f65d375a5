"""What the optimiser makes of real models: ``python -m loadtests.optimize``.

Each case is a model folder as somebody would drop it in. ``headrace optimize`` is run on it as its owner would, and its
report is judged by the case's goals. With ``--exhaustive`` every candidate of a model is measured to the end as well,
to see what the search has missed, and what it has saved.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from headrace_backends.optimize.findings import Findings, Row
from headrace_backends.optimize.report import read_report
from loadtests.machine import describe_machine, describe_versions
from loadtests.optimize_models import CASES, ROOT, Case
from loadtests.optimize_verdict import Verdict, judge

RESULTS = Path(__file__).parent / "results"
SAMPLES = ("digits", "digits_rows", "digits_torch")
NOTHING_BETTER = 3
EVEN = 0.95  # of the best of the sweep
SHARE = 0.25  # of the sweep's time


def search(model: str, repository: Path, plans: Path, seconds: int, *options: str) -> tuple[Findings, float]:
    """Run the command, and read its report. Returns the findings and the seconds that it took.

    Raises:
        RuntimeError: it failed; with its last lines.
    """
    command = [sys.executable, "-m", "headrace", "optimize", model, "--repository", str(repository)]
    command += ["--plan-cache", str(plans), "--time-limit", str(seconds), "--anew", *options]
    started = time.monotonic()
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds + 1200)
    took = time.monotonic() - started
    if ended.returncode not in (0, NOTHING_BETTER):
        raise RuntimeError("\n".join((ended.stdout + ended.stderr).splitlines()[-4:]))
    (report,) = [
        line.removeprefix("report: ").strip() for line in ended.stdout.splitlines() if line.startswith("report: ")
    ]
    return read_report(Path(report).with_suffix(".json")), took


def run_case(case: Case, folder: Path) -> tuple[Verdict, Findings]:
    """Build the model's folder, search, judge.

    Raises:
        Missing, RuntimeError, ImportError: it cannot be run.
    """
    place = folder / "repository" / case.name
    place.mkdir(parents=True)
    case.build(place)
    findings, _ = search(case.name, place.parent, folder / "plans", case.seconds)
    return judge(case, findings), findings


def sweep(model: str, folder: Path) -> list[str]:
    """A sample model, searched and swept. Returns a row of the table."""
    repository = ROOT / "model_repository"
    found, took = search(model, repository, folder / "plans", 600, "--objective", "throughput")
    swept, swept_took = search(model, repository, folder / "swept", 3600, "--objective", "throughput", "--exhaustive")
    speed, best = (max(row.speedup or 0.0 for row in one.rows if row.fate == "chosen") for one in (found, swept))
    good = speed >= EVEN * best and took <= SHARE * swept_took
    return [
        model,
        f"{speed:.2f} x",
        f"{best:.2f} x",
        f"{speed / best:.0%}",
        f"{took:.0f} s",
        f"{swept_took:.0f} s",
        f"{took / swept_took:.0%}",
        "met" if good else "missed",
    ]


def describe(row: Row) -> dict[str, object]:
    """One candidate, for the file."""
    return {
        "form": row.form.name,
        "layout": row.form.layout,
        "fate": str(row.fate),
        "speedup": row.speedup,
        "reason": row.reason,
        "errors": None if row.errors is None else msgspec.to_builtins(row.errors),
        "held_back": None if row.held_back is None else msgspec.to_builtins(row.held_back),
        "file_bytes": row.file_bytes,
        "build_s": row.build_s,
        "notes": list(row.notes),
    }


def table(verdicts: Sequence[Verdict]) -> Table:
    """One row a case."""
    drawn = Table(title="The chosen form over the model as it was dropped in")
    for heading in ("case", "chosen", "x dropped in", "x ONNX Runtime", "on the held-back half", "s", ""):
        drawn.add_column(heading, justify="right" if heading.startswith("x") or heading == "s" else "left")
    for one in verdicts:
        over = "-" if one.over_onnxruntime is None else f"{one.over_onnxruntime:.2f}"
        result = "; ".join(one.missed) or "met"
        drawn.add_row(one.case, one.form, f"{one.speedup:.2f}", over, one.held_back, f"{one.seconds:.0f}", result)
    return drawn


def main(
    *,
    case: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(CASES)}; may be repeated")] = None,
    exhaustive: Annotated[bool, typer.Option("--exhaustive", help="sweep the sample models too: half an hour")] = False,
    name: Annotated[str | None, typer.Option(help="of the file in loadtests/results; default local/DATE")] = None,
) -> None:
    """Optimise the models of the cases, and say which goals were reached."""
    console = Console(width=None if sys.stdout.isatty() else 200)
    if unknown := sorted(set(case or ()) - set(CASES)):
        console.print(f"error: no case {', '.join(unknown)}; there are {', '.join(CASES)}")
        raise typer.Exit(1)
    verdicts: list[Verdict] = []
    failures: dict[str, str] = {}
    swept: list[list[str]] = []
    candidates: dict[str, list[dict[str, object]]] = {}
    with tempfile.TemporaryDirectory(prefix="headrace-optimize-") as scratch:
        for one in case or ([] if exhaustive else CASES):
            console.print(f"{one}: {(CASES[one].build.__doc__ or '').strip()}", highlight=False)
            try:
                verdict, findings = run_case(CASES[one], Path(scratch) / one)
            except (Exception, SystemExit) as error:  # noqa: BLE001 - one case that cannot be run stops no other
                failures[one] = f"{type(error).__name__}: {error}"
                console.print(f"  failed: {failures[one]}", markup=False, highlight=False)
                continue
            finally:
                shutil.rmtree(Path(scratch) / one, ignore_errors=True)
            verdicts.append(verdict)
            candidates[one] = [describe(row) for row in findings.rows]
            for row in findings.rows:
                told = f"  {row.fate:9} {row.speedup or 0:6.2f} x  {row.form.name}; {row.form.layout}: {row.reason}"
                console.print(told, markup=False, highlight=False)
        for model in SAMPLES if exhaustive else ():
            try:
                swept.append(sweep(model, Path(scratch) / model))
            except Exception as error:  # noqa: BLE001
                failures[model] = str(error)
    console.print(table(verdicts))
    if swept:
        drawn = Table(*("model", "search", "sweep", "of the best", "search took", "sweep took", "of its time", ""))
        for row in swept:
            drawn.add_row(*row)
        console.print(drawn)
    for one, reason in failures.items():
        console.print(f"failed: {one}: {reason}", markup=False, highlight=False)
    path = RESULTS / f"{name or datetime.now(UTC).strftime('local/optimize-%Y%m%d-%H%M%S')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ["python", "-m", "loadtests.optimize", *sys.argv[1:]],
        "machine": describe_machine(),
        "versions": describe_versions(),
        "cases": [asdict(one) for one in verdicts],
        "candidates": candidates,
        "sweeps": swept,
        "failures": failures,
    }
    path.write_text(json.dumps(document, indent=1) + "\n")
    console.print(f"written to {path}", highlight=False)
    raise typer.Exit(1 if failures or any(one.missed for one in verdicts) else 0)


if __name__ == "__main__":
    typer.run(main)

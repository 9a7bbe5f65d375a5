"""What the optimiser makes of real models: ``python -m loadtests.optimize``.

Each case is a model folder as somebody would drop it in. ``headrace optimize`` is run on it as its owner would, and its
report is judged by the case's goals. The case ``served`` drops one into a running server instead (``served.py``). With
``--exhaustive`` every candidate of the sample models is measured to the end, to see what the search has missed, and
what it has saved (``optimize_sweep.py``).
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console

from headrace_backends.optimize.findings import Findings
from headrace_backends.optimize.report import read_report
from loadtests import optimize_report, served, served_report
from loadtests.machine import describe_machine, describe_versions
from loadtests.optimize_models import CASES, QUICK_SERVED, ROOT, SERVED, Case
from loadtests.optimize_sweep import Sweep, sweep, sweepable
from loadtests.optimize_verdict import Verdict, judge, passed_over
from loadtests.served_report import Served

RESULTS = Path(__file__).parent / "results"
SAMPLES = ROOT / "model_repository"
NOTHING_BETTER = 3
QUICK_S = 10  # of a search
SEARCH_S = 600  # of a sample model
QUICK_CASES = ("magika", "served")


@dataclass(slots=True)
class Results:
    """What there is to tell at the end."""

    verdicts: list[Verdict] = field(default_factory=list)
    findings: dict[str, Findings] = field(default_factory=dict)
    sweeps: list[Sweep] = field(default_factory=list)
    served: Served | None = None
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def missed(self) -> bool:
        """Whether a goal was."""
        missed = [*(one.missed for one in self.verdicts), *(one.missed for one in self.sweeps)]
        return any(missed) or bool(self.served and self.served.missed)


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


def run_case(case: Case, folder: Path, seconds: int) -> tuple[Verdict, dict[str, Findings]]:
    """Build the model's folder, search, judge.

    A form that the search must refuse may be passed over, because others are faster. Then an exhaustive search is asked
    as well, whether it refuses it. Returns the findings of both, by name.

    Raises:
        Missing, RuntimeError, ImportError: it cannot be run.
    """
    place = folder / "repository" / case.name
    place.mkdir(parents=True)
    case.build(place)
    findings, _ = search(case.name, place.parent, folder / "plans", seconds)
    if not passed_over(case, findings):
        return judge(case, findings), {case.name: findings}
    everything, _ = search(case.name, place.parent, folder / "everything", 2 * seconds, "--exhaustive")
    return judge(case, findings, everything), {case.name: findings, f"{case.name}, everything": everything}


def run_served(folder: Path, console: Console, *, quick: bool) -> Served:
    """Build the model's folder, drop it into a server, watch.

    Raises:
        Missing, ServerFailure, RuntimeError, ImportError: it cannot be run.
    """
    case, plan = (QUICK_SERVED, served.QUICK) if quick else (SERVED, served.FULL)
    place = folder / "built" / case.name
    place.mkdir(parents=True)
    case.build(place)
    with (place / "config.yaml").open("a") as config:
        config.write(f"  objective: throughput\n  time_limit_s: {2 * QUICK_S if quick else case.seconds}\n")
    return served.run(place, folder, plan, lambda line: console.print(line, markup=False, highlight=False))


def run_sweep(model: str, repository: Path, work: Path, limit_s: int, cap_s: int) -> Sweep:
    """Search and sweep one model of a repository."""

    def searched(name: str, plans: Path, seconds: int, options: Sequence[str]) -> tuple[Findings, float]:
        return search(name, repository, plans, seconds, *options)

    return sweep(model, repository, work, limit_s, cap_s, searched)


def write(results: Results, path: Path) -> None:
    """Everything as one JSON file, and the plots beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ["python", "-m", "loadtests.optimize", *sys.argv[1:]],
        "machine": describe_machine(),
        "versions": describe_versions(),
        "cases": [asdict(one) for one in results.verdicts],
        "candidates": {
            name: [optimize_report.describe(row) for row in findings.rows]
            for name, findings in results.findings.items()
        },
        "sweeps": [asdict(one) | {"share": one.share, "missed": one.missed} for one in results.sweeps],
        "served": None
        if results.served is None
        else msgspec.to_builtins(results.served) | {"rise": results.served.rise},
        "failures": results.failures,
    }
    path.write_text(json.dumps(document, indent=1) + "\n")
    if results.findings or results.sweeps:
        optimize_report.plot([*CASES.values()], results.findings, results.sweeps, path.with_suffix(".png"))
    if results.served is not None:
        served_report.plot(results.served, path.with_name(f"{path.stem}-served.png"))


def main(
    *,
    case: Annotated[
        list[str] | None, typer.Option(help=f"of {', '.join((*CASES, SERVED.name))}; may be repeated")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="a smoke test: a few seconds for each search, whatever goals that misses")
    ] = False,
    exhaustive: Annotated[
        bool, typer.Option("--exhaustive", help="search and sweep sample models, and nothing else without --case")
    ] = False,
    model: Annotated[list[str] | None, typer.Option(help="to sweep; may be repeated; default all samples")] = None,
    repository: Annotated[Path, typer.Option(help="that has the models to sweep")] = SAMPLES,
    cap: Annotated[int, typer.Option(min=1, help="seconds that the sweep of a model may take at most")] = 3600,
    name: Annotated[str | None, typer.Option(help="of the files in loadtests/results; default local/DATE")] = None,
) -> None:
    """Optimise the models of the cases, and say which goals were reached."""
    console = Console(width=None if sys.stdout.isatty() else 200)
    if unknown := sorted(set(case or ()) - {*CASES, SERVED.name}):
        console.print(f"error: no case {', '.join(unknown)}; there are {', '.join((*CASES, SERVED.name))}")
        raise typer.Exit(1)
    swept = (model or sweepable(repository)) if exhaustive else []
    results = Results()
    with tempfile.TemporaryDirectory(prefix="headrace-optimize-") as scratch:
        for one in case or ([] if exhaustive else QUICK_CASES if quick else [*CASES, SERVED.name]):
            folder = Path(scratch) / one
            folder.mkdir()
            try:
                _run_one(one, folder, results, console, quick=quick)
            except (Exception, SystemExit) as error:  # noqa: BLE001 - one case that cannot be run stops no other
                results.failures[one] = f"{type(error).__name__}: {error}"
                console.print(f"  failed: {results.failures[one]}", markup=False, highlight=False)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
        for one in swept:
            console.print(f"sweeping {one}", highlight=False)
            try:
                limit_s = QUICK_S if quick else SEARCH_S
                results.sweeps.append(run_sweep(one, repository, Path(scratch) / f"sweep-{one}", limit_s, cap))
            except Exception as error:  # noqa: BLE001 - as above
                results.failures[one] = f"{type(error).__name__}: {error}"
                console.print(f"  failed: {results.failures[one]}", markup=False, highlight=False)
    _tell(results, console)
    path = RESULTS / f"{name or datetime.now(UTC).strftime('local/optimize-%Y%m%d-%H%M%S')}.json"
    write(results, path)
    console.print(f"written to {path}", highlight=False)
    raise typer.Exit(1 if results.failures or (results.missed and not quick) else 0)


def _run_one(name: str, folder: Path, results: Results, console: Console, *, quick: bool) -> None:
    if name == SERVED.name:
        console.print(f"{name}: {(served.__doc__ or '').splitlines()[0]}", highlight=False)
        results.served = run_served(folder, console, quick=quick)
        return
    case = CASES[name]
    console.print(f"{name}: {(case.build.__doc__ or '').strip()}", highlight=False)
    verdict, findings = run_case(case, folder, QUICK_S if quick else case.seconds)
    results.verdicts.append(verdict)
    results.findings |= findings
    for searched, found in findings.items():
        if searched != name:
            console.print(searched, highlight=False)
        for row in found.rows:
            told = f"  {row.fate:9} {row.speedup or 0:6.2f} x  {row.form.name}; {row.form.layout}: {row.reason}"
            console.print(told, markup=False, highlight=False)


def _tell(results: Results, console: Console) -> None:
    if results.verdicts:
        console.print(optimize_report.table(results.verdicts))
    if results.sweeps:
        console.print(optimize_report.sweep_table(results.sweeps))
    if results.served is not None:
        for line in served_report.lines(results.served):
            console.print(line, markup=False, highlight=False)
    for one, reason in results.failures.items():
        console.print(f"failed: {one}: {reason}", markup=False, highlight=False)


if __name__ == "__main__":
    typer.run(main)

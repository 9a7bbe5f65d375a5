"""Everything that needs a GPU, shown in one run: ``python -m loadtests.gpu.run``. The table comes last.

The machine may reach nothing: wheels that it lacks come along as parts (``--parts``, see parts.py).
"""

import argparse
import atexit
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

from loadtests.gpu import gpu_tests, parts
from loadtests.gpu.ledger import SHOWN, Ledger, NotShown
from loadtests.gpu.own_process import ROOT, ended, last_line

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    """Show what can be shown here; returns 1 where something failed, or there is no GPU at all."""
    started = time.monotonic()
    asked = _arguments()
    path = asked.out / f"{datetime.now(UTC):%Y-%m-%dT%H%M%S}.json"
    ledger = Ledger(started + asked.budget, lambda line: print(line, flush=True), keep=path)
    if asked.parts:
        with ledger.showing("packages that were brought") as showing:
            showing.text = _bring(asked.parts)
    _find_headrace()
    _show(ledger, asked.seconds, asked.only)
    ledger.write(path)
    print(f"\n{ledger.table()}\nraw results: {path}")
    nothing = all(entry.outcome != SHOWN for entry in ledger.entries)
    return 1 if ledger.failed or nothing else 0


def _arguments() -> argparse.Namespace:
    # Of the standard library: what the machine lacks is there only when this has been read.
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=Path, help="a folder with parts of wheels, from parts.py")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the raw results go")
    parser.add_argument("--seconds", type=float, default=3.0, help="of load for each measurement")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds of the whole run, the packages included")
    parser.add_argument("--only", choices=("measurements", "tests"), help="one half of the run")
    return parser.parse_args()


def _bring(folder: Path) -> str:
    """Install what was brought, and have this process and those that it starts find it."""
    site = tempfile.mkdtemp(prefix="headrace-gpu-site-")
    atexit.register(shutil.rmtree, site, ignore_errors=True)
    _search_first([site])
    found, problems = parts.install(folder, Path(site))
    assert not problems, "; ".join(problems)
    return f"{len(found)}, of them {', '.join(one.partition('-')[0] for one in found if one.startswith(_TOLD))}"


_TOLD = ("tensorrt", "onnxruntime")


def _find_headrace() -> None:
    if find_spec("headrace") is None:
        _search_first([str(ROOT / "server"), str(ROOT / "backends")])


def _search_first(paths: list[str]) -> None:
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])


def _show(ledger: Ledger, seconds: float, only: str | None) -> None:
    with ledger.showing("a GPU that can be used") as showing:
        from loadtests.gpu import machine

        ledger.machine = machine.describe()
        machine.require_gpu(ledger.machine)
        showing.values = ledger.machine["driver"]
        showing.text = ", ".join(
            f"{gpu['name']}, compute capability {gpu['capability']}" for gpu in showing.values["gpus"]
        )
    there = ledger.outcome("a GPU that can be used") == SHOWN
    _check(ledger, there)
    if not there:
        for name in gpu_tests.EVERY:
            gpu_tests.run_file(ledger, name)
        for what in _LEFT:
            with ledger.showing(what):
                raise NotShown("there is no GPU")
        return
    if only == "tests":
        gpu_tests.run_beside(ledger, gpu_tests.BESIDE)
    else:
        with tempfile.TemporaryDirectory(prefix="headrace-gpu-", ignore_cleanup_errors=True) as folder:
            _measure(ledger, Path(folder), seconds, with_tests=only is None)
    if only != "measurements":
        for name in gpu_tests.LONG if only is None else (*gpu_tests.ALONE, *gpu_tests.LONG):
            gpu_tests.run_file(ledger, name)


def _check(ledger: Ledger, there: bool) -> None:
    with ledger.showing("headrace check --gpu") as showing:
        showing.due()
        status, said = ended([sys.executable, "-m", "headrace", "check", "--gpu"], min(120.0, ledger.left_s))
        showing.values["output"] = said
        showing.text = last_line(said)
        if there and status:
            raise AssertionError(f"exit {status}: {showing.text}")
        if not there:
            raise NotShown(f"it says: {showing.text}")


def _measure(ledger: Ledger, folder: Path, seconds: float, *, with_tests: bool) -> None:
    """The chief forms, the tests that need the GPU for themselves, and the other forms."""
    with ledger.showing("everything for the measurements imports"):
        from loadtests.gpu import serving, show
    if ledger.entries[-1].outcome != SHOWN:
        return
    run = show.Run(ledger, folder, seconds)
    with ThreadPoolExecutor(1) as beside:
        tests = beside.submit(gpu_tests.run_beside, ledger, gpu_tests.BESIDE if with_tests else ())
        show.prepare(run)
        tests.result()
    repository = folder / "repository"
    repository.mkdir()
    with serving.Serving(repository, folder / "server.log") as first:
        show.measure_chief(run, first, repository)
    for name in gpu_tests.ALONE if with_tests else ():
        gpu_tests.run_file(ledger, name)
    with serving.Serving(repository, folder / "server.log") as second:
        show.measure_others(run, second, repository)
    with ledger.showing("servers end well"):
        problems = [*first.ended_badly, *second.ended_badly]
        assert not problems, "; ".join(problems)


# What ``show.py`` shows, as it is listed where there is no GPU.
_LEFT = (
    "every form answers within its budget of double precision",
    "throughput and p50/p99 of each form, beside its bare loop and PyTorch eager fp32",
    "TensorRT fp16 is at least 4 x eager fp32",
    "served throughput is at least 95 % of the bare loop",
    "tensors in their clients' memory on the GPU",
    "workers killed under load lose nothing",
    "memory of the GPU comes back after an unload",
    "GPU metrics",
)

if __name__ == "__main__":
    sys.exit(main())

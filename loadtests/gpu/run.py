"""Everything that needs a GPU, shown in one run: ``python -m loadtests.gpu.run``. The table comes last.

The machine may reach nothing: wheels that it lacks come along as parts (``--parts``, see parts.py).
"""

import argparse
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loadtests.gpu import parts
from loadtests.gpu.ledger import SHOWN, Ledger, NotShown

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"


def main() -> int:
    """Show what can be shown here; returns 1 where something failed, or there is no GPU at all."""
    asked = _arguments()
    _bring_packages(asked.parts)
    ledger = Ledger(asked.budget, lambda line: print(line, flush=True))
    facts = _show(ledger, asked.seconds)
    print("\n" + ledger.table())
    path = asked.out / f"{str(facts['at'])[:19].replace(':', '')}.json"
    ledger.write(path, facts)
    print(f"raw results: {path}")
    nothing = all(entry.outcome != SHOWN for entry in ledger.entries)
    return 1 if ledger.failed or nothing else 0


def _arguments() -> argparse.Namespace:
    # Of the standard library: what the machine lacks is there only when this has been read.
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=Path, action="append", default=[], help="a folder of parts with wheels")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the raw results go")
    parser.add_argument("--seconds", type=float, default=4.0, help="of load for each measurement")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds after which nothing new is begun")
    return parser.parse_args()


def _bring_packages(folders: list[Path]) -> None:
    """Install what was brought, and have this process and those that it starts find it, and Headrace."""
    paths = []
    if folders:
        site = tempfile.mkdtemp(prefix="headrace-gpu-site-")
        for folder in folders:
            parts.install(folder, Path(site))
        paths.append(site)
    if find_spec("headrace") is None:
        paths += [str(ROOT / "server"), str(ROOT / "backends")]
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])


def _show(ledger: Ledger, seconds: float) -> dict[str, Any]:
    from loadtests.gpu import machine

    facts = machine.describe()
    with ledger.showing("a GPU that can be used") as showing:
        machine.require_gpu(facts)
        showing.values = facts["driver"]
        showing.text = ", ".join(
            f"{gpu['name']}, compute capability {gpu['capability']}" for gpu in facts["driver"]["gpus"]
        )
    there = ledger.entries[-1].outcome == SHOWN
    with ledger.showing("headrace check --gpu") as showing:
        showing.due()
        done = _run("-m", "headrace", "check", "--gpu", timeout_s=180)
        showing.values["output"] = done.stdout
        showing.text = (done.stdout.splitlines() or [done.stderr])[-1]
        if there and done.returncode:
            raise AssertionError(f"exit {done.returncode}: {showing.text}")
        if not there:
            raise NotShown(f"it says: {showing.text}")
    _show_tests(ledger)
    if not there:
        for what in _LEFT:
            with ledger.showing(what):
                raise NotShown("there is no GPU")
        return facts
    from loadtests.gpu import show

    with tempfile.TemporaryDirectory(prefix="headrace-gpu-") as folder:
        show.everything(ledger, Path(folder), seconds)
    return facts


# What each file of tests shows, the quick ones first: one that takes too long leaves the others their lines.
_TESTS = {
    "test_driver.py": "the driver: memory, streams, graphs",
    "test_other_backends.py": "ONNX Runtime and PyTorch answer as on the CPU",
    "test_tensorrt.py": "TensorRT: engines, profiles, graphs, the cache",
    "test_shared_gpus.py": "a GPU by its UUID, a limit on its memory, full memory and a lost GPU",
    "test_clients_memory.py": "clients' tensors in the memory of a GPU",
    "test_serving.py": "workers that are killed, GPU metrics",
    "test_optimizing.py": "a model is optimised on its GPU, and the plan is served; a file; larger batches",
}


def _show_tests(ledger: Ledger) -> None:
    for name, what in _TESTS.items():
        _show_file(ledger, name, what)


def _show_file(ledger: Ledger, name: str, what: str) -> None:
    with ledger.showing(f"tests/gpu/{name}: {what}") as showing:
        showing.due()
        done = _run("-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", f"tests/gpu/{name}", timeout_s=300)
        showing.values["output"] = done.stdout[-8000:]
        last = (done.stdout.strip().splitlines() or ["no output"])[-1]
        if done.returncode not in (0, 5):
            raise AssertionError(last)
        if " passed" not in last:
            raise NotShown(last)
        showing.text = last


def _run(*arguments: str, timeout_s: float) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False
    )


# What ``show.everything`` shows, as it is listed where there is no GPU.
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

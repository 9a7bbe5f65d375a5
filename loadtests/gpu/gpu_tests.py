"""The files of tests/gpu, a line each in the run's table."""

import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from loadtests.gpu.ledger import OVER, Ledger, NotShown
from loadtests.gpu.own_process import StepFailed, ended, last_line

# Those that mind nobody else on the GPU: they run while files are made, and nothing is measured.
BESIDE = {
    "test_driver.py": "the driver: memory, streams, graphs",
    "test_other_backends.py": "ONNX Runtime and PyTorch answer as on the CPU",
    "test_clients_memory.py": "clients' tensors in the memory of a GPU",
    "test_serving.py": "workers that are killed, GPU metrics",
}
# Those that look at all that is in use of the GPU's memory.
ALONE = {
    "test_tensorrt.py": "TensorRT: engines, profiles, graphs, the cache",
    "test_shared_gpus.py": "a GPU by its UUID, a limit on its memory, full memory and a lost GPU",
}
# Minutes: what there is left of the time.
LONG = {"test_optimizing.py": "a model is optimised on its GPU, and the plan is served; a file; larger batches"}
EVERY = {**BESIDE, **ALONE, **LONG}

_TIMEOUT_S, _LONG_TIMEOUT_S = 150.0, 600.0
_KEPT_CHARACTERS = 8000


def run_beside(ledger: Ledger, names: Iterable[str]) -> None:
    """Files at the same time."""
    with ThreadPoolExecutor(len(BESIDE)) as threads:
        list(threads.map(lambda name: run_file(ledger, name), names))


def run_file(ledger: Ledger, name: str) -> None:
    """One file."""
    with ledger.showing(f"tests/gpu/{name}: {EVERY[name]}") as showing:
        showing.due()
        command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", f"tests/gpu/{name}"]
        status, said = ended(command, min(_LONG_TIMEOUT_S if name in LONG else _TIMEOUT_S, ledger.left_s))
        showing.values["output"] = said[-_KEPT_CHARACTERS:]
        if status is None:
            raise StepFailed(f"ended before it was through: {last_line(said)}") if ledger.left_s else NotShown(OVER)
        last = last_line(said)
        if status not in (0, 5):
            raise AssertionError(last)
        if " passed" not in last:
            raise NotShown(last)
        showing.text = last

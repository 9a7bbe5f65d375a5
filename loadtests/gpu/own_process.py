"""A process for each thing that is measured: one that breaks its GPU, hangs or runs out of memory ends alone."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from loadtests.gpu.ledger import NotShown

ROOT = Path(__file__).parents[2]
_TOLD_CHARACTERS = 300


class StepFailed(Exception):
    """A step raised something, died or took too long; the message says what."""


def ended(command: Sequence[str], timeout_s: float) -> tuple[int | None, str]:
    """Run a command in the project's folder; its status, None where it had to be ended, and all that it said."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(max(timeout_s, 0.1))
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with suppress(ProcessLookupError):  # whoever it has left behind would share the GPU with the next
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(0)
        return status, log.read().decode(errors="replace")


def run_step(step: str, given: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
    """What a function of ``steps.py`` gives for these arguments.

    Raises:
        NotShown: it raised that.
        StepFailed: it gave nothing.
    """
    with tempfile.TemporaryDirectory(prefix="headrace-step-") as folder:
        answer = Path(folder, "answer.json")
        command = [sys.executable, "-m", "loadtests.gpu.steps", step, json.dumps(given), str(answer)]
        started = time.monotonic()
        status, said = ended(command, timeout_s)
        if status is None:
            raise StepFailed(f"it was ended after {time.monotonic() - started:.0f} s")
        if status or not answer.exists():
            how = f"by signal {-status}" if status < 0 else f"with {status}"
            raise StepFailed(f"its process ended {how}: {last_line(said)}")
        found: dict[str, Any] = json.loads(answer.read_text())
    if "not_shown" in found:
        raise NotShown(found["not_shown"])
    if "failed" in found:
        raise StepFailed(found["failed"])
    return found


def last_line(said: str) -> str:
    """The last line with something in it, cut to a length that a table can have."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1][:_TOLD_CHARACTERS] if lines else "it said nothing"

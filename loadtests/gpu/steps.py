"""What is done in a process of its own: ``python -m loadtests.gpu.steps NAME ARGUMENTS ANSWER``, JSON both.

Libraries are imported where they are needed: most steps do without PyTorch, which takes seconds.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from headrace_backends.base import BackendUnavailable, LoadError
from loadtests.answer import BadResponse
from loadtests.gpu import bare, forms, served, subjects
from loadtests.gpu.ledger import NotShown
from loadtests.gpu.served import Address
from loadtests.gpu.subjects import MAX_ROWS

Given = Mapping[str, Any]


def export(given: Given) -> dict[str, Any]:
    """A subject's files."""
    from loadtests.gpu import export as exporting

    exporting.export(subjects.subject_of(given["subject"]), Path(given["files"]))
    return {"files": sorted(one.name for one in Path(given["files"]).iterdir())}


def reference(given: Given) -> dict[str, Any]:
    """A subject's answers in double precision."""
    from loadtests.gpu import export as exporting

    exporting.write_reference(subjects.subject_of(given["subject"]), Path(given["files"]))
    return {}


def build(given: Given) -> dict[str, Any]:
    """Load a form for the sake of what is kept: engines and compiled code."""
    started = time.monotonic()
    backend = _load(given)
    notes = backend.notes()
    backend.close()
    return {"load_s": time.monotonic() - started, "notes": notes}


def eager(given: Given) -> dict[str, Any]:
    """PyTorch in eager mode."""
    from loadtests.gpu import eager as measuring

    return measuring.measure(subjects.subject_of(given["subject"]), MAX_ROWS, given["seconds"] / 2)


def loop(given: Given) -> dict[str, Any]:
    """A form's answers against double precision, and the speed of its loop."""
    subject, seconds = subjects.subject_of(given["subject"]), given["seconds"]
    started = time.monotonic()
    backend = _load(given)
    found: dict[str, Any] = {"load_s": time.monotonic() - started, "notes": backend.notes()}
    found |= bare.check(backend, subject, subjects.reference(Path(given["files"])))
    found["rows_per_s"] = bare.rows_per_s(backend, subject, MAX_ROWS, seconds / 2)
    if forms.form_of(given["form"]).backend == "tensorrt":
        try:
            found["engine_ms"] = bare.engine_ms(backend, subject, seconds / 4)
        except Exception as error:  # noqa: BLE001 - the loop is shown all the same
            found["engine_problem"] = f"{type(error).__name__}: {error}"
    found["single_rows_per_s"] = bare.rows_per_s(backend, subject, 1, seconds / 4)
    backend.close()
    return found


def serve(given: Given) -> dict[str, Any]:
    """A served form's answers, and its speed in several kinds of load."""
    address, model, subject = _target(given)
    wanted, seconds = subjects.reference(Path(given["files"])), given["seconds"]
    rows = subjects.first_rows(subject.inputs(MAX_ROWS, subjects.CHECKED), 3)
    found: dict[str, Any] = subjects.compare(served.ask(address, model, rows), wanted)
    one = subjects.first_rows(rows, 1)
    found["alone"] = asdict(served.load_up(address, model, one, 1, seconds / 3))
    found |= _saturate(address, model, subject, seconds)
    for _ in range(3):
        with suppress(BadResponse):  # no answer at all: some libraries choose kernels anew for every size of batch
            found["singles"] = asdict(served.load_up(address, model, one, served.SINGLES, seconds / 2))
            return found
    raise AssertionError(f"{served.SINGLES} clients with a row each had no answer for {seconds:.0f} s")


def saturate(given: Given) -> dict[str, Any]:
    """A served form's rows/s from clients that never let it wait."""
    address, model, subject = _target(given)
    return _saturate(address, model, subject, given["seconds"])


def _saturate(address: Address, model: str, subject: subjects.Subject, seconds: float) -> dict[str, Any]:
    inputs = subject.inputs(served.ROWS, subjects.CHECKED)
    body = served.load_up(address, model, inputs, served.SATURATING, seconds / 2)
    found = {"body": asdict(body), "body_rows_per_s": body.requests_per_s * served.ROWS}
    with served.placed(address, model, inputs) as request:
        there = served.load_up(address, model, {}, served.SATURATING, seconds, request)
    return found | {"shared": asdict(there), "shared_rows_per_s": there.requests_per_s * served.ROWS}


def kill(given: Given) -> dict[str, Any]:
    """What clients see while the workers are killed."""
    address, model, subject = _target(given)
    return asdict(served.kill_workers_under_load(address, model, subject.inputs(1, 3), given["seconds"]))


def lend(given: Given) -> dict[str, Any]:
    """A form's answers through memory of the GPU that is this process's."""
    address, model, subject = _target(given)
    inputs = subjects.first_rows(subject.inputs(MAX_ROWS, subjects.CHECKED), served.ROWS)
    received, found = served.through_lent_memory(address, model, inputs, given["seconds"] / 2)
    return found | subjects.compare(received, subjects.reference(Path(given["files"])))


def _load(given: Given) -> Any:
    subject = subjects.subject_of(given["subject"])
    try:
        return forms.load(forms.form_of(given["form"]), subject, Path(given["files"]))
    except BackendUnavailable as unavailable:
        raise NotShown(str(unavailable)) from unavailable
    except LoadError as refused:
        if "needs an onnxruntime with CUDA" in str(refused):
            raise NotShown(str(refused)) from refused
        raise


def _target(given: Given) -> tuple[Address, str, subjects.Subject]:
    return Address(**given["address"]), given["model"], subjects.subject_of(given["subject"])


STEPS: Mapping[str, Callable[[Given], dict[str, Any]]] = {
    one.__name__: one for one in (export, reference, build, eager, loop, serve, saturate, kill, lend)
}


def main() -> None:
    """Entry point: whatever is raised is an answer too."""
    name, given, answer = sys.argv[1:]
    try:
        found = STEPS[name](json.loads(given))
    except NotShown as error:
        found = {"not_shown": str(error)}
    except Exception as error:  # noqa: BLE001 - an answer too
        found = {"failed": f"{type(error).__name__}: {error}"}
    Path(answer).write_text(json.dumps(found))


if __name__ == "__main__":
    main()

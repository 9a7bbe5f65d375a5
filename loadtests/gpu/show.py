"""The things that are shown on a GPU, one after the other, the most telling first."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headrace.core.tensor import Array
from headrace_backends.base import BackendUnavailable, LoadError
from loadtests.gpu import bare, served
from loadtests.gpu.forms import FORMS, Form, place
from loadtests.gpu.ledger import Ledger, NotShown
from loadtests.gpu.subjects import MAX_ROWS, SUBJECTS, Subject, error, export, reference
from loadtests.server import Server

_EAGER_GOAL, _BARE_GOAL = 4.0, 0.95
_MEMORY_SLACK_BYTES = 64 << 20  # that a driver may keep to itself
_FAST = "tensorrt-fp16-graphs"

Measured = dict[tuple[str, str], dict[str, float]]  # by subject and form


def everything(ledger: Ledger, folder: Path, seconds: float) -> None:
    """Export, measure without a server, serve, measure, break."""
    files: dict[str, Path] = {}
    repository = folder / "repository"
    repository.mkdir()
    for subject in SUBJECTS:
        with ledger.showing(f"{subject.name}: exported") as showing:
            showing.due()
            export(subject, folder / subject.name)
            files[subject.name] = folder / subject.name
            showing.text = ", ".join(sorted(one.name for one in files[subject.name].iterdir()))
    measured: Measured = {}
    here = [subject for subject in SUBJECTS if subject.name in files]
    for subject in here:
        _eager(ledger, subject, seconds, measured)
        for form in FORMS:
            _bare(ledger, subject, form, files[subject.name], seconds, measured)
    for subject in here:
        for form in FORMS:
            place(form, subject, files[subject.name], repository)
    options = ("--model-control", "explicit", "--load-model", "*", "--allow-client-shm")
    with Server(repository, folder / "server.log", options, ready_timeout_s=600) as server:
        for subject in here:
            for form in FORMS:
                _serve(ledger, server, subject, form, seconds, measured)
        for subject in here:
            _goals(ledger, subject, measured)
            _lent(ledger, server, subject, seconds)
            _mortality(ledger, server, subject, seconds)
        if here:
            _memory(ledger, server, here[0])
        _metrics(ledger, server)


def _eager(ledger: Ledger, subject: Subject, seconds: float, measured: Measured) -> None:
    with ledger.showing(f"{subject.name}: PyTorch eager fp32") as showing:
        showing.due()
        milliseconds = bare.eager_ms(subject, MAX_ROWS, seconds / 2)
        rate = MAX_ROWS / milliseconds * 1000
        measured[subject.name, "eager"] = {"bare": rate}
        showing.values = {"ms": milliseconds, "rows_per_s": rate}
        showing.text = f"{rate:.0f} rows/s in batches of {MAX_ROWS}, by CUDA events, without copies"


def _bare(ledger: Ledger, subject: Subject, form: Form, files: Path, seconds: float, measured: Measured) -> None:
    """In this process: the answers against double precision, and the loop's speed."""
    with ledger.showing(f"{subject.name}: {form.name} in a bare loop") as showing:
        showing.due()
        try:
            backend = bare.load(form, subject, files)
        except BackendUnavailable as unavailable:
            raise NotShown(str(unavailable)) from unavailable
        except LoadError as refused:
            if "needs an onnxruntime with CUDA" not in str(refused):
                raise
            raise NotShown(str(refused)) from refused
        try:
            worst = 0.0
            for rows in (1, 3, MAX_ROWS, 3, 1, 3, 1, MAX_ROWS):  # graphs of several sizes in turn
                inputs = subject.inputs(rows, 100 + rows)
                answer = backend.execute(inputs, ())
                assert not isinstance(answer, list | tuple)
                worst = max(worst, error(_only(answer), reference(subject, inputs)))
            rate = bare.rows_per_s(backend, subject, MAX_ROWS, seconds / 2)
            single = bare.rows_per_s(backend, subject, 1, seconds / 4)
            notes = backend.notes()
        finally:
            backend.close()
        measured[subject.name, form.name] = {"bare": rate, "error": worst}
        showing.values = {"rows_per_s": rate, "single_rows_per_s": single, "error": worst, "notes": notes}
        showing.text = f"error {worst:.1e}, {rate:.0f} rows/s in batches of {MAX_ROWS}, {single:.0f} one by one"
        assert worst <= form.budget, f"error {worst:.2e}, allowed are {form.budget:.0e}"


def _only(answer: Mapping[str, Array]) -> Array:
    """The one output, whatever the exporter called it."""
    (array,) = answer.values()
    return array


def _serve(ledger: Ledger, server: Server, subject: Subject, form: Form, seconds: float, measured: Measured) -> None:
    with ledger.showing(f"{subject.name}: {form.name} served") as showing:
        showing.due()
        model = f"{subject.name}-{form.name}"
        problem = served.reason(server, model)
        if problem:
            raise NotShown(problem)
        inputs = subject.inputs(1, 7)
        off = error(served.ask(server, model, inputs), reference(subject, inputs))
        assert off <= form.budget, f"error {off:.2e}, allowed are {form.budget:.0e}"
        alone = served.load_up(server, model, inputs, 1, seconds / 2)
        full = served.load_up(server, model, inputs, served.SATURATING, seconds)
        assert not full.errors, full.errors
        measured.setdefault((subject.name, form.name), {})["served"] = full.requests_per_s
        showing.values = {"error": off, "alone": served.values(alone), "saturated": served.values(full)}
        showing.text = f"{served.told(full)}; alone p50 {alone.latency.p50_ms:.2f} ms"


def _goals(ledger: Ledger, subject: Subject, measured: Measured) -> None:
    eager, fast = measured.get((subject.name, "eager"), {}), measured.get((subject.name, _FAST), {})
    with ledger.showing(f"{subject.name}: {_FAST} is at least {_EAGER_GOAL:.0f} x eager fp32") as showing:
        ratio = _ratio(fast, "bare", eager, "bare")
        showing.text = f"{ratio:.2f} x"
        showing.values["ratio"] = ratio
        assert ratio >= _EAGER_GOAL, showing.text
    with ledger.showing(f"{subject.name}: served {_FAST} is at least {_BARE_GOAL:.0%} of its bare loop") as showing:
        ratio = _ratio(fast, "served", fast, "bare")
        showing.text = f"{ratio:.0%}"
        showing.values["ratio"] = ratio
        assert ratio >= _BARE_GOAL, showing.text


def _ratio(one: dict[str, float], of: str, other: dict[str, float], to: str) -> float:
    if of not in one or to not in other:
        raise NotShown("one of the two was not measured")
    return one[of] / other[to]


def _working(server: Server, subject: Subject) -> str:
    """A model of this subject that is served, the fastest there is."""
    names = [_FAST, *(form.name for form in FORMS)]
    for name in names:
        if not served.reason(server, f"{subject.name}-{name}"):
            return f"{subject.name}-{name}"
    raise NotShown("no form of it is served")


def _lent(ledger: Ledger, server: Server, subject: Subject, seconds: float) -> None:
    with ledger.showing(f"{subject.name}: tensors in its client's memory on the GPU") as showing:
        showing.due()
        model = _working(server, subject)
        inputs = subject.inputs(MAX_ROWS, 9)
        received, found = served.through_lent_memory(server, model, inputs, seconds / 4)
        off = error(received, reference(subject, inputs))
        showing.values = {"error": off, **found}
        showing.text = (
            f"{model}, {MAX_ROWS} rows by one client: {found['lent_ms']:.2f} ms, in the request's body "
            f"{found['body_ms']:.2f} ms, error {off:.1e}"
        )
        budget = max(form.budget for form in FORMS if model == f"{subject.name}-{form.name}")
        assert off <= budget, f"error {off:.2e}, allowed are {budget:.0e}"


def _mortality(ledger: Ledger, server: Server, subject: Subject, seconds: float) -> None:
    with ledger.showing(f"{subject.name}: workers killed under load lose nothing") as showing:
        showing.due()
        model = _working(server, subject)
        result = served.kill_workers_under_load(server, model, subject.inputs(1, 3), max(seconds, 15.0))
        showing.values = served.values(result)
        showing.text = f"{model}: {served.told(result)}, errors {result.errors}"
        assert not result.errors, result.errors


def _memory(ledger: Ledger, server: Server, subject: Subject) -> None:
    with ledger.showing("memory of the GPU comes back after an unload") as showing:
        showing.due()
        model = _working(server, subject)
        served.ask(server, model, subject.inputs(MAX_ROWS, 1))
        found: dict[str, Any] = showing.values
        found["loaded"] = _used(server)
        served.change(server, model, "unload")
        found["unloaded"] = _settled(server, found["loaded"])
        served.change(server, model, "load")
        served.ask(server, model, subject.inputs(MAX_ROWS, 1))
        served.change(server, model, "unload")
        found["again"] = _settled(server, found["loaded"])
        showing.text = ", ".join(f"{name} {nbytes / 2**20:.0f} MiB" for name, nbytes in found.items())
        assert found["unloaded"] < found["loaded"], showing.text
        assert found["again"] <= found["unloaded"] + _MEMORY_SLACK_BYTES, showing.text


def _used(server: Server) -> float:
    used = served.used_bytes(served.metrics(server))
    if used is None:
        raise NotShown("there are no GPU metrics: pip install nvidia-ml-py")
    return used


def _settled(server: Server, before: float) -> float:
    """What is in use once a worker has gone; metrics are seconds old."""
    served.wait_until(lambda: _used(server) < before, 15.0)
    served.wait_until(lambda: False, 5.0)
    return _used(server)


def _metrics(ledger: Ledger, server: Server) -> None:
    with ledger.showing("GPU metrics") as showing:
        names = (
            "nv_gpu_utilization",
            "nv_gpu_memory_total_bytes",
            "nv_gpu_memory_used_bytes",
            "nv_gpu_power_usage",
            "nv_energy_consumption",
        )
        page = served.metrics(server)
        lines = [line for line in page.splitlines() if line.startswith(names)]
        if not lines:
            raise NotShown("there are none: pip install nvidia-ml-py")
        missing = [name for name in names if not any(line.startswith(name + "{") for line in lines)]
        showing.values["lines"] = lines
        showing.text = f"{len(lines)} samples" + (f"; not told by this GPU: {', '.join(missing)}" if missing else "")

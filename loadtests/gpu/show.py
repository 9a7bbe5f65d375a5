"""The things that are shown on a GPU, the most telling first: what a run is for is there if it is cut short."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loadtests.gpu import served
from loadtests.gpu.forms import CHIEF, OTHERS, Form, place
from loadtests.gpu.ledger import OVER, SHOWN, Ledger, NotShown, Showing
from loadtests.gpu.own_process import StepFailed, run_step
from loadtests.gpu.served import Address
from loadtests.gpu.serving import SLACK_BYTES, Serving
from loadtests.gpu.subjects import MAX_ROWS, SUBJECTS, Subject

_EAGER_GOAL, _BARE_GOAL = 4.0, 0.95
_EXPORT_S, _BUILD_S, _STEP_S = 240.0, 150.0, 60.0  # what a step may take at most, beside its measuring
_KILL_S = 12.0
_FAST = CHIEF[0]


@dataclass(slots=True)
class Run:
    """What is known so far. ``measured`` has rows/s and the like, by subject and form.

    ``broken`` are the subjects of which a model has had its workers killed.
    """

    ledger: Ledger
    folder: Path
    seconds: float
    measured: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)

    def files(self, subject: Subject) -> Path:
        """Where a subject's files are."""
        return self.folder / subject.name

    def step(self, step: str, subject: Subject, timeout_s: float, **given: Any) -> dict[str, Any]:
        """Have something done in a process of its own, as long as the run's time allows."""
        arguments = {"subject": subject.name, "files": str(self.files(subject)), "seconds": self.seconds, **given}
        try:
            return run_step(step, arguments, min(timeout_s, self.ledger.left_s))
        except StepFailed:
            if not self.ledger.left_s:
                raise NotShown(OVER) from None
            raise


# -- before anything is measured: all at once -----------------------------------------------------------------


def prepare(run: Run, subjects: tuple[Subject, ...] = SUBJECTS) -> None:
    """The files, and what forms keep of their first load; nobody is timed meanwhile."""
    with ThreadPoolExecutor(2 * len(subjects)) as threads:
        list(threads.map(lambda subject: _prepare(run, subject), subjects))


def _prepare(run: Run, subject: Subject) -> None:
    run.files(subject).mkdir()
    with ThreadPoolExecutor(8) as threads:
        exact = threads.submit(_reference, run, subject)
        with run.ledger.showing(f"{subject.name}: exported") as showing:
            showing.due()
            showing.text = ", ".join(run.step("export", subject, _EXPORT_S)["files"])
        if run.ledger.outcome(f"{subject.name}: exported") == SHOWN:
            suited = [form for form in (*CHIEF, *OTHERS) if form.suits(subject)]
            list(threads.map(lambda form: _build(run, subject, form), suited))
        exact.result()


def _reference(run: Run, subject: Subject) -> None:
    with run.ledger.showing(f"{subject.name}: answers in double precision on the CPU") as showing:
        showing.due()
        run.step("reference", subject, _EXPORT_S)
        showing.text = f"{MAX_ROWS} rows"


def _build(run: Run, subject: Subject, form: Form) -> None:
    if not form.takes_building:
        return
    with run.ledger.showing(f"{subject.name}: {form.name} built") as showing:
        showing.due()
        showing.values = run.step("build", subject, _BUILD_S, form=form.name)
        showing.text = f"loads in {showing.values['load_s']:.0f} s: {'; '.join(showing.values['notes'])}"


# -- one thing after the other --------------------------------------------------------------------------------


def measure_chief(run: Run, serving: Serving, repository: Path) -> None:
    """The forms that a run is for: their loops, served, killed, unloaded, and the goals."""
    for subject in _exported(run):
        _eager(run, subject)
        for form in CHIEF:
            _measure(run, serving, repository, subject, form)
        _twice(run, serving, repository, subject)
        _goals(run, subject)


def measure_others(run: Run, serving: Serving, repository: Path) -> None:
    """The other forms: their loops, and served."""
    for form in OTHERS:
        for subject in _exported(run):
            if form.suits(subject):
                _measure(run, serving, repository, subject, form)


def _exported(run: Run) -> list[Subject]:
    return [one for one in SUBJECTS if run.ledger.outcome(f"{one.name}: exported") == SHOWN]


def _eager(run: Run, subject: Subject) -> None:
    with run.ledger.showing(f"{subject.name}: PyTorch eager fp32") as showing:
        showing.due()
        found = showing.values = run.step("eager", subject, _STEP_S)
        run.measured[subject.name, "eager"] = found
        showing.text = (
            f"{found['rows_per_s']:.0f} rows/s in batches of {MAX_ROWS} with copies; without, {found['ms']:.2f} ms "
            f"by CUDA events, which are {1000 * MAX_ROWS / found['ms']:.0f} rows/s"
        )


def _measure(run: Run, serving: Serving, repository: Path, subject: Subject, form: Form) -> None:
    loop = f"{subject.name}: {form.name} in a bare loop"
    with run.ledger.showing(loop) as showing:
        showing.due()
        found = showing.values = run.step("loop", subject, _BUILD_S, form=form.name)
        run.measured[subject.name, form.name] = {"loop": found}
        engine = f", {found['engine_ms']:.2f} ms without copies" if "engine_ms" in found else ""
        showing.text = (
            f"error {found['error']:.1e}, {found['rows_per_s']:.0f} rows/s in batches of {MAX_ROWS}{engine}, "
            f"{found['single_rows_per_s']:.0f} one by one"
        )
        _within(found, form)
    with run.ledger.showing(f"{subject.name}: {form.name} is loaded, and its memory comes back") as showing:
        showing.due()
        if run.ledger.outcome(loop) != SHOWN:
            raise NotShown("its bare loop was not shown")
        model = place(form, subject, run.files(subject), repository)
        with serving.loaded(model, run.ledger.left_s) as (address, facts):
            showing.values = facts
            _served(run, address, model, subject, form)
            if subject.name not in run.broken:  # once is enough
                run.broken.add(subject.name)
                _mortality(run, address, model, subject)
                _lent(run, address, model, subject, form)
        _memory(showing)


def _served(run: Run, address: Address, model: str, subject: Subject, form: Form) -> None:
    with run.ledger.showing(f"{subject.name}: {form.name} served") as showing:
        showing.due()
        found = showing.values = _step_at("serve", run, address, model, subject)
        run.measured[subject.name, form.name]["served"] = found
        singles, alone = found["singles"], found["alone"]
        ratio = _rate(found) / run.measured[subject.name, form.name]["loop"]["rows_per_s"]
        showing.text = (
            f"{_rate(found):.0f} rows/s at saturation, {ratio:.0%} of the bare loop; {served.SINGLES} clients with a "
            f"row each {singles['requests_per_s']:.0f} rows/s, p50 {singles['latency']['p50_ms']:.1f} ms, p99 "
            f"{singles['latency']['p99_ms']:.1f} ms; alone p50 {alone['latency']['p50_ms']:.2f} ms; "
            f"error {found['error']:.1e}"
        )
        _within(found, form)
        for load in ("alone", "singles", "shared", "body"):
            assert not found[load]["errors"], found[load]["errors"]


def _step_at(step: str, run: Run, address: Address, model: str, subject: Subject, **given: Any) -> dict[str, Any]:
    where = {"http_port": address.http_port, "metrics_port": address.metrics_port, "pid": address.pid}
    return run.step(step, subject, _STEP_S + 5 * run.seconds, address=where, model=model, **given)


def _within(found: dict[str, Any], form: Form) -> None:
    assert found["error"] <= form.budget, f"error {found['error']:.2e}, allowed are {form.budget:.0e}"


def _lent(run: Run, address: Address, model: str, subject: Subject, form: Form) -> None:
    with run.ledger.showing(f"{subject.name}: tensors in its client's memory on the GPU") as showing:
        showing.due()
        found = showing.values = _step_at("lend", run, address, model, subject)
        showing.text = (
            f"{served.ROWS} rows by one client: {found['lent_ms']:.2f} ms, in the request's body "
            f"{found['body_ms']:.2f} ms, error {found['error']:.1e}"
        )
        _within(found, form)
    if subject is SUBJECTS[0]:
        _metrics(run.ledger, address)


def _mortality(run: Run, address: Address, model: str, subject: Subject) -> None:
    with run.ledger.showing(f"{model}: workers killed under load lose nothing") as showing:
        showing.due()
        found = showing.values = _step_at("kill", run, address, model, subject, seconds=_KILL_S)
        latency = found["latency"]
        showing.text = (
            f"{found['server_processes_gone']} killed, {found['requests_per_s']:.0f} rows/s, p50 "
            f"{latency['p50_ms']:.1f} ms, the longest {latency['max_ms'] / 1000:.1f} s, errors {found['errors']}"
        )
        assert not found["errors"], found["errors"]
        assert found["server_processes_gone"], "no worker was killed"


def _memory(showing: Showing) -> None:
    facts = showing.values
    showing.text = f"loaded in {facts['load_s']:.0f} s"
    if facts["before_bytes"] is None:
        showing.text += "; NVML does not tell what is in use: pip install nvidia-ml-py"
        return
    before, loaded, after = (facts[f"{when}_bytes"] / 2**20 for when in ("before", "loaded", "after"))
    showing.text += f"; {before:.0f} MiB in use before, {loaded:.0f} MiB with it, {after:.0f} MiB after"
    assert loaded > before, showing.text
    assert facts["after_bytes"] <= facts["before_bytes"] + SLACK_BYTES, showing.text


def _twice(run: Run, serving: Serving, repository: Path, subject: Subject) -> None:
    """Two instances of the fastest form: one copies while the other computes."""
    with run.ledger.showing(f"{subject.name}: {_FAST.name} served by two instances") as showing:
        showing.due()
        measured = run.measured.get((subject.name, _FAST.name), {})
        if "served" not in measured:
            raise NotShown("it was not served by one")
        model = place(_FAST, subject, run.files(subject), repository, instances=2)
        with serving.loaded(model, run.ledger.left_s) as (address, _):
            found = showing.values = _step_at("saturate", run, address, model, subject)
        measured["twice"] = found
        ratio = _rate(found) / measured["loop"]["rows_per_s"]
        showing.text = f"{_rate(found):.0f} rows/s at saturation, {ratio:.0%} of the bare loop"


def _rate(found: dict[str, Any]) -> float:
    return float(max(found["shared_rows_per_s"], found["body_rows_per_s"]))


def _goals(run: Run, subject: Subject) -> None:
    with run.ledger.showing(f"{subject.name}: {_FAST.name} is at least {_EAGER_GOAL:.0f} x eager fp32") as showing:
        eager = run.measured.get((subject.name, "eager"))
        loop = run.measured.get((subject.name, _FAST.name), {}).get("loop")
        if eager is None or loop is None:
            raise NotShown("one of the two was not measured")
        ratio = loop["rows_per_s"] / eager["rows_per_s"]
        showing.values = {"with_copies": ratio}
        showing.text = f"{ratio:.2f} x with copies there and back"
        if "engine_ms" in loop:
            ratio = showing.values["gpu"] = eager["ms"] / loop["engine_ms"]
            showing.text = f"{ratio:.2f} x on the GPU alone, {showing.text}"
        assert ratio >= _EAGER_GOAL, showing.text
    for form in CHIEF:
        goal = f"{subject.name}: served {form.name} is at least {_BARE_GOAL:.0%} of its bare loop"
        with run.ledger.showing(goal) as showing:
            measured = run.measured.get((subject.name, form.name), {})
            if "served" not in measured:
                raise NotShown("one of the two was not measured")
            rates = {name: _rate(measured[key]) for name, key in _INSTANCES.items() if key in measured}
            ratios = {name: rate / measured["loop"]["rows_per_s"] for name, rate in rates.items()}
            showing.values = ratios
            showing.text = ", ".join(f"{ratio:.0%} with {name}" for name, ratio in ratios.items())
            assert max(ratios.values()) >= _BARE_GOAL, showing.text


_INSTANCES = {"one instance": "served", "two": "twice"}


def _metrics(ledger: Ledger, address: Address) -> None:
    with ledger.showing("GPU metrics") as showing:
        names = (
            "nv_gpu_utilization",
            "nv_gpu_memory_total_bytes",
            "nv_gpu_memory_used_bytes",
            "nv_gpu_power_usage",
            "nv_energy_consumption",
        )
        page = served.metrics(address)
        lines = [line for line in page.splitlines() if line.startswith(names)]
        if not lines:
            raise NotShown("there are none: pip install nvidia-ml-py")
        missing = [name for name in names if not any(line.startswith(name + "{") for line in lines)]
        showing.values["lines"] = lines
        showing.text = f"{len(lines)} samples" + (f"; not told by this GPU: {', '.join(missing)}" if missing else "")

"""One candidate after the other beside the reference: is it right, and how fast is it?"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Self

import msgspec

from headrace.core.device import CPU
from headrace.core.machine_memory import read_memory
from headrace.core.model import Signature
from headrace.core.tensor import DataType
from headrace_backends.base import Array
from headrace_backends.optimize import halves
from headrace_backends.optimize.accuracy import Errors, Metric, MetricFailed
from headrace_backends.optimize.batch_forms import larger_rows, measured_rows
from headrace_backends.optimize.batches import filling, glance_sizes, judging_sizes
from headrace_backends.optimize.champion import Champion
from headrace_backends.optimize.clocking import Laps, Runner, race, speedup
from headrace_backends.optimize.examples import Example, Examples
from headrace_backends.optimize.findings import Fate, Point, Row
from headrace_backends.optimize.form import Form
from headrace_backends.optimize.goal import Goal
from headrace_backends.optimize.halves import Half, answered, refuse_silent, refuse_unsteady
from headrace_backends.optimize.memory_room import fits, groups
from headrace_backends.optimize.misfit import misfit
from headrace_backends.optimize.probes import NARROW, Probes
from headrace_backends.optimize.subject import Subject
from headrace_backends.optimize.trial import OutOfTime, Trial, TrialFailed
from headrace_backends.optimize.workshop import Artifact, Workshop

LOAD_TIMEOUT_S = 300.0
_RECORDED = 8
_CLEARLY = 0.85  # of the best so far: what is slower than that in a glance is not looked at again
_GLANCE = (3, 0.08)  # rounds and seconds of each
_LOOK = (7, 0.15)


class Contest:
    """Holds the reference's process and what it answered. A context manager.

    Processes other than the reference's are not waited for beyond the workshop's deadline: they are killed then.
    ``free_bytes`` tells the memory that is free now.
    """

    def __init__(
        self,
        subject: Subject,
        goal: Goal,
        workshop: Workshop,
        cpus: int,
        metric: Metric | None,
        free_bytes: Callable[[], int] = lambda: read_memory().free_bytes,
    ) -> None:
        self.subject = subject
        self.goal = goal
        self.workshop = workshop
        self.cpus = cpus
        self.signature: Signature
        self.first: Half
        self.held_back: Half
        self._metric = metric
        self._reference_misses = False  # the budget, which says something of the owner's labels
        self._free_bytes = free_bytes
        self._probes: Probes
        self._requests: Sequence[Example] = ()  # held-back ones: what a plan is checked with
        self._instance_bytes: dict[str, int] = {}  # what one process of a form takes, by the form's name
        self._recorded: dict[str, list[dict[str, Array]]] = {}  # answers of forms that were judged, by their names
        self._reference: Runner
        self._champion = Champion()
        self._open = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._champion.let_go()
        self._open.close()

    def load_reference(self) -> tuple[Signature, list[str], float]:
        """Load the model as it was dropped in.

        Raises:
            TrialFailed: it cannot be loaded.
        """
        self._reference, notes, seconds = self._load_reference()
        self.signature = self._reference.signature
        return self.signature, notes, seconds

    def pace(self, example: Example) -> tuple[float, int]:
        """The seconds that the reference takes for an example, and the bytes of that with its answer.

        Raises:
            TrialFailed: it refuses the example, or it died.
        """
        (trial,) = self._reference.trials
        trial.answer([example], halves.ANSWER_TIMEOUT_S)  # the first run allocates
        started = monotonic()
        (outputs,) = trial.answer([example], halves.ANSWER_TIMEOUT_S)
        return monotonic() - started, sum(array.nbytes for array in (*example.values(), *outputs.values()))

    def accepted(self, examples: Examples) -> Examples:
        """Those that the reference answers: recorded traffic may have requests in it that were refused."""
        places = []
        for place, one in enumerate(examples.inputs):
            try:
                self._reference.trials[0].answer([one], halves.ANSWER_TIMEOUT_S)
                places.append(place)
            except TrialFailed:
                self._revive()
        return examples.some(places)

    def measure_reference(self, first: Examples, held_back: Examples, notes: Sequence[str], load_s: float) -> Row:
        """The reference's answers, and its own row of the report.

        Raises:
            TrialFailed: it refuses the examples, its answers to them tell nothing or are others each time, or it died.
        """
        self.first = answered(self._reference, first, glance_sizes, len(first))
        refuse_unsteady(self._reference, self.first)
        most = self.signature.max_batch_size
        sizes = judging_sizes(max([most, *larger_rows(self.goal, self.subject, most)]))
        self.held_back = answered(self._reference, filling(held_back, sizes), judging_sizes, len(held_back))
        refuse_silent(self.signature, self.first, self.held_back)
        self._probes = Probes(self._reference, self.first.examples.inputs, on_gpu=self.subject.device != CPU)
        self._revive()
        self._requests = held_back.first(_RECORDED).inputs
        self._recorded[self.subject.reference.name] = self._record(self._reference)
        errors, judged = (half.errors(half.answers, self._metric) for half in (self.first, self.held_back))
        problem = self.goal.problem(judged)
        if problem and not self.goal.budget_tells(judged):
            raise TrialFailed(f"the budget cannot be met by any form: {problem}")
        self._reference_misses = problem is not None
        (laps,) = self._race([self._reference], _GLANCE)
        return Row(
            self.subject.reference,
            Fate.KEPT,
            "the model as it was dropped in" + (f", which is beyond the budget itself: {problem}" if problem else ""),
            1.0,
            laps.points(),
            errors,
            judged,
            self.subject.path.stat().st_size if self.subject.path.is_file() else None,
            self._weighed(self._reference),
            load_s=load_s,
            notes=tuple(notes),
        )

    def try_form(self, form: Form, timeout_s: float) -> Row:
        """Everything about one candidate, as far as it is worth it."""
        row = Row(form, Fate.FAILED)
        self._make_room()
        try:
            artifact = self.workshop.make(form.steps, self.signature, self.first.examples, timeout_s)
            row = _with(row, notes=artifact.notes, build_s=artifact.seconds)
            with ExitStack() as stack:
                row, runner = self._load_candidate(row, artifact, stack, timeout_s)
                if form.steps:
                    row = _with(row, file_bytes=artifact.file_bytes)
                unfit = misfit(self.signature, runner.signature)
                if unfit:
                    return _with(row, reason=unfit)
                errors = self.first.errors(self.first.ask(runner), self._metric)
                row = _with(row, errors=errors, memory_bytes=self._weighed(runner))
                problem = self._problem(form, errors)
                if problem is None and form.faithful:
                    problem = self._probes.problem(runner, self.goal)
                if problem:
                    row = _with(row, fate=Fate.REFUSED, reason=problem)
                row = self._timed(row, runner)
                if row.fate is Fate.KEPT and (row.speedup or 0.0) > self._champion.speedup:
                    row = self._judged(row, runner)  # nothing is to be cut beside what is refused later
                    if row.fate is Fate.KEPT:
                        self._champion.crown(runner, row.speedup or 0.0, stack)
                return row
        except MetricFailed as error:
            return _with(row, fate=Fate.REFUSED, reason=str(error))
        except OutOfTime as error:
            return _with(row, fate=Fate.SKIPPED, reason=str(error))
        except TrialFailed as error:
            return _with(row, fate=Fate.FAILED, reason=str(error))

    def decide(self, row: Row) -> Row:
        """The row after the held-back half has been looked at; as it was where there is no time for that."""
        if row.held_back is not None:
            return row
        try:
            with ExitStack() as stack:
                runner, _, _ = self._load(row.form, self._artifact(row.form).path, stack)
                return self._judged(row, runner)
        except MetricFailed as error:
            return _with(row, fate=Fate.REFUSED, reason=str(error))
        except OutOfTime:
            return row
        except TrialFailed as error:
            return _with(row, fate=Fate.FAILED, reason=str(error))

    def final(self, rows: Sequence[Row]) -> list[Row]:
        """Measure forms in their layouts beside each other, in the same rounds as far as there is memory for all.

        Those that fail are left out, and so are several instances that there is no memory for, and what there is no
        time for.
        """
        self._champion.let_go()  # its memory is wanted now
        free_bytes = self._free_bytes()
        needed = [(row, self._needed_bytes(row)) for row in rows]
        wanted = [one for one in needed if one[0].form.instances == 1 or fits(one[1], free_bytes)]
        together = groups([nbytes for _, nbytes in wanted], free_bytes)
        return [row for group in together for row in self._final([wanted[place][0] for place in group])]

    def _final(self, rows: Sequence[Row]) -> list[Row]:
        found: list[tuple[Row, Runner]] = []
        with ExitStack() as stack:
            for row in rows:
                try:
                    runner, _, _ = self._load(row.form, self._artifact(row.form).path, stack)
                except OutOfTime:
                    return []
                except TrialFailed:
                    continue
                found.append((row, runner))
            try:
                return self._clocked(found)
            except OutOfTime:
                return []
            except TrialFailed:
                self._revive()
        return [] if len(rows) == 1 else [one for row in rows for one in self._final([row])]

    def _clocked(self, found: Sequence[tuple[Row, Runner]]) -> list[Row]:
        """The rows with their speeds.

        A glance is enough for those that are clearly slower than the best, and for all where that leaves only one.

        Raises:
            TrialFailed: one of them failed, or there was no time for it.
        """
        rows: dict[int, Row] = {}
        left = list(range(len(found)))
        for effort in (_GLANCE, _LOOK) if len(found) > 1 and not self.goal.exhaustive else (_LOOK,):
            theirs, *ours = self._race([self._reference, *(found[place][1] for place in left)], effort)
            for place, laps in zip(left, ours, strict=True):
                row, runner = found[place]
                gained, weight = speedup(laps, theirs, self.goal), self._weighed(runner)
                rows[place] = _with(row, speedup=gained, curve=laps.points(), memory_bytes=weight)
            best = max((row.speedup or 0.0 for row in rows.values()), default=0.0)
            left = [place for place in left if (rows[place].speedup or 0.0) >= _CLEARLY * best]
            if len(left) == 1:
                break
        return [rows[place] for place in range(len(found))]

    def curve(self, form: Form, sizes: Sequence[int]) -> tuple[tuple[Point, ...], tuple[Point, ...]]:
        """Latency over batch size, of one instance of the form and of the reference in the same rounds.

        Raises:
            TrialFailed: it died, or there was no time for it.
        """
        alone = msgspec.structs.replace(form, instances=1)
        with ExitStack() as stack:
            runner, _, _ = self._load(alone, self._artifact(form).path, stack)
            ours, theirs = race(
                *([runner, self._reference], self.first.examples, sizes),
                rounds=3,
                seconds=0.1 / len(sizes) ** 0.5,
                deadline=self.workshop.deadline,
            )
        return ours.points(), theirs.points()

    def recorded(self, form: Form) -> tuple[list[Example], list[dict[str, Array]]]:
        """A few held-back requests and this form's own answers, one by one: what a plan is checked with.

        Raises:
            TrialFailed: it was judged in an earlier run, and died now.
        """
        if form.name not in self._recorded:
            with ExitStack() as stack:
                alone = msgspec.structs.replace(form, instances=1)
                runner, _, _ = self._load(alone, self._artifact(form).path, stack, patient=True)
                self._recorded[form.name] = self._record(runner)
        return list(self._requests), self._recorded[form.name]

    # -- parts --------------------------------------------------------------------------------------------

    def _artifact(self, form: Form) -> Artifact:
        return self.workshop.make(form.steps, self.signature, self.first.examples, LOAD_TIMEOUT_S)

    def _load_reference(self) -> tuple[Runner, list[str], float]:
        form, limit_s = self.subject.reference, max(LOAD_TIMEOUT_S, self.goal.time_limit_s)
        return self._load(form, self.subject.path, self._open, limit_s, patient=True)

    def _load(
        self,
        form: Form,
        path: Path,
        stack: ExitStack,
        timeout_s: float = LOAD_TIMEOUT_S,
        *,
        patient: bool = False,
    ) -> tuple[Runner, list[str], float]:
        """The form in as many processes as it has instances, with the notes and the seconds of the last.

        One that is waited for patiently is not killed at the deadline, nor sooner than ``timeout_s`` after any call.
        """
        deadline, patience_s = (None, timeout_s) if patient else (self.workshop.deadline, 0.0)
        source = self.subject.source(form, path, self.cpus)
        trials = [  # one starts while another loads
            stack.enter_context(Trial(self.workshop.log, source.threads, deadline, source.device, patience_s))
            for _ in range(form.instances)
        ]
        for trial in trials:
            signature, notes, seconds = trial.load(form.backend, source, min(timeout_s, LOAD_TIMEOUT_S))
        return Runner(form, tuple(trials), signature), notes, seconds

    def _load_candidate(self, row: Row, artifact: Artifact, stack: ExitStack, timeout_s: float) -> tuple[Row, Runner]:
        """The row of a form with what its loading told; one that cannot merge rows has batches of one."""
        form = row.form
        runner, notes, load_s = self._load(form, artifact.path, stack, timeout_s)
        if self.signature.max_batch_size and not runner.signature.max_batch_size:
            # Not 0: its clients' requests may have several rows, and are told of what merges rows.
            form = msgspec.structs.replace(form, max_batch_size=1)
            stack.close()
            runner, more, load_s = self._load(form, artifact.path, stack, timeout_s)
            notes = list(dict.fromkeys((*notes, *more)))
        return _with(row, form=form, load_s=load_s, notes=(*artifact.notes, *notes)), runner

    def _judged(self, row: Row, runner: Runner) -> Row:
        """The row with its errors on the held-back half; refused where the budget does not hold there."""
        errors = self.held_back.errors(self.held_back.ask(runner), self._metric)
        problem = self._problem(row.form, errors)
        if problem:
            return _with(row, fate=Fate.REFUSED, reason=f"on the held-back examples, {problem}", held_back=errors)
        self._recorded[row.form.name] = self._record(runner)
        return _with(row, held_back=errors)

    def _problem(self, form: Form, errors: Errors) -> str | None:
        if not self.first.examples.real:
            if not form.faithful:
                return "there are no real examples to judge it by"
            narrow = form.backend in NARROW and form.backend != self.subject.backend
            if narrow and any(spec.datatype is DataType.FP64 for spec in self.signature.inputs):
                return "it computes FP64 as FP32, and there are no real examples to judge that by"
        if self._reference_misses and form.faithful and errors.faithful:
            return None  # it is as the model was dropped in, and nobody asked for a better one
        return self.goal.problem(errors)

    def _record(self, runner: Runner) -> list[dict[str, Array]]:
        return runner.trials[0].answer(self._requests, halves.ANSWER_TIMEOUT_S)

    def _timed(self, row: Row, runner: Runner) -> Row:
        """The row with its speed. Those that are allowed and clearly slower than the champion are cut at a glance."""
        champion = self._champion
        rivals = [self._reference, *([champion.runner] if champion.runner else [])]
        allowed = row.fate is not Fate.REFUSED
        for effort in (_GLANCE, _LOOK) if allowed else (_GLANCE,):
            try:
                *theirs, ours = self._race([*rivals, runner], effort)
            except TrialFailed:
                self._revive()
                raise
            # Beside the champion: the reference's speed may change with the neighbours' more than both of theirs.
            faster = speedup(ours, theirs[-1], self.goal) * (champion.speedup if champion.runner else 1.0)
            beside = faster / champion.speedup
            row = _with(row, speedup=faster, curve=ours.points())
            if allowed and beside < _CLEARLY and not self.goal.exhaustive:
                return _with(row, fate=Fate.SLOWER, reason=self._slower(beside))
        return _with(row, fate=Fate.KEPT) if allowed else row

    def _slower(self, beside: float) -> str:
        if not beside and self.goal.p99_ms is not None:
            return f"does not reach {self.goal}"
        rival = "the best so far" if self._champion.speedup != 1.0 else "the reference"
        return f"{beside:.2f} times as fast as {rival} at a glance"

    def _revive(self) -> None:
        """Let go of a champion whose process is dead, and load the reference again where its own is."""
        self._champion.forget_if_dead()
        if not self._reference.alive:
            self._reference, _, _ = self._load_reference()

    def _make_room(self) -> None:
        """Where there is no room for another process like those so far, only the reference stays in memory."""
        if self._champion.runner is not None and not fits(max(self._instance_bytes.values()), self._free_bytes()):
            self._champion.let_go()

    def _weighed(self, runner: Runner) -> int:
        """What the runner's processes take, which is remembered."""
        held = runner.memory_bytes
        name = runner.form.name
        self._instance_bytes[name] = max(self._instance_bytes.get(name, 0), held // len(runner.trials))
        return held

    def _needed_bytes(self, row: Row) -> int:
        """What the form is going to take: as much as before; in an earlier run it may have been other processes."""
        usual = self._instance_bytes[self.subject.reference.name]
        known = (row.memory_bytes or usual) // row.form.instances
        return self._instance_bytes.get(row.form.name, known) * row.form.instances

    def _race(self, runners: Sequence[Runner], effort: tuple[int, float]) -> list[Laps]:
        rounds, seconds = effort
        sizes = measured_rows(self.goal.rows(self.signature.max_batch_size), [one.form for one in runners])
        return race(
            *(runners, self.first.examples, sizes),
            rounds=rounds,
            seconds=seconds / len(sizes) ** 0.5,
            deadline=self.workshop.deadline,
        )


def _with(row: Row, **changes: object) -> Row:
    return msgspec.structs.replace(row, **changes)

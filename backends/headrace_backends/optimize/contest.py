"""One candidate after the other beside the reference: is it right, and how fast is it?"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from headrace.core.model import Signature
from headrace_backends.base import Array
from headrace_backends.optimize.accuracy import Errors, Metric, MetricFailed, Outputs, compare, judged
from headrace_backends.optimize.clocking import Laps, Runner, race, speedup
from headrace_backends.optimize.examples import Example, Examples, merged, shapes_of
from headrace_backends.optimize.findings import Fate, Point, Row
from headrace_backends.optimize.form import Form
from headrace_backends.optimize.goal import Goal
from headrace_backends.optimize.misfit import misfit
from headrace_backends.optimize.subject import Subject
from headrace_backends.optimize.trial import Trial, TrialFailed
from headrace_backends.optimize.workshop import Artifact, Workshop

LOAD_TIMEOUT_S = 300.0
_ANSWER_TIMEOUT_S = 300.0
_MERGED_ROWS = 8  # examples that are answered in one batch
_CLEARLY = 0.85  # of the best so far: what is slower than that in a glance is not looked at again
_GLANCE = (3, 0.08)  # rounds and seconds of each
_LOOK = (7, 0.15)


@dataclass(frozen=True, slots=True)
class Half:
    """Some examples, and what the reference answers."""

    examples: Examples
    answers: tuple[Outputs, ...]


class Contest:
    """Holds the reference's process and what it answered. A context manager."""

    def __init__(self, subject: Subject, goal: Goal, workshop: Workshop, cpus: int, metric: Metric | None) -> None:
        self.subject = subject
        self.goal = goal
        self.workshop = workshop
        self.cpus = cpus
        self.signature: Signature
        self.first: Half
        self.held_back: Half
        self._metric = metric
        self._reference: Runner
        self._champion: Runner | None = None  # the fastest so far: what is cut is cut beside it
        self._champion_speedup = 1.0
        self._open = ExitStack()
        self._champion_open = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._champion_open.close()
        self._open.close()

    def load_reference(self) -> tuple[Signature, list[str], float]:
        """Load the model as it was dropped in.

        Raises:
            TrialFailed: it cannot be loaded.
        """
        self._reference, notes, seconds = self._load(self.subject.reference, self.subject.path, self._open)
        self.signature = self._reference.signature
        return self.signature, notes, seconds

    def measure_reference(self, first: Examples, held_back: Examples, notes: Sequence[str], load_s: float) -> Row:
        """The reference's answers, and its own row of the report.

        Raises:
            TrialFailed: it refuses the examples, or it died.
        """
        self.first = Half(first, self._answers(self._reference, first))
        self.held_back = Half(held_back, self._answers(self._reference, held_back))
        (laps,) = self._race([self._reference], _GLANCE)
        return Row(
            self.subject.reference,
            Fate.KEPT,
            "the model as it was dropped in",
            1.0,
            laps.points(),
            self._errors(self.first, self.first.answers),
            self._errors(self.held_back, self.held_back.answers),
            self.subject.path.stat().st_size if self.subject.path.is_file() else None,
            self._reference.memory_bytes,
            load_s=load_s,
            notes=tuple(notes),
        )

    def try_form(self, form: Form, timeout_s: float) -> Row:
        """Everything about one candidate, as far as it is worth it."""
        row = Row(form, Fate.FAILED)
        try:
            artifact = self.workshop.make(form.steps, self.signature, self.first.examples, timeout_s)
            row = _with(row, notes=artifact.notes, build_s=artifact.seconds)
            with ExitStack() as stack:
                runner, notes, load_s = self._load(form, artifact.path, stack, timeout_s)
                row = _with(row, load_s=load_s, notes=(*artifact.notes, *notes))
                if form.steps:
                    row = _with(row, file_bytes=artifact.file_bytes)
                unfit = misfit(self.signature, runner.signature)
                if unfit:
                    return _with(row, reason=unfit)
                errors = self._errors(self.first, self._answers(runner, self.first.examples))
                row = _with(row, errors=errors, memory_bytes=runner.memory_bytes)
                problem = self._problem(form, errors)
                if problem:
                    row = _with(row, fate=Fate.REFUSED, reason=problem)
                row = self._timed(row, runner)
                if row.fate is Fate.KEPT and (row.speedup or 0.0) > self._champion_speedup:
                    row = self._judged(row, runner)  # nothing is to be cut beside what is refused later
                    if row.fate is Fate.KEPT:
                        self._crown(runner, row.speedup or 0.0, stack)
                return row
        except MetricFailed as error:
            return _with(row, fate=Fate.REFUSED, reason=str(error))
        except TrialFailed as error:
            return _with(row, fate=Fate.FAILED, reason=str(error))

    def decide(self, row: Row) -> Row:
        """The row after the held-back half has been looked at."""
        if row.held_back is not None:
            return row
        try:
            with ExitStack() as stack:
                runner, _, _ = self._load(row.form, self._artifact(row.form).path, stack)
                return self._judged(row, runner)
        except MetricFailed as error:
            return _with(row, fate=Fate.REFUSED, reason=str(error))
        except TrialFailed as error:
            return _with(row, fate=Fate.FAILED, reason=str(error))

    def final(self, rows: Sequence[Row]) -> list[Row]:
        """Measure forms in their layouts beside each other, all in the same rounds. Those that fail are left out."""
        found: list[tuple[Row, Runner]] = []
        self._champion_open.close()  # its memory is wanted now
        self._champion = None
        with ExitStack() as stack:
            for row in rows:
                try:
                    runner, _, _ = self._load(row.form, self._artifact(row.form).path, stack)
                except TrialFailed:
                    continue
                found.append((row, runner))
            try:
                theirs, *ours = self._race([self._reference, *(runner for _, runner in found)], _LOOK)
            except TrialFailed:
                return [] if len(rows) == 1 else [one for row in rows for one in self.final([row])]
            return [
                _with(
                    row, speedup=speedup(laps, theirs, self.goal), curve=laps.points(), memory_bytes=runner.memory_bytes
                )
                for (row, runner), laps in zip(found, ours, strict=True)
            ]

    def curve(self, form: Form, sizes: Sequence[int]) -> tuple[tuple[Point, ...], tuple[Point, ...]]:
        """Latency over batch size, of one instance of the form and of the reference in the same rounds.

        Raises:
            TrialFailed: it died.
        """
        alone = msgspec.structs.replace(form, instances=1)
        with ExitStack() as stack:
            runner, _, _ = self._load(alone, self._artifact(form).path, stack)
            ours, theirs = race([runner, self._reference], self.first.examples, sizes, rounds=3, seconds=0.1)
        return ours.points(), theirs.points()

    def recorded(self, form: Form, count: int) -> tuple[list[Example], list[Mapping[str, Array]]]:
        """A few held-back requests and this form's own answers, one by one: what a plan is checked with.

        Raises:
            TrialFailed: it died.
        """
        examples = self.held_back.examples.first(count)
        alone = msgspec.structs.replace(form, instances=1)
        with ExitStack() as stack:
            runner, _, _ = self._load(alone, self._artifact(form).path, stack)
            return list(examples.inputs), list(runner.trials[0].answer(examples.inputs, _ANSWER_TIMEOUT_S))

    # -- parts --------------------------------------------------------------------------------------------

    def _artifact(self, form: Form) -> Artifact:
        return self.workshop.make(form.steps, self.signature, self.first.examples, LOAD_TIMEOUT_S)

    def _load(
        self, form: Form, path: Path, stack: ExitStack, timeout_s: float = LOAD_TIMEOUT_S
    ) -> tuple[Runner, list[str], float]:
        """The form in as many processes as it has instances, with the notes and the seconds of the last."""
        source = self.subject.source(form, path, self.cpus)
        trials: list[Trial] = []
        for _ in range(form.instances):
            trials.append(stack.enter_context(Trial(self.workshop.log, source.threads)))
            signature, notes, seconds = trials[-1].load(form.backend, source, min(timeout_s, LOAD_TIMEOUT_S))
        return Runner(form, tuple(trials), signature), notes, seconds

    def _judged(self, row: Row, runner: Runner) -> Row:
        """The row with its errors on the held-back half; refused where the budget does not hold there."""
        errors = self._errors(self.held_back, self._answers(runner, self.held_back.examples))
        problem = self._problem(row.form, errors)
        if problem:
            return _with(row, fate=Fate.REFUSED, reason=f"on the held-back examples, {problem}", held_back=errors)
        return _with(row, held_back=errors)

    def _problem(self, form: Form, errors: Errors) -> str | None:
        if not self.first.examples.real and not form.faithful:
            return "there are no real examples to judge it by"
        return self.goal.problem(errors)

    def _errors(self, half: Half, answers: Sequence[Outputs]) -> Errors:
        errors = compare(half.answers, answers)
        if self._metric is None:
            return errors
        return msgspec.structs.replace(errors, own=judged(self._metric, answers, half.examples.labels))

    def _answers(self, runner: Runner, examples: Examples) -> tuple[Outputs, ...]:
        """Answers to all examples, merged into small batches as far as that is allowed."""
        most = _MERGED_ROWS if runner.signature.max_batch_size >= _MERGED_ROWS else 1
        groups = _groups(examples.inputs, most)
        batches = [merged(group) if len(group) > 1 else group[0] for group in groups]
        answers: list[Outputs] = []
        for group, outputs in zip(groups, runner.trials[0].answer(batches, _ANSWER_TIMEOUT_S), strict=True):
            if len(group) == 1:
                answers.append(outputs)
                continue
            for place in range(len(group)):
                answers.append({name: array[place : place + 1] for name, array in outputs.items()})  # noqa: PERF401
        return tuple(answers)

    def _timed(self, row: Row, runner: Runner) -> Row:
        """The row with its speed. Those that are allowed and clearly slower than the champion are cut at a glance."""
        rivals = [self._reference, *([self._champion] if self._champion else [])]
        allowed = row.fate is not Fate.REFUSED
        for effort in (_GLANCE, _LOOK) if allowed else (_GLANCE,):
            try:
                *theirs, ours = self._race([*rivals, runner], effort)
            except TrialFailed:
                self._revive()
                raise
            # Beside the champion: the reference's speed may change with the neighbours' more than both of theirs.
            beside = speedup(ours, theirs[-1], self.goal)
            row = _with(row, speedup=beside * (self._champion_speedup if self._champion else 1.0), curve=ours.points())
            if allowed and beside < _CLEARLY and not self.goal.exhaustive:
                rival = "the best so far" if self._champion else "the reference"
                return _with(row, fate=Fate.SLOWER, reason=f"{beside:.2f} times as fast as {rival} at a glance")
        return _with(row, fate=Fate.KEPT) if allowed else row

    def _revive(self) -> None:
        """Let go of a champion whose process is dead, and load the reference again where its own is."""
        if self._champion is not None and not self._champion.alive:
            self._champion_open.close()
            self._champion, self._champion_speedup = None, 1.0
        if not self._reference.alive:
            self._reference, _, _ = self._load(self.subject.reference, self.subject.path, self._open)

    def _crown(self, runner: Runner, speedup_: float, stack: ExitStack) -> None:
        """Keep the runner's process as the one to beat."""
        self._champion_open.close()
        self._champion_open = stack.pop_all()
        self._champion, self._champion_speedup = runner, speedup_

    def _race(self, runners: Sequence[Runner], effort: tuple[int, float]) -> list[Laps]:
        rounds, seconds = effort
        sizes = self.goal.rows(self.signature.max_batch_size)
        return race(runners, self.first.examples, sizes, rounds=rounds, seconds=seconds / len(sizes) ** 0.5)


def _groups(examples: Sequence[Example], most: int) -> list[list[Example]]:
    """Consecutive examples that can be merged, at most so many in each group."""
    groups: list[list[Example]] = []
    for example in examples:
        rows_are_one = all(array.ndim and len(array) == 1 for array in example.values())
        if groups and rows_are_one and len(groups[-1]) < most and shapes_of(groups[-1][0]) == shapes_of(example):
            groups[-1].append(example)
        else:
            groups.append([example])
    return groups


def _with(row: Row, **changes: object) -> Row:
    return msgspec.structs.replace(row, **changes)

"""One candidate after the other beside the reference: is it right, and how fast is it?"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Self

import msgspec

from headrace.core.model import Signature
from headrace_backends.base import Array
from headrace_backends.optimize.accuracy import Errors, Metric, Outputs, compare, judged
from headrace_backends.optimize.clocking import Beside, batch_of, beside, together
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
        self._reference: Trial
        self._open = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.close()

    def load_reference(self) -> tuple[Signature, list[str], float]:
        """Load the model as it was dropped in.

        Raises:
            TrialFailed: it cannot be loaded.
        """
        self._reference, self.signature, notes, seconds = self._load(
            self.subject.reference, self.subject.path, self._open
        )
        return self.signature, notes, seconds

    def measure_reference(self, first: Examples, held_back: Examples, notes: Sequence[str], load_s: float) -> Row:
        """The reference's answers, and its own row of the report.

        Raises:
            TrialFailed: it refuses the examples, or it died.
        """
        self.first = Half(first, self._answers(self._reference, self.signature, first))
        self.held_back = Half(held_back, self._answers(self._reference, self.signature, held_back))
        points = []
        for rows in self.goal.rows(self.signature.max_batch_size):
            batch = batch_of(first, rows)
            points.append(beside(self._reference, self._reference, batch, rows, rounds=3, seconds=0.15).point)
        return Row(
            self.subject.reference,
            Fate.KEPT,
            "the model as it was dropped in",
            1.0,
            tuple(points),
            self._errors(self.first, self.first.answers),
            self._errors(self.held_back, self.held_back.answers),
            self.subject.path.stat().st_size if self.subject.path.is_file() else None,
            self._reference.memory_bytes(),
            load_s=load_s,
            notes=tuple(notes),
        )

    def try_form(self, form: Form, best: float, timeout_s: float) -> Row:
        """Everything about one candidate, as far as it is worth it. ``best`` is the best speed-up so far."""
        row = Row(form, Fate.FAILED)
        try:
            artifact = self.workshop.make(form.steps, self.signature, self.first.examples, timeout_s)
            row = _with(row, notes=artifact.notes, build_s=artifact.seconds)
            with ExitStack() as stack:
                trial, signature, notes, load_s = self._load(form, artifact.path, stack)
                row = _with(row, load_s=load_s, notes=(*artifact.notes, *notes))
                if form.steps:
                    row = _with(row, file_bytes=artifact.file_bytes)
                unfit = misfit(self.signature, signature)
                if unfit:
                    return _with(row, reason=unfit)
                errors = self._errors(self.first, self._answers(trial, signature, self.first.examples))
                row = _with(row, errors=errors, memory_bytes=trial.memory_bytes())
                problem = self._problem(form, errors)
                if problem:
                    glance = self._beside(trial, signature, *_GLANCE)
                    return _with(row, fate=Fate.REFUSED, reason=problem, speedup=glance[0], curve=glance[1])
                return self._timed(row, trial, signature, best)
        except TrialFailed as error:
            return _with(row, reason=str(error))

    def decide(self, row: Row) -> Row:
        """The row after the held-back half has been looked at."""
        form = row.form
        try:
            with ExitStack() as stack:
                trial, signature, _, _ = self._load(form, self._artifact(form).path, stack)
                answers = self._answers(trial, signature, self.held_back.examples)
                errors = self._errors(self.held_back, answers)
        except TrialFailed as error:
            return _with(row, fate=Fate.FAILED, reason=str(error))
        problem = self._problem(form, errors)
        if problem:
            return _with(row, fate=Fate.REFUSED, reason=f"on the held-back examples, {problem}", held_back=errors)
        return _with(row, held_back=errors)

    def layout(self, row: Row, *, instances: int, threads: int) -> Row:
        """The form of ``row`` run by so many instances on so many threads each."""
        form = msgspec.structs.replace(row.form, instances=instances, threads=threads)
        row = _with(row, form=form, speedup=None, curve=())
        try:
            with ExitStack() as stack:
                path = self._artifact(form).path
                loaded = [self._load(form, path, stack) for _ in range(instances)]
                trials, signature = [one[0] for one in loaded], loaded[0][1]
                if instances == 1:
                    speedup, curve = self._beside(trials[0], signature, *_LOOK)
                else:
                    speedup, curve = self._together(trials, signature)
                return _with(row, speedup=speedup, curve=curve, memory_bytes=sum(one.memory_bytes() for one in trials))
        except TrialFailed as error:
            return _with(row, fate=Fate.FAILED, reason=str(error))

    def curve(self, form: Form, sizes: Sequence[int]) -> tuple[tuple[Point, ...], tuple[Point, ...]]:
        """Latency over batch size, of the form and of the reference in the same rounds.

        Raises:
            TrialFailed: it died.
        """
        with ExitStack() as stack:
            trial, signature, _, _ = self._load(form, self._artifact(form).path, stack)
            pairs = self._pairs(trial, signature, sizes, 3, 0.1)
        return tuple(pair.point for pair in pairs), tuple(pair.reference for pair in pairs)

    def recorded(self, form: Form, count: int) -> tuple[list[Example], list[Mapping[str, Array]]]:
        """A few held-back requests and this form's own answers, one by one: what a plan is checked with.

        Raises:
            TrialFailed: it died.
        """
        examples = self.held_back.examples.first(count)
        with ExitStack() as stack:
            trial, _, _, _ = self._load(form, self._artifact(form).path, stack)
            return list(examples.inputs), list(trial.answer(examples.inputs, _ANSWER_TIMEOUT_S))

    # -- parts --------------------------------------------------------------------------------------------

    def _artifact(self, form: Form) -> Artifact:
        return self.workshop.make(form.steps, self.signature, self.first.examples, LOAD_TIMEOUT_S)

    def _load(self, form: Form, path: Path, stack: ExitStack) -> tuple[Trial, Signature, list[str], float]:
        source = self.subject.source(form, path, self.cpus)
        trial = stack.enter_context(Trial(self.workshop.log, source.threads))
        signature, notes, seconds = trial.load(form.backend, source, LOAD_TIMEOUT_S)
        return trial, signature, notes, seconds

    def _problem(self, form: Form, errors: Errors) -> str | None:
        if not self.first.examples.real and not form.faithful:
            return "there are no real examples to judge it by"
        return self.goal.problem(errors)

    def _errors(self, half: Half, answers: Sequence[Outputs]) -> Errors:
        errors = compare(half.answers, answers)
        if self._metric is None:
            return errors
        return msgspec.structs.replace(errors, own=judged(self._metric, answers, half.examples.labels))

    def _answers(self, trial: Trial, signature: Signature, examples: Examples) -> tuple[Outputs, ...]:
        """Answers to all examples, merged into small batches as far as that is allowed."""
        groups = _groups(examples.inputs, _MERGED_ROWS if signature.max_batch_size >= _MERGED_ROWS else 1)
        batches = [merged(group) if len(group) > 1 else group[0] for group in groups]
        answers: list[Outputs] = []
        for group, outputs in zip(groups, trial.answer(batches, _ANSWER_TIMEOUT_S), strict=True):
            if len(group) == 1:
                answers.append(outputs)
            else:
                answers += [
                    {name: array[place : place + 1] for name, array in outputs.items()} for place in range(len(group))
                ]
        return tuple(answers)

    def _timed(self, row: Row, trial: Trial, signature: Signature, best: float) -> Row:
        speedup, curve = self._beside(trial, signature, *_GLANCE)
        if speedup < best * _CLEARLY and not self.goal.exhaustive:
            return _with(
                row,
                fate=Fate.SLOWER,
                speedup=speedup,
                curve=curve,
                reason=f"at a glance {speedup:.2f} times as fast as the reference; the best so far: {best:.2f} times",
            )
        speedup, curve = self._beside(trial, signature, *_LOOK)
        return _with(row, fate=Fate.KEPT, speedup=speedup, curve=curve)

    def _beside(
        self, trial: Trial, signature: Signature, rounds: int, seconds: float
    ) -> tuple[float, tuple[Point, ...]]:
        """How many times as fast as the reference one instance is, for what the goal asks for."""
        sizes = self.goal.rows(self.signature.max_batch_size)
        pairs = self._pairs(trial, signature, sizes, rounds, seconds / len(sizes) ** 0.5)
        points = tuple(pair.point for pair in pairs)
        if len(sizes) == 1 and self.goal.p99_ms is None:
            return pairs[0].speedup, points
        theirs = [pair.reference for pair in pairs]
        if len(pairs) < len(sizes):  # larger batches than the candidate's are the reference's all the same
            theirs += [
                pair.point for pair in self._pairs(self._reference, self.signature, sizes[len(pairs) :], 2, seconds)
            ]
        rate = self.goal.rate(tuple(theirs))
        return (self.goal.rate(points) / rate if rate else float(self.goal.rate(points) > 0)), points

    def _pairs(
        self, trial: Trial, signature: Signature, sizes: Sequence[int], rounds: int, seconds: float
    ) -> list[Beside]:
        """Both on batches of those sizes that the form can have."""
        return [
            beside(self._reference, trial, batch_of(self.first.examples, rows), rows, rounds=rounds, seconds=seconds)
            for rows in sizes
            if rows <= max(1, signature.max_batch_size)
        ]

    def _together(self, trials: Sequence[Trial], signature: Signature) -> tuple[float, tuple[Point, ...]]:
        """As ``_beside``, of several instances at once."""
        ratios, points = [], []
        for rows in self.goal.rows(min(signature.max_batch_size, self.signature.max_batch_size)):
            batch = batch_of(self.first.examples, rows)
            for trial in trials:
                trial.clock(batch, 0.0)
            pairs = [
                (together(trials, batch, rows, 0.15), together([self._reference], batch, rows, 0.15)) for _ in range(3)
            ]
            rate = median(pair[0] for pair in pairs)
            per_batch_ms = rows * len(trials) / rate * 1e3
            points.append(Point(rows, per_batch_ms, per_batch_ms))
            ratios.append((rate, median(pair[1] for pair in pairs)))
        return max(rate for rate, _ in ratios) / max(rate for _, rate in ratios), tuple(points)


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

"""The search for a model's fastest faithful form: what is tried next, what is cut, and what is chosen in the end.

Candidates are tried one after the other (``contest.py``), the most promising first. A quantised form that is refused is
tried again with its most sensitive layers in full precision. The best few then meet in the finals (``finals.py``), for
which a part of the time limit is kept. Finished rows are kept on disk, so that a search that was stopped goes on where
it was.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Any

import msgspec

from headrace.core.device import CPU
from headrace.core.model import Signature
from headrace_backends import parameters
from headrace_backends.compiled_package import CONSENT
from headrace_backends.optimize import candidates as forms
from headrace_backends.optimize.accuracy import own_metric, untold
from headrace_backends.optimize.affordable import MOST_EXAMPLES, affordable
from headrace_backends.optimize.batch_forms import (
    Growing,
    larger_rows,
    measured_rows,
    with_kernels_for_its_best_size,
)
from headrace_backends.optimize.contest import Contest
from headrace_backends.optimize.deadline import phases
from headrace_backends.optimize.examples import Examples
from headrace_backends.optimize.facts import Candidate, Facts, Kind, ending_of, steps_to_onnx
from headrace_backends.optimize.finals import FINALISTS, Finals
from headrace_backends.optimize.findings import Fate, Findings, Hardware, LayerSensitivity, Profile, Row
from headrace_backends.optimize.form import Form
from headrace_backends.optimize.goal import Goal
from headrace_backends.optimize.listener import Listener
from headrace_backends.optimize.mixing import Mixing
from headrace_backends.optimize.sensitivity import ranked
from headrace_backends.optimize.subject import Subject
from headrace_backends.optimize.trial import OutOfTime, Trial, TrialFailed
from headrace_backends.optimize.workshop import Workshop

CURVE_ROWS = (1, 2, 4, 8, 16, 32)
_HOPELESS = 3.0  # a form is not tried when the best so far is so many times as fast as such forms usually are
_WORTHWHILE = 1.1  # so many times as fast as the best so far must be what is to be made milder, and slower by that
_ROWS_FILE = "rows.jsonl"
_SIDE_JOB_S = 300.0


class SearchFailed(Exception):
    """There is nothing to search for: the message says why."""


@dataclass(slots=True)
class Search:
    """One search. ``examples`` reads the examples once the model has told its tensors."""

    subject: Subject
    goal: Goal
    examples: Callable[[Signature], Examples]
    workshop: Workshop
    listener: Listener
    cpus: int
    hardware: Hardware
    versions: dict[str, str]
    _rows: list[Row] = field(default_factory=list)
    _sensitivities: tuple[LayerSensitivity, ...] = ()
    _cut_short: bool = False
    _alone: bool = False
    _earlier_rows: dict[str, Row] = field(init=False)  # by the names of their forms

    def __post_init__(self) -> None:
        self._earlier_rows = {row.form.name: row for row in self._earlier()}

    def run(self) -> "Outcome":
        """Search until everything has been tried or the time is up.

        The time limit holds but for the reference itself, which is loaded, asked and waited for as long as it takes.

        Raises:
            SearchFailed: the model itself cannot be loaded, or refuses its examples.
        """
        started, began = monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
        ends, deadline = phases(started, self.goal.time_limit_s), self.workshop.deadline
        budget = self.goal.budget
        self.listener.about(self.subject.name, budget, self.goal.time_limit_s)
        try:
            metric = own_metric(budget.metric, self.subject.folder) if budget is not None and budget.is_own else None
            with Contest(self.subject, self.goal, self.workshop, self.cpus, metric) as contest:
                try:
                    reference, told = self._prepare(contest)
                except TrialFailed as error:
                    raise SearchFailed(f"the model as it was dropped in: {error}") from error
                deadline.move(ends.candidates_s)
                todo = forms.candidates(self._facts(contest))
                self.listener.begin(len(todo))
                self._try_all(contest, todo)
                self._try_batches(contest, reference)
                deadline.move(ends.finals_s)
                winner, why = self._decide(contest, reference)
                self.listener.chosen(winner.form, why)
                deadline.move(ends.report_s)
                return self._outcome(contest, reference, winner, why, told, began, started)
        except TrialFailed as error:
            raise SearchFailed(f"the search could not be finished: {error}") from error
        finally:
            self.listener.end()

    # -- before -------------------------------------------------------------------------------------------

    def _prepare(self, contest: Contest) -> tuple[Row, str]:
        self.listener.progress("loading the model as it was dropped in")
        signature, notes, seconds = contest.load_reference()
        given = examples = self.examples(signature)
        try:
            reference = self._measure(contest, examples, notes, seconds)
        except TrialFailed:
            self.listener.progress("looking for examples that it refuses")
            given = examples.first(2 * MOST_EXAMPLES)
            examples = contest.accepted(given)
            if len(examples) in (0, len(given)):
                raise
            reference = self._measure(contest, examples, notes, seconds)
        self.listener.row(reference)
        refused = len(given) - len(examples)
        kind = f"{examples.origin}, without {refused} that it refuses" if refused else examples.origin
        if not examples.real or self._alone:
            why = "there is only one" if examples.real else "no real ones"
            kind = f"{kind}: {why}, so only faithful forms are tried"
        halves = f"{contest.first.count} to choose with, {contest.held_back.count} held back to decide"
        told = f"{len(examples)} ({kind}); {halves}"
        budget = self.goal.budget
        if budget is not None and (silent := untold(budget, contest.held_back.answers)):
            told += f"; {budget.metric} says nothing of {', '.join(map(repr, silent))}"
        return reference, told

    def _measure(self, contest: Contest, examples: Examples, notes: list[str], seconds: float) -> Row:
        self._alone = len(examples) < 2  # what was calibrated with it cannot be judged by it
        most = affordable(self.goal.time_limit_s, *contest.pace(examples.inputs[0]))
        first, held_back = (half.first(most) for half in examples.halves())
        self.listener.progress(f"running it on {len(first)} + {len(held_back)} examples")
        return contest.measure_reference(first, held_back, notes, seconds)

    def _facts(self, contest: Contest) -> Facts:
        return Facts(
            ending_of(self.subject.path),
            self.subject.backend,
            self._kind(contest),
            self.goal.allow if contest.first.examples.real and not self._alone else frozenset(),
            trains=self.subject.training is not None,
            exhaustive=self.goal.exhaustive,
            on_gpu=self.subject.device != CPU,
            native_code=parameters.flag(self.subject.parameters, CONSENT, default=None) is not False,
        )

    def _kind(self, contest: Contest) -> Kind:
        """What the model is made of. PyTorch's files tell it only as ONNX."""
        try:
            kind: Kind = self._aside("headrace_backends.optimize.traits:kind_of", path=self._as_onnx(contest))
        except TrialFailed as error:
            self.listener.progress(f"what the model is made of is not known: {error}")
            return "dense"
        return kind

    def _as_onnx(self, contest: Contest) -> Path:
        """The model as an ONNX file where there is a way to one, else as it was dropped in.

        Raises:
            TrialFailed: the exporter does not take it.
        """
        steps = steps_to_onnx(ending_of(self.subject.path)) or ()
        return self.workshop.make(steps, contest.signature, contest.first.examples, _SIDE_JOB_S).path

    # -- candidates ---------------------------------------------------------------------------------------

    def _try_all(self, contest: Contest, todo: list[Candidate]) -> None:
        earlier = self._earlier_rows
        for position, candidate in enumerate(todo, 1):
            form = candidate.form
            if not contest.signature.max_batch_size:  # what the reference does not merge, no form does
                form = msgspec.structs.replace(form, max_batch_size=0)
            self.listener.trying(form, position, len(todo))
            # Within a bound on latency a form may be many times as fast for the batches that it has time for.
            hopeless = self.goal.p99_ms is None and self._best() > _HOPELESS * candidate.gain
            if hopeless and not self.goal.exhaustive:
                told = f"such forms bring {candidate.gain:.1f} times, and the best so far {self._best():.1f} times"
                self._finish(Row(form, Fate.SKIPPED, told))
                continue
            overruled = self.subject.overruled(form)
            if overruled:
                told = f"the configuration says otherwise of {', '.join(overruled)}"
                self._finish(Row(form, Fate.SKIPPED, told))
                continue
            row = self._try(contest, form, earlier)
            if self._in_reach(row):
                self._soften(contest, row, earlier)

    def _try_batches(self, contest: Contest, reference: Row) -> None:
        """On a GPU: try other batch sizes for the best few of all, the model as it was dropped in among them."""
        most, earlier = contest.signature.max_batch_size, self._earlier_rows
        kept = [row for row in self._rows if row.fate is Fate.KEPT and row.form.max_batch_size is None]
        for row in sorted([reference, *kept], key=lambda one: -(one.speedup or 0.0))[:FINALISTS]:
            growing = Growing(row, larger_rows(self.goal, self.subject, most))
            while (form := growing.next_form()) is not None:
                self.listener.progress(f"trying {row.form.name} in batches of {form.max_batch_size}")
                growing.tell(self._try(contest, form, earlier))
            form = with_kernels_for_its_best_size(growing.best, self.goal, self.subject, most)
            if form is not None:
                self.listener.progress(f"trying {form.name}")
                self._try(contest, form, earlier)

    def _soften(self, contest: Contest, refused: Row, earlier: dict[str, Row]) -> None:
        """Try milder forms of one that is beyond the budget and near it, then with some layers left as they are."""
        for milder in forms.milder(refused.form):
            row = self._try(contest, milder, earlier)
            if row.fate is Fate.KEPT:
                return
            if self._in_reach(row):
                refused = row
        self._mix(contest, refused.form, earlier)

    def _try(self, contest: Contest, form: Form, earlier: dict[str, Row]) -> Row:
        row = earlier.get(form.name)
        if row is None:
            left_s = self.workshop.deadline.left_s
            row = contest.try_form(form, left_s) if left_s else Row(form, Fate.SKIPPED, "no time was left")
            if row.fate is Fate.SKIPPED:
                self._cut_short = True
            else:
                with (self.workshop.folder / _ROWS_FILE).open("ab") as file:
                    file.write(b"\n" + msgspec.json.encode(row) + b"\n")  # the last line may be half a one
        return self._finish(row)

    def _finish(self, row: Row) -> Row:
        self._rows.append(row)
        self.listener.row(row)
        return row

    def _mix(self, contest: Contest, form: Form, earlier: dict[str, Row]) -> None:
        """Find how few layers have to stay as they are for the budget to be met."""
        ranked = self._ranked(contest)
        mixing = Mixing(len(ranked))
        while (count := mixing.next_count()) is not None:
            if self.workshop.deadline.over:
                self._cut_short = True
                return
            mixed = forms.kept_in_full(form, ranked, count)
            if mixed is None:
                return
            self.listener.progress(f"leaving {count} of {len(ranked)} layers as they are")
            row = self._try(contest, mixed, earlier)
            if row.fate is not Fate.KEPT and not self._in_reach(row):
                return  # keeping more would be slower still
            mixing.tell(count, within=row.fate is Fate.KEPT)

    def _ranked(self, contest: Contest) -> list[str]:
        """The layers that quantisation would change: first those that are best left as they are."""
        if not self._sensitivities:
            self.listener.progress("measuring how sensitive each layer is")
            try:
                task = {
                    "source": self._as_onnx(contest),
                    "folder": self.workshop.folder,
                    "signature": contest.signature,
                    "examples": contest.first.examples,
                    "threads": self.cpus,
                }
                self._sensitivities = tuple(self._aside("headrace_backends.optimize.sensitivity:scan", task=task))
            except TrialFailed as error:
                self.listener.progress(f"no layer's sensitivity is known: {error}")
        return ranked(self._sensitivities)

    def _in_reach(self, row: Row) -> bool:
        """Whether a refused form is so fast, and so nearly right, that a milder one may be worth it."""
        if row.fate is not Fate.REFUSED:
            return False
        near = self.goal.budget is not None and row.errors is not None and self.goal.budget.is_near(row.errors)
        return near and row.speedup is not None and row.speedup > _WORTHWHILE * self._best()

    def _best(self) -> float:
        return max([1.0, *(row.speedup or 0.0 for row in self._rows if row.fate is Fate.KEPT)])

    def _earlier(self) -> Iterator[Row]:
        """What an earlier run of the same search had finished; what is chosen of it is proved anew.

        Its model may have been replaced and put back meanwhile, and files be made of the other.
        """
        try:
            lines = (self.workshop.folder / _ROWS_FILE).read_bytes().splitlines()
        except OSError:
            return
        for line in lines:
            with contextlib.suppress(msgspec.DecodeError):  # the last one may be half a line
                row = msgspec.json.decode(line, type=Row)
                if row.fate is not Fate.FAILED:  # for want of time or memory, perhaps
                    yield msgspec.structs.replace(row, held_back=None) if row.fate is Fate.KEPT else row

    # -- the end ------------------------------------------------------------------------------------------

    def _decide(self, contest: Contest, reference: Row) -> tuple[Row, str]:
        """The fastest of the forms that are within the budget on the held-back half, in its best layout."""
        # How many instances there are on a GPU says the configuration, which names the GPU.
        cpus = self.cpus if self.subject.device == CPU else 1
        finals = Finals(contest, self.goal, cpus, self.workshop.deadline, self.listener)
        decision = finals.run(reference, [row for row in self._rows if row.fate is Fate.KEPT])
        for row in decision.rows:
            self._put(row)
        self._cut_short = self._cut_short or not decision.complete
        return decision.chosen, decision.why

    def _put(self, row: Row) -> None:
        """Have the row among the others, in place of the one for the same form and layout."""
        for place, old in enumerate(self._rows):
            if old.form == row.form:
                self._rows[place] = row
                return
        self._rows.append(row)

    def _outcome(
        self, contest: Contest, reference: Row, chosen: Row, why: str, told: str, began: str, started: float
    ) -> "Outcome":
        artifact = self.workshop.make(chosen.form.steps, contest.signature, contest.first.examples, _SIDE_JOB_S)
        inputs, answers = contest.recorded(chosen.form)
        self.listener.progress("measuring latency over batch size")
        usual = [rows for rows in CURVE_ROWS if rows <= max(1, contest.signature.max_batch_size)]
        sizes = measured_rows(usual, [chosen.form])
        with contextlib.suppress(OutOfTime):  # then both have the curves of their last race
            curve, reference_curve = contest.curve(chosen.form, sizes)
            chosen = msgspec.structs.replace(chosen, curve=curve)
            reference = msgspec.structs.replace(reference, curve=reference_curve)
        rows = tuple(chosen if row.fate is Fate.CHOSEN else row for row in self._rows)
        findings = Findings(
            self.subject.name,
            self.subject.path.name,
            began,
            monotonic() - started,
            str(self.goal),
            self.goal.budget,
            tuple(sorted(self.goal.allow)),
            told,
            self.hardware,
            self.versions,
            reference,
            rows,
            chosen.form,
            why,
            self._sensitivities,
            self._profiles(contest, chosen.form, artifact.path),
            self._graphs(contest, chosen.form, artifact.path),
            not self._cut_short,
        )
        return Outcome(findings, chosen, contest.signature, artifact.path, inputs, answers)

    def _profiles(self, contest: Contest, form: Form, path: Path) -> tuple[Profile, ...]:
        pairs = [(self.subject.reference, self.subject.path)]
        if form.name != self.subject.reference.name:
            pairs.append((form, path))
        found = []
        for one, file in pairs:
            with contextlib.suppress(TrialFailed):
                found.append(
                    self._aside(
                        "headrace_backends.optimize.profile:profile_form",
                        form=one,
                        source=self.subject.source(one, file, self.cpus),
                        inputs=contest.first.examples.inputs[0],
                        folder=self.workshop.folder,
                    )
                )
        return tuple(found)

    def _graphs(self, contest: Contest, form: Form, path: Path) -> dict[str, dict[str, int]]:
        graphs: dict[str, dict[str, int]] = {}
        with contextlib.suppress(TrialFailed):
            before = self._as_onnx(contest)
            with Trial(self.workshop.log, self.cpus, self.workshop.deadline) as trial:  # one for both files
                for name, file in ((self.subject.reference.name, before), (form.name, path)):
                    counts = trial.call("headrace_backends.optimize.traits:operator_counts", _SIDE_JOB_S, path=file)
                    if counts:
                        graphs[name] = counts
        return graphs

    def _aside(self, target: str, **arguments: Any) -> Any:
        """Call what needs a framework, in a process that is over afterwards."""
        with Trial(self.workshop.log, self.cpus, self.workshop.deadline) as trial:
            return trial.call(target, _SIDE_JOB_S, **arguments)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a search brought: its findings, and what a plan is made of."""

    findings: Findings
    chosen: Row
    signature: Signature  # the reference's
    artifact: Path
    inputs: list[Any]  # a few held-back requests, and the chosen form's own answers to them
    answers: list[Any]

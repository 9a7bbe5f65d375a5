"""An ensemble: a model that is nothing but other models, each taking what others have made."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from headrace.core.model import Signature, TensorSpec

PartKey = tuple[str, str]  # a model and its version; "" is the newest that serves
Way = Literal["input", "output"]


@dataclass(frozen=True, slots=True)
class Step:
    """One run of a model. ``inputs`` and ``outputs`` go from the model's own tensors to those of the ensemble."""

    model: str
    version: str = ""
    inputs: Mapping[str, str] = field(default_factory=dict)
    outputs: Mapping[str, str] = field(default_factory=dict)

    @property
    def part(self) -> PartKey:
        """What the step runs."""
        return self.model, self.version


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """A step in its place: it can run as soon as the steps ``after`` have answered.

    ``index`` is its place in the configuration. ``after`` has places in ``EnsemblePlan.steps``, all before its own.
    ``takes`` and ``makes`` name tensors of the ensemble, each once.
    """

    step: Step
    index: int
    takes: tuple[str, ...]
    makes: tuple[str, ...]
    after: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EnsemblePlan:
    """How the requests of an ensemble are answered.

    ``steps`` are in an order that works; those that do not wait for each other may run at once. ``takers`` says of
    each tensor how many steps take it, so that it can be let go after the last; that the client gets it back, as one
    of the signature's outputs, is not counted.
    """

    name: str
    signature: Signature
    steps: tuple[PlannedStep, ...]
    takers: Mapping[str, int]


class EnsembleProblem(Exception):
    """Steps that do not make a whole; ``problems`` has everything that is wrong."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


@dataclass(frozen=True, slots=True)
class _End:
    """Where a tensor of the ensemble meets one of a step's model, and what that model says of it."""

    index: int
    step: Step
    way: Way
    tensor: str  # of the ensemble
    spec: TensorSpec

    def describe(self) -> str:
        return f"{self.way} '{self.spec.name}' of {_step_name(self.index, self.step)}"


def plan_ensemble(
    name: str,
    steps: Sequence[Step],
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    signatures: Mapping[PartKey, Signature],
    max_batch_size: int | None = None,
) -> EnsemblePlan:
    """The plan of the ensemble ``name``.

    ``inputs`` and ``outputs`` are as configured. Where there are none, they are the tensors that no step makes and
    those that no step takes. ``signatures`` has one for the part of every step. ``max_batch_size`` None infers it:
    the smallest of the models' where all of them batch, else 0.

    Raises:
        EnsembleProblem: with everything that does not fit.
    """
    problems: list[str] = []
    ends = list(_ends(steps, signatures, problems))
    takes = [end for end in ends if end.way == "input"]
    makes = [end for end in ends if end.way == "output"]
    problems += _making_problems(inputs, outputs, takes, makes)
    problems += _fit_problems(inputs, outputs, takes, makes)
    order, circles = _order(steps)
    problems += [f"tensors go in a circle: {' -> '.join(circle)}" for circle in circles]
    rows = _inferred_rows(steps, signatures) if max_batch_size is None else max_batch_size
    made = {end.tensor for end in makes}
    taken = {end.tensor for end in takes}
    signature = Signature(
        tuple(inputs) or _inferred([end for end in takes if end.tensor not in made]),
        tuple(outputs) or _inferred([end for end in makes if end.tensor not in taken]),
        rows,
        any(one.decoupled for one in signatures.values()),
    )
    if problems or (problems := list(_row_problems(signature))):
        raise EnsembleProblem(list(dict.fromkeys(problems)))
    takers = Counter(tensor for step in steps for tensor in set(step.inputs.values()))
    return EnsemblePlan(name, signature, _planned(steps, order), dict(takers))


def find_circle(name: str, uses: Mapping[str, Iterable[str]]) -> tuple[str, ...]:
    """The way from ``name`` back to itself, as ``("a", "b", "a")``; empty where there is none."""
    before = {name: ""}
    waiting = [name]
    while waiting:
        one = waiting.pop()
        for other in uses.get(one, ()):
            if other == name:
                way = [name]
                while one:
                    way.append(one)
                    one = before[one]
                return tuple(reversed(way))
            if other not in before:
                before[other] = one
                waiting.append(other)
    return ()


def _step_name(index: int, step: Step) -> str:
    version = f" version {step.version}" if step.version else ""
    return f"step {index} (model '{step.model}'{version})"


# ---- what is wrong ----


def _ends(steps: Sequence[Step], signatures: Mapping[PartKey, Signature], problems: list[str]) -> Iterator[_End]:
    """Where steps and tensors meet; what the models do not have, or need and do not get, goes to ``problems``."""
    for index, step in enumerate(steps):
        signature = signatures[step.part]
        sides: tuple[tuple[Way, Mapping[str, str], tuple[TensorSpec, ...]], ...] = (
            ("input", step.inputs, signature.inputs),
            ("output", step.outputs, signature.outputs),
        )
        for way, mapping, specs in sides:
            known = {spec.name: spec for spec in specs}
            for own, tensor in mapping.items():
                if own in known:
                    yield _End(index, step, way, tensor, known[own])
                else:
                    problems.append(
                        f"{_step_name(index, step)} maps {way} '{own}', which the model does not have; "
                        f"its {way}s are {list(known)}"
                    )
        problems += [
            f"{_step_name(index, step)} gets nothing for input '{spec.name}', which is not optional"
            for spec in signature.inputs
            if spec.name not in step.inputs and not spec.optional
        ]


def _making_problems(
    inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], takes: Sequence[_End], makes: Sequence[_End]
) -> Iterator[str]:
    """Tensors that nobody makes, or more than one."""
    given = {spec.name for spec in inputs}
    first: dict[str, _End] = {}
    for end in makes:
        if end.tensor in given:
            yield f"tensor '{end.tensor}' is an input of the ensemble, and {end.describe()} makes it too"
        elif first.setdefault(end.tensor, end) is not end:
            yield f"tensor '{end.tensor}' is made twice: by {first[end.tensor].describe()} and by {end.describe()}"
    if inputs:
        for end in takes:
            if end.tensor not in given and end.tensor not in first:
                yield (
                    f"{end.describe()} takes tensor '{end.tensor}', which no step makes and which is no input of the "
                    f"ensemble; there are {sorted({*given, *first})}"
                )
    for spec in outputs:
        if spec.name not in first:
            yield f"output '{spec.name}' of the ensemble is made by no step; they make {sorted(first)}"


def _fit_problems(
    inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], takes: Sequence[_End], makes: Sequence[_End]
) -> Iterator[str]:
    """Those who make, take or declare one tensor, and disagree about it."""
    known = {spec.name: ("the ensemble's input", spec) for spec in inputs}
    for end in makes:
        known.setdefault(end.tensor, (end.describe(), end.spec))
    optional = {spec.name for spec in inputs if spec.optional}
    others = [(end.tensor, end.describe(), end.spec) for end in takes]
    others += [(spec.name, "the ensemble's output", spec) for spec in outputs]
    for tensor, who, spec in others:
        if tensor in optional and not spec.optional:
            yield f"input '{tensor}' of the ensemble is optional, and {who} is not"
        source, before = known.setdefault(tensor, (who, spec))
        shape = _merged(before.shape, spec.shape)
        if before.datatype is not spec.datatype:
            yield f"tensor '{tensor}': {source} has {before.datatype}, and {who} has {spec.datatype}"
        elif shape is _MISMATCH:
            given, wanted = list(before.shape or ()), list(spec.shape or ())
            yield f"tensor '{tensor}': {source} has shape {given}, and {who} has shape {wanted}"
        elif shape != before.shape:  # it is the narrower one that the rest has to fit
            known[tensor] = who, TensorSpec(tensor, spec.datatype, shape)


def _row_problems(signature: Signature) -> Iterator[str]:
    if not signature.max_batch_size:
        return
    for way, specs in (("input", signature.inputs), ("output", signature.outputs)):
        for spec in specs:
            if spec.shape is not None and spec.shape[:1] != (-1,):
                yield (
                    f"{way} '{spec.name}' of the ensemble has shape {list(spec.shape)}, and max_batch_size is "
                    f"{signature.max_batch_size}: expected -1, the batch, as the first dimension"
                )


# ---- what is inferred ----

_MISMATCH: tuple[int, ...] = (-2,)


def _merged(one: tuple[int, ...] | None, other: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """The narrowest shape that fits both; ``_MISMATCH`` where there is none."""
    if one is None or other is None:
        return one if other is None else other
    if len(one) != len(other) or any(a != b and -1 not in (a, b) for a, b in zip(one, other, strict=True)):
        return _MISMATCH
    return tuple(max(a, b) for a, b in zip(one, other, strict=True))


def _inferred(ends: Sequence[_End]) -> tuple[TensorSpec, ...]:
    """The ensemble's tensors that nobody declared, in the steps' order; optional where every taker can do without."""
    found: dict[str, TensorSpec] = {}
    for end in ends:
        known = found.get(end.tensor, end.spec)
        found[end.tensor] = TensorSpec(
            end.tensor, known.datatype, _merged(known.shape, end.spec.shape), known.optional and end.spec.optional
        )
    return tuple(found.values())


def _inferred_rows(steps: Sequence[Step], signatures: Mapping[PartKey, Signature]) -> int:
    return min((signatures[step.part].max_batch_size for step in steps), default=0)


# ---- the order ----


def _order(steps: Sequence[Step]) -> tuple[list[int], list[tuple[str, ...]]]:
    """The steps' places, each behind those whose tensors it takes and otherwise as configured; and every circle."""
    maker = {tensor: index for index, step in enumerate(steps) for tensor in step.outputs.values()}
    waits = {
        index: {maker[tensor] for tensor in step.inputs.values() if tensor in maker} for index, step in enumerate(steps)
    }
    order: dict[int, None] = {}
    circles: list[tuple[str, ...]] = []
    while len(order) < len(steps):
        ready = next((index for index in waits if index not in order and waits[index] <= order.keys()), None)
        if ready is not None:
            order[ready] = None
            continue
        circle, members = _circle(steps, maker, {index for index in waits if index not in order})
        circles.append(circle)
        order.update(dict.fromkeys(members))  # as if they could run, so that a second circle shows too
    return list(order), circles


def _circle(steps: Sequence[Step], maker: Mapping[str, int], stuck: set[int]) -> tuple[tuple[str, ...], list[int]]:
    """One circle among steps that wait for each other: its tensors, the first again at the end, and its steps."""
    index = min(stuck)
    walked: list[int] = []
    taken: list[str] = []
    while index not in walked:
        walked.append(index)
        taken.append(next(tensor for tensor in steps[index].inputs.values() if maker.get(tensor) in stuck))
        index = maker[taken[-1]]
    start = walked.index(index)
    circle = list(reversed(taken[start:]))  # walked from taker to maker, told from maker to taker
    return (*circle, circle[0]), walked[start:]


def _planned(steps: Sequence[Step], order: Sequence[int]) -> tuple[PlannedStep, ...]:
    place = {index: position for position, index in enumerate(order)}
    maker = {tensor: index for index, step in enumerate(steps) for tensor in step.outputs.values()}
    return tuple(
        PlannedStep(
            step=steps[index],
            index=index,
            takes=tuple(dict.fromkeys(steps[index].inputs.values())),
            makes=tuple(steps[index].outputs.values()),
            after=tuple(sorted({place[maker[one]] for one in steps[index].inputs.values() if one in maker})),
        )
        for index in order
    )

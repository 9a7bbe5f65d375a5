"""What is wrong with a configuration, each problem with the path of its key."""

import reprlib
from collections.abc import Iterator, Mapping, Sequence

from headrace.core.errors import InvalidRequest

KeyPath = tuple[str | int, ...]  # ("batching", "preferred_sizes", 1)
Problem = tuple[KeyPath, str]

# What an ensemble cannot have of its own, since it runs nothing itself.
_NOT_FOR_ENSEMBLES = ("batching", "instances", "memory_limit_bytes", "model_file", "optimize", "residency", "sequence")


class ConfigError(InvalidRequest):
    """A configuration that cannot be used. ``problems`` has all of them, each led by the path of its key."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = list(problems)


def format_path(path: KeyPath) -> str:
    """As a user would point at it: ``batching.preferred_sizes[1]``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def pair_problems(raw: Mapping[str, object]) -> Iterator[Problem]:
    """What single keys cannot show. Looks at plain values, so that other problems do not hide these."""
    for section in ("inputs", "outputs"):
        yield from _repeated(raw.get(section), (section,), "name")
    yield from _kind_problems(raw)
    yield from _reshape_problems(raw)
    yield from _sequence_problems(raw.get("sequence"))
    yield from _level_problems(raw.get("batching"), with_sequence=raw.get("sequence") is not None)
    yield from _batching_problems(raw)
    yield from _objective_problems(raw)


def _level_problems(batching: object, *, with_sequence: bool) -> Iterator[Problem]:
    levels = _get(batching, "priority_levels") or 0
    if not isinstance(levels, int):
        return
    default = _get(batching, "default_priority")
    if isinstance(default, int) and default > levels:
        yield ("batching", "default_priority"), f"is {default}, and priority_levels is {levels}: expected no more"
    priorities = _get(batching, "priorities")
    own = priorities if isinstance(priorities, Mapping) else {}
    for level in own:
        if isinstance(level, int) and level > levels:
            yield ("batching", "priorities", level), f"is above priority_levels, which is {levels}"
    in_order = _get(batching, "preserve_order") is True
    if in_order and levels > 1:
        yield ("batching", "priority_levels"), f"is {levels}, and with preserve_order nothing overtakes: expected 0"
    if not (in_order or with_sequence):
        return
    where = "with preserve_order" if in_order else "within a sequence"
    for path, section in ((), batching), *((("priorities", level), one) for level, one in own.items()):
        if _get(section, "timeout_action") == "delay":
            yield ("batching", *path, "timeout_action"), f"is delay, and {where} nothing overtakes: expected reject"


def _kind_problems(raw: Mapping[str, object]) -> Iterator[Problem]:
    """Kinds of model that exclude each other."""
    if raw.get("response_cache") is True:
        for key in ("decoupled", "sequence"):
            if raw.get(key):
                what = "a decoupled model's responses" if key == "decoupled" else "answers within a sequence"
                yield ("response_cache",), f"is set together with {key}, and {what} cannot be given again"
    backend = raw.get("backend")
    if raw.get("ensemble"):
        if isinstance(backend, str) and backend != "ensemble":
            yield ("backend",), f"is {backend!r}, and an ensemble has none; expected ensemble, or nothing"
        for key in _NOT_FOR_ENSEMBLES:
            if raw.get(key):
                yield (key,), "is not for an ensemble, whose models have their own"
    elif backend == "ensemble":
        yield ("ensemble",), "is required where backend is ensemble: its steps"


def _objective_problems(raw: Mapping[str, object]) -> Iterator[Problem]:
    """An objective is from a request's arrival to its answer, of requests that wait for nobody but each other."""
    if _get(raw.get("batching"), "p99_objective_ms") is None:
        return
    reasons = {
        "decoupled": "a decoupled model, whose answers have no end that can be foreseen",
        "sequence": "a model of sequences, whose requests wait for those before them",
    }
    for key, reason in reasons.items():
        if raw.get(key):
            yield ("batching", "p99_objective_ms"), f"is not for {reason}"
    if _get(raw.get("batching"), "preserve_order"):
        yield ("batching", "p99_objective_ms"), "excludes preserve_order, under which batches are what stands in line"


def _reshape_problems(raw: Mapping[str, object]) -> Iterator[Problem]:
    for key in ("decoupled", "ensemble"):
        for section in ("inputs", "outputs") if raw.get(key) else ():
            for index, tensor in enumerate(_items(raw.get(section))):
                if _get(tensor, "reshape") is not None:
                    yield (section, index, "reshape"), f"is not for a model with {key}"


def _sequence_problems(sequence: object) -> Iterator[Problem]:
    controls, states = _get(sequence, "controls"), _get(sequence, "states")
    yield from _repeated(controls, ("sequence", "controls"), "kind")
    yield from _repeated(states, ("sequence", "states"), "output")
    named: dict[str, str] = {}
    for section, items in (("controls", controls), ("states", states)):
        for index, item in enumerate(_items(items)):
            name = _get(item, "input")
            place = f"{section}[{index}]"
            if isinstance(name, str) and named.setdefault(name, place) != place:
                yield ("sequence", section, index, "input"), f"{name!r} is already the input of {named[name]}"


def _repeated(items: object, path: KeyPath, key: str) -> Iterator[Problem]:
    first: dict[str, int] = {}
    for index, item in enumerate(_items(items)):
        value = _get(item, key)
        if isinstance(value, str) and first.setdefault(value, index) != index:
            yield (*path, index, key), f"{value!r} is already the {key} of the one at [{first[value]}]"


def _batching_problems(raw: Mapping[str, object]) -> Iterator[Problem]:
    max_batch_size = raw.get("max_batch_size")
    if not isinstance(max_batch_size, int) or isinstance(max_batch_size, bool):
        return
    for index, size in enumerate(_items(_get(raw.get("batching"), "preferred_sizes"))):
        if isinstance(size, int) and size > max_batch_size >= 0:
            reason = "nothing is merged with max_batch_size 0" if not max_batch_size else "expected no more"
            yield (
                ("batching", "preferred_sizes", index),
                f"is {size}, and max_batch_size is {max_batch_size}: {reason}",
            )
    if max_batch_size > 0:
        yield from _batch_dimension_problems(raw, max_batch_size)


def _batch_dimension_problems(raw: Mapping[str, object], max_batch_size: int) -> Iterator[Problem]:
    for section in ("inputs", "outputs"):
        for index, tensor in enumerate(_items(raw.get(section))):
            for key in ("shape", "reshape"):
                shape = _get(tensor, key)
                if isinstance(shape, list | tuple) and (not shape or (isinstance(shape[0], int) and shape[0] != -1)):
                    got = f"is {reprlib.repr(list(shape))}, and max_batch_size is {max_batch_size}"
                    yield (section, index, key), f"{got}: expected -1, the batch, as the first dimension"


def _items(value: object) -> Sequence[object]:
    return value if isinstance(value, list | tuple) else ()


def _get(value: object, key: str) -> object:
    return value.get(key) if isinstance(value, Mapping) else None

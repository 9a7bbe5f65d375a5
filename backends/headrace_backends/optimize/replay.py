"""Recorded requests of a plan and the answers that were right: a form is trusted where it gives them again.

In the file an array is ``N/in/NAME`` or ``N/out/NAME`` for example N. What npz files cannot hold without pickle has a
marked key: ``in.bytes`` is BYTES data end to end with ``in.ends`` telling where each element ends, in the tensor's
shape, and ``in.bf16`` is the bit patterns of bfloat16.
"""

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from zipfile import BadZipFile

import ml_dtypes
import numpy as np

from headrace_backends.base import Array
from headrace_backends.optimize.plan import BadPlan

MAX_EXAMPLES = 8  # recorded and replayed: a load is not to take long because of them
MAX_BYTES = 32 * 1024 * 1024  # of recorded arrays; one example is recorded whatever it takes
TOLERANCE = 1e-2  # of an output's largest value
FLIPS = 0.01  # share of an output's integers that may differ: near a tie an argmax falls either way

Tensors = Mapping[str, Array]


def write_replay(path: Path, inputs: Sequence[Tensors], outputs: Sequence[Tensors]) -> int:
    """Record the first examples, as many as the bounds allow. Returns how many."""
    assert len(inputs) == len(outputs), "answers belong to their inputs"
    arrays: dict[str, Array] = {}
    count = nbytes = 0
    for one, answer in zip(inputs, outputs, strict=True):
        packed = _packed(f"{count}/in", one) | _packed(f"{count}/out", answer)
        nbytes += sum(array.nbytes for array in packed.values())
        if count and (count == MAX_EXAMPLES or nbytes > MAX_BYTES):
            break
        arrays |= packed
        count += 1
    with path.open("wb") as file:  # np.savez would add an ending to a path that has none
        np.savez(file, **arrays)  # type: ignore[arg-type]  # its stub takes the names for its own options
    return count


def read_replay(path: Path) -> tuple[list[dict[str, Array]], list[dict[str, Array]]]:
    """Inputs and right answers of each recorded example.

    Raises:
        BadPlan: the file is broken.
    """
    inputs: dict[int, dict[str, Array]] = {}
    outputs: dict[int, dict[str, Array]] = {}
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            for key in file.files:
                number, kind, name = key.split("/", 2)
                side, _, form = kind.partition(".")
                if form == "ends":
                    continue
                array = file[key]
                if form == "bytes":
                    array = _elements(array, file[f"{number}/{side}.ends/{name}"])
                elif form == "bf16":
                    array = array.view(ml_dtypes.bfloat16)
                {"in": inputs, "out": outputs}[side].setdefault(int(number), {})[name] = array
    except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error) as error:
        raise BadPlan(f"{path.name} cannot be read: {error}") from error
    numbers = sorted(outputs)
    if not numbers or (inputs and numbers != sorted(inputs)):  # a model may have no inputs
        raise BadPlan(f"{path.name} has not both inputs and answers of its examples")
    return [inputs.get(number, {}) for number in numbers], [outputs[number] for number in numbers]


def problem(answers: Sequence[Tensors], recorded: Sequence[Tensors], tolerance: float = TOLERANCE) -> str | None:
    """What is wrong with these answers; None where they are the recorded ones again.

    Floats may be off by ``tolerance`` of the largest absolute value that their output has in all recorded answers, NaN
    and infinities have to be where they were. Of integers, booleans and strings one in a hundred of an output may
    differ, so in an output with fewer elements none.
    """
    if len(answers) != len(recorded):
        return f"{len(answers)} answers, expected {len(recorded)}"
    for name in dict.fromkeys(name for right in recorded for name in right):
        pairs: list[tuple[Array, Array]] = []
        for answer, right in zip(answers, recorded, strict=True):
            if name not in right:
                continue
            if name not in answer:
                return f"output '{name}' is missing"
            mine, wanted = _plain(np.asarray(answer[name])), right[name]
            if mine.shape != wanted.shape or mine.dtype != wanted.dtype:
                return (
                    f"output '{name}' is {mine.dtype}{list(mine.shape)}, "
                    f"was {wanted.dtype}{list(wanted.shape)} when it was recorded"
                )
            pairs.append((mine.reshape(-1), wanted.reshape(-1)))
        mine, wanted = (np.concatenate(side) for side in zip(*pairs, strict=True))
        found = _wrong_values(mine, wanted) if wanted.dtype.kind in "OSUbiu" else _wrong_floats(mine, wanted, tolerance)
        if found:
            return f"output '{name}' {found}"
    return None


def _wrong_values(mine: Array, wanted: Array) -> str | None:
    different = int(np.count_nonzero(mine != wanted))
    if different <= int(FLIPS * wanted.size):
        return None
    return f"differs from what was recorded in {different} of {wanted.size} values"


def _wrong_floats(mine: Array, wanted: Array, tolerance: float) -> str | None:
    got, right = mine.astype(np.float64), wanted.astype(np.float64)
    finite = np.isfinite(right)
    same = (got == right) | (np.isnan(got) & np.isnan(right))
    if not np.all(same | (finite & np.isfinite(got))):
        return "has NaN or infinite values that were not recorded, or lacks those that were"
    largest = float(np.abs(right[finite]).max(initial=0.0))
    off = float(np.abs(got[finite] - right[finite]).max(initial=0.0))
    share = off / largest if largest else off
    if share <= tolerance:
        return None
    return f"is off by {share:.3g} of its largest recorded value, {tolerance:g} is allowed"


def _packed(prefix: str, tensors: Tensors) -> dict[str, Array]:
    packed: dict[str, Array] = {}
    for name, array in tensors.items():
        if array.dtype.kind in "OSU":
            elements: list[bytes] = _plain(array).reshape(-1).tolist()
            packed[f"{prefix}.bytes/{name}"] = np.frombuffer(b"".join(elements), np.uint8)
            ends = np.cumsum([len(one) for one in elements], dtype=np.int64)
            packed[f"{prefix}.ends/{name}"] = ends.reshape(array.shape)
        elif array.dtype == ml_dtypes.bfloat16:
            packed[f"{prefix}.bf16/{name}"] = np.ascontiguousarray(array).view(np.uint16).reshape(array.shape)
        else:
            packed[f"{prefix}/{name}"] = array
    return packed


def _plain(array: Array) -> Array:
    """Strings of any sort as objects of type bytes, which is how they are recorded; other arrays as they are."""
    if array.dtype.kind not in "OSU":
        return array
    plain = np.empty(array.size, np.object_)
    for place, one in enumerate(array.reshape(-1).tolist()):
        plain[place] = one if isinstance(one, bytes) else str(one).encode()
    return plain.reshape(array.shape)


def _elements(data: Array, ends: Array) -> Array:
    raw, begin = data.tobytes(), 0
    elements = np.empty(ends.size, np.object_)
    for place, end in enumerate(ends.reshape(-1).tolist()):
        elements[place] = raw[begin:end]
        begin = end
    return elements.reshape(ends.shape)

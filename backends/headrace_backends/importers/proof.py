"""The proof that a converted model is the same model: both are asked, and their answers held against each other.

Converters go wrong without a word: of XGBoost's objectives, some come out with another link function.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from headrace_backends.base import Array, InputError, LoadError, ModelSource
from headrace_backends.made_up import made_up
from headrace_backends.onnxruntime import OnnxRuntimeBackend
from headrace_backends.specs import FoundTensor

Ask = Callable[[Mapping[str, Array]], Mapping[str, Array]]

ROWS = 32
MOST_ERROR = 1e-3  # of the largest value of an output; float32 instead of float64 costs a thousandth of that
_MISSING = 0.3  # of the values, in rows that have such
MOST_OTHER_ROWS = 1 / 16  # whose class may be another, where two are as likely within float noise

_FREE_SIZES = (None, 8, 32, 64)  # tried in turn: a convolutional model may need more than a few pixels


def prove(path: Path, ask: Ask, framework: str, shown: Sequence[dict[str, Array]] = ()) -> str:
    """Compare the ONNX file with the original, which ``ask`` runs. Returns what is to be told.

    ``shown`` are inputs to ask with; without any, or where the original refuses them, they are made up.

    Raises:
        LoadError: the answers differ, or the file does not run.
    """
    backend = OnnxRuntimeBackend.load(ModelSource("converted", "1", path, max_batch_size=0))
    refusal = "its inputs cannot be made up"
    for inputs in (*shown, *_made_up(backend)):
        try:
            wanted = ask({name: np.array(array) for name, array in inputs.items()})
        except Exception as error:  # noqa: BLE001 - a framework may raise anything; what it refuses proves nothing
            refusal = (
                f"{framework} refuses made-up inputs ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
            )
            continue
        try:
            found = backend.execute(inputs, ())
        except Exception as error:
            raise LoadError(f"the model as ONNX does not run what {framework} runs: {error}") from error
        return _compared(wanted, found, framework)
    return f"that its answers are {framework}'s could not be checked: {refusal}"


def prove_missing(path: Path, ask: Ask, framework: str) -> str | None:
    """Compare answers to rows in which values are missing (NaN). Returns what is to be told where they differ.

    An original that refuses such rows knows nothing of them.
    """
    backend = OnnxRuntimeBackend.load(ModelSource("converted", "1", path, max_batch_size=0))
    generator = np.random.default_rng(20240229)
    for inputs in _made_up(backend):
        if not any(array.dtype.kind == "f" for array in inputs.values()):
            return None
        for array in inputs.values():
            if array.dtype.kind == "f":
                array[generator.random(array.shape) < _MISSING] = np.nan
        try:
            wanted = ask({name: np.array(array) for name, array in inputs.items()})
        except Exception:  # noqa: BLE001 - a framework may raise anything
            return None
        try:
            _compared(wanted, backend.execute(inputs, ()), framework)
        except (LoadError, InputError, RuntimeError) as error:
            return f"rows with missing values (NaN) are not to be sent: {error}"
        return None
    return None


def _made_up(backend: OnnxRuntimeBackend) -> list[dict[str, Array]]:
    specs = backend.signature.inputs
    free = all(spec.shape and spec.shape[0] == -1 for spec in specs)
    tensors = [FoundTensor(spec) for spec in specs]
    found = [made_up(tensors, ROWS if free else None, size) for size in _FREE_SIZES]
    return [one for one in found if one is not None]


def _compared(wanted: Mapping[str, Array], found: Mapping[str, Array], framework: str) -> str:
    worst = 0.0
    for name, theirs in wanted.items():
        ours = found.get(name)
        if ours is None:
            raise LoadError(f"the model as ONNX has no output '{name}', which {framework} has; it has {sorted(found)}")
        if ours.shape != theirs.shape:
            raise LoadError(
                f"the model as ONNX gives output '{name}' the shape {list(ours.shape)}, "
                f"and {framework} gives it {list(theirs.shape)}"
            )
        if theirs.dtype.kind == "f":
            worst = max(worst, _error(name, theirs, ours, framework))
        else:
            _check_equal(name, theirs, ours, framework)
    rows = next((len(one) for one in wanted.values() if one.ndim), 1)
    return f"as ONNX it answers {rows} made-up rows as {framework} does, within {worst:.1g} of the largest value"


def _error(name: str, theirs: Array, ours: Array, framework: str) -> float:
    left, right = theirs.astype(np.float64), ours.astype(np.float64)
    same_gaps = bool((np.isfinite(left) == np.isfinite(right)).all())
    finite = np.isfinite(left) & np.isfinite(right)
    scale = float(np.abs(left[finite]).max(initial=0.0)) or 1.0
    error = float(np.abs(left[finite] - right[finite]).max(initial=0.0)) / scale
    limit = MOST_ERROR if theirs.dtype.itemsize > 2 else 20 * MOST_ERROR
    if not same_gaps or error > limit:
        how = f"by {error:.2g} of the largest value" if same_gaps else "in which of them are numbers"
        raise LoadError(f"the model as ONNX does not answer as {framework} does: output '{name}' differs {how}")
    return error


def _check_equal(name: str, theirs: Array, ours: Array, framework: str) -> None:
    same = np.array([_plain(one) == _plain(two) for one, two in zip(theirs.ravel(), ours.ravel(), strict=True)])
    if same.size and float((~same).mean()) > MOST_OTHER_ROWS:
        raise LoadError(
            f"the model as ONNX does not answer as {framework} does: output '{name}' is another for "
            f"{int((~same).sum())} of {same.size} made-up rows"
        )


def _plain(value: object) -> object:
    return value.decode() if isinstance(value, bytes) else value.item() if isinstance(value, np.generic) else value

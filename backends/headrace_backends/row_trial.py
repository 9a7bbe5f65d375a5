"""The proof, on made-up rows, that a row's answer is its own, so that rows of several requests may run together.

A model that mixes rows (a mean over the batch, a scale taken from all of it) can have the very shapes of one that does
not, and merging would then let one client's data change another's answer. So a row is run at the same place of
two batches of the same size, whose other rows are not the same, and at two places of one batch. Batches of one size
are compared because frameworks choose their kernels by it: magika's answers differ by 3e-3 between one row and
three, though none of its rows knows of another. For that reason sizes are only held against each other coarsely.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from headrace_backends.base import DEFAULT_MAX_BATCH_SIZE, Array, InputError
from headrace_backends.made_up import made_up
from headrace_backends.specs import FoundTensor, not_batchable

Run = Callable[[dict[str, Array]], Mapping[str, Array]]

REFUSALS = (InputError, MemoryError, RuntimeError)  # what ``Run`` raises when it does not like what it is given
MIXES = "differs between rows that ran together"  # begins what is said of an output whose rows are not its own
_BESIDE_OTHERS = "a row gets different answers beside different others"

_ROWS = 5  # a, b, c, d, e
_FREE_SIZES = (None, 8, 32, 64)  # of free dimensions, tried in turn: a convolutional model may need so many pixels
_ABC, _ADE, _BAC = (0, 1, 2), (0, 3, 4), (1, 0, 2)
_TOLERANCE = 1e-5  # of the largest value; the same kernels on the same rows differ by no more than summing order
_HALF_TOLERANCE = 2e-2  # two of BF16's smallest steps, for a row that moves to another place
_COARSE_TOLERANCE = 0.1
_QUIET, _LOUD = 0.01, 100  # times what was made up: numbers with a fraction that are next to nothing, or a lot
_LARGE = 2  # beside rows of ones. No larger: what is out of a vocabulary's range stays close to it
_LARGE_BYTE = 100  # of numbers of 8 bits, which are pixels or quantised, and indices of nothing
_MORE_TEXT = b" b a"  # words, after what was made up
_MOST_ALONE = 8  # inputs that are tried by themselves


def inferred_batching(
    run: Run,
    inputs: Sequence[FoundTensor],
    outputs: Sequence[FoundTensor],
    limit: int = DEFAULT_MAX_BATCH_SIZE,
    *,
    checks_indices: bool = True,
) -> tuple[int, str | None]:
    """How many rows may be merged (``limit``, or 0 for none), and what there is to tell about that.

    ``checks_indices`` as for ``trial``.
    """
    reason, doubt = not_batchable(inputs, outputs), None
    if reason is None:
        reason, doubt = trial(run, inputs, outputs, limit, checks_indices=checks_indices)
    if reason is not None:
        return 0, f"requests are not merged into batches: {reason}"
    return limit, doubt


def trial(
    run: Run,
    inputs: Sequence[FoundTensor],
    outputs: Sequence[FoundTensor],
    limit: int = DEFAULT_MAX_BATCH_SIZE,
    *,
    checks_indices: bool = True,
) -> tuple[str | None, str | None]:
    """Whether up to three made-up rows run independently: why not, or else what is not certain.

    Without ``checks_indices`` an index that is out of range does harm (of a process that uses a GPU, the end), and no
    whole number is larger than 1.
    """
    size = min(len(_ABC), limit)
    if size < 2:
        return None, None
    batches = [_ABC[:count] for count in range(1, size + 1)] + [_ADE[:size], _BAC[:size]]
    failure: Exception | None = None
    for arrays in _made_up_in_turn(inputs):
        answers = []
        try:
            for rows in batches:
                answers.append(_answer(run, arrays, rows))  # noqa: PERF401 - how many there are is used below
        except REFUSALS as error:
            if answers:
                return f"one made-up row runs, several fail: {error}", None
            failure = error
            continue
        names = [tensor.spec.name for tensor in outputs]
        for name in names:
            problem = _problem([answer[name] for answer in answers])
            if problem:
                return f"output '{name}' {problem}", None
        extremes = _mixing_by_extremes(run, arrays, names, size)
        return extremes or _mixing_by_range(run, arrays, names, size, checks_indices=checks_indices), None
    if failure is None:
        return None, "batching could not be proved: the model's inputs are too large to be made up"
    return None, f"batching could not be proved: the model refuses made-up inputs ({failure})"


def _made_up_in_turn(inputs: Sequence[FoundTensor]) -> Iterator[dict[str, Array]]:
    """The rows in one set of sizes after the other, as far as they can be made up."""
    for free_size in _FREE_SIZES:
        arrays = made_up(inputs, _ROWS, free_size)
        if arrays is not None:
            for array in arrays.values():
                _set_company_apart(array)
            yield arrays


def _mixing_by_extremes(run: Run, arrays: Mapping[str, Array], names: Sequence[str], size: int) -> str | None:
    """What is found where the least or the greatest whole number of a batch is in its company alone.

    Whole numbers are made up as 0 and 1, and most rows have both: what is cut to the greatest length, or has the least
    pixel taken off, does not notice its company then.
    """
    whole = {name: array for name, array in arrays.items() if array.dtype.kind in "biu"}
    for own in (0, 1) if whole else ():
        extreme = {name: _filled(one, own) for name, one in whole.items()}
        try:
            together, company = (_answer(run, {**arrays, **extreme}, rows[:size]) for rows in (_ABC, _ADE))
        except REFUSALS:  # it may well be of no use to ask it for nothing, or to have a mask that hides all
            continue
        problem = _unlike(names, together, company)
        if problem:
            return problem
    return None


def _mixing_by_range(
    run: Run, arrays: Mapping[str, Array], names: Sequence[str], size: int, *, checks_indices: bool
) -> str | None:
    """What is found where small numbers have far larger ones in their company, and short texts long ones.

    What is divided by the greatest of a batch, or only where that is beyond some bound, does not notice a company of
    its own size. Where the model refuses the larger inputs together (one may be an index), each is tried by itself.
    """
    quiet = {name: _sized(array) for name, array in arrays.items() if _grows(array, whole=checks_indices)}
    loud = {name: _sized(array, loud=True) for name, array in arrays.items() if name in quiet}
    by_themselves = [{name: array} for name, array in loud.items()][:_MOST_ALONE] if len(loud) > 1 else []
    if not quiet:
        return None
    try:
        together = _answer(run, {**arrays, **quiet}, _ABC[:size])
    except REFUSALS:
        return None
    for louder in (loud, *by_themselves):
        try:
            company = _answer(run, {**arrays, **quiet, **louder}, _ADE[:size])
        except REFUSALS:
            continue
        problem = _unlike(names, together, company)
        if problem or louder is loud:
            return problem
    return None


def _grows(array: Array, *, whole: bool) -> bool:
    """Whether the array has texts, or numbers that may be made larger; ``whole`` ones too or not."""
    return array.dtype.kind not in ("b" if whole else "biu")


def _sized(array: Array, *, loud: bool = False) -> Array:
    """The array with small numbers; or with large ones in d and in e, of the one sign and of the other. Texts alike."""
    if array.dtype.kind == "O":
        sized = array.copy()
        if loud:
            sized[3:] = array[3:].astype(np.object_) + _MORE_TEXT
        return sized
    sized = np.ones_like(array)
    if array.dtype.kind in "iu":
        sized[3:] = (_LARGE_BYTE if array.dtype.itemsize == 1 else _LARGE) if loud else 1
        return sized
    sized[:] = array.astype(np.float32) * _QUIET
    if loud:
        sized[3] = np.abs(array[3]) * _LOUD
        sized[4] = np.abs(array[4]) * -_LOUD
    return sized


def _unlike(names: Sequence[str], together: Mapping[str, Array], company: Mapping[str, Array]) -> str | None:
    """What the first rows of two batches say against it, which are the same row beside others."""
    for name in names:
        if together[name].shape != company[name].shape:
            return f"output '{name}' has a shape that depends on what the rows of the input hold"
        if not same(together[name][:1], company[name][:1], _TOLERANCE):
            return f"output '{name}' {MIXES}: {_BESIDE_OTHERS}"
    return None


def _filled(array: Array, own: int) -> Array:
    """The array with nothing but ``own`` in the rows a, b and c, and nothing but the other number in d and e."""
    filled = np.full_like(array, own)
    filled[3:] = 1 - own
    return filled


def _set_company_apart(array: Array) -> None:
    """Make rows d and e as unlike b and c as can be, so that whatever a batch has in common changes with them."""
    if array.dtype.kind == "O":
        array[3:] = np.where(array[1] == b"a", b"b", b"a")
    elif array.dtype.kind in "biu":
        array[3:] = array[1] == 0
    else:
        array[3:] = array[3:] * 4  # larger than all of a, b and c somewhere: a new range, a new mean


def _answer(run: Run, arrays: Mapping[str, Array], rows: Sequence[int]) -> dict[str, Array]:
    """Run these rows; inputs and outputs are copies, because a framework may work in place."""
    outputs = run({name: array[list(rows)] for name, array in arrays.items()})
    return {name: np.array(output) for name, output in outputs.items()}


def _problem(answers: Sequence[Array]) -> str | None:
    """What an output's answers say against it: those for 1, 2 .. rows, for other company, for two places swapped."""
    *by_count, company, swapped = answers
    counts = [len(answer) if answer.ndim else 0 for answer in by_count]
    wanted = list(range(1, len(by_count) + 1))
    if counts != wanted:
        return f"has {_listed(counts)} rows for {_listed(wanted)} rows of input"
    if any(answer.shape[1:] != by_count[0].shape[1:] for answer in by_count):
        return "has a shape that depends on how many rows the input has"
    if company.shape != by_count[-1].shape or swapped.shape != by_count[-1].shape:
        return "has a shape that depends on what the rows of the input hold"
    return _mixing(by_count[0], by_count[-1], company, swapped)


def _mixing(alone: Array, together: Array, company: Array, swapped: Array) -> str | None:
    exact = together.dtype.kind in "OUSbiu"
    half = not exact and together.dtype.itemsize == 2
    if not same(together[:1], company[:1], _TOLERANCE):
        return f"{MIXES}: {_BESIDE_OTHERS}"
    if not same(together[list(_BAC[: len(together)])], swapped, _HALF_TOLERANCE if half else _TOLERANCE):
        return f"{MIXES}: a row gets different answers at different places"
    if not exact and not same(together[:1], alone, _COARSE_TOLERANCE):
        return f"{MIXES} and the same rows that ran apart: a row's answer depends on how many there are"
    return None


def _listed(counts: Sequence[int]) -> str:
    """As ``1, 2 and 3``."""
    *first, last = map(str, counts)
    return f"{', '.join(first)} and {last}" if first else last


def same(one: Array, other: Array, tolerance: float) -> bool:
    """Whether two answers are equal, numbers with a fraction within ``tolerance`` of themselves and the largest."""
    if one.dtype.kind in "OUSbiu":
        return bool((one == other).all())
    left, right = one.astype(np.float64), other.astype(np.float64)
    scale = float(np.abs(left[np.isfinite(left)]).max(initial=0.0))
    return np.allclose(left, right, rtol=tolerance, atol=tolerance * scale, equal_nan=True)

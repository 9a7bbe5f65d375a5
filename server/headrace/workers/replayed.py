"""The proof that a model in another form is still the one that was recorded: it answers the same requests the same."""

from pathlib import Path

import numpy as np

from headrace_backends.base import Array, Backend, LoadError, RequestInfo
from headrace_backends.optimize.plan import BadPlan
from headrace_backends.optimize.replay import problem, read_replay

UNPROVED = "its recorded requests: "  # how the reason begins where the model is there and is not what it should be


def replay(backend: Backend, path: Path, tolerance: float) -> str:
    """Run the recorded requests, one after the other. Returns a note.

    Raises:
        LoadError: an answer is another than was recorded, or there is none.
    """
    try:
        inputs, recorded = read_replay(path)
    except BadPlan as error:
        raise LoadError(f"{UNPROVED}{error}") from error
    answers = []
    for number, example in enumerate(inputs):
        try:
            answers.append(_answer(backend, example))
        except Exception as error:
            raise LoadError(f"{UNPROVED}example {number} is refused: {type(error).__name__}: {error}") from error
    found = problem(answers, recorded, tolerance)
    if found is not None:
        raise LoadError(f"{UNPROVED}{found}")
    return f"answered its {len(inputs)} recorded request(s) as it did when they were recorded"


def _answer(backend: Backend, inputs: dict[str, Array]) -> dict[str, Array]:
    rows = 1
    if backend.signature.max_batch_size and inputs:
        first = next(iter(inputs.values()))
        rows = first.shape[0] if first.ndim else 1
    result = backend.execute(inputs, [RequestInfo(rows, "", {})] if backend.wants_requests else [])
    if isinstance(result, list | tuple):
        (one,) = result
        if one.error is not None:
            raise one.error
        result = one.outputs
    # Copied: the arrays may be the backend's memory, which its next run writes to.
    return {name: np.array(array) for name, array in result.items()}  # type: ignore[union-attr] # the other of the two

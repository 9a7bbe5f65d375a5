"""Requests that no example is like: a form that is right for all examples by luck answers them otherwise.

Two kinds are known to tell forms apart. Padding is at the end of most examples or nowhere, so masks may be taken for
lengths, or be lost. And numbers of 64 bits fit into 32 in most examples, which is all that some runtimes keep of them.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

import numpy as np

from headrace_backends.base import Array
from headrace_backends.optimize.accuracy import Outputs, compare
from headrace_backends.optimize.clocking import Runner
from headrace_backends.optimize.examples import Example
from headrace_backends.optimize.goal import Goal
from headrace_backends.optimize.trial import TrialFailed

NARROW = ("openvino",)  # backends that compute INT64 as INT32 and FP64 as FP32
_SHAKEN = 2  # examples
# Negative, so that what takes it for a size makes nothing of it, rather than all of the memory.
_WIDE = -5_000_000_000
_TIMEOUT_S = 300.0


class Probes:
    """Such requests, as far as the reference takes them, and what it answers."""

    def __init__(self, reference: Runner, examples: Sequence[Example], *, on_gpu: bool) -> None:
        """Ask the reference, which may die of it."""
        random = np.random.default_rng(0)
        self._shaken = _Asked("gaps in masks", reference, [shaken(one, random) for one in examples[:_SHAKEN]])
        # An index that is out of range would be the end of a process that uses a GPU.
        self._wide = _Asked("numbers beyond 32 bits", reference, [] if on_gpu else wide(examples[0]))

    def problem(self, runner: Runner, goal: Goal) -> str | None:
        """Why a form that is as the reference for all examples is not the same model; None where it is.

        Raises:
            TrialFailed: it refuses a request that the reference takes, or it died.
        """
        narrow = runner.form.backend in NARROW
        return self._shaken.problem(runner, goal) or (self._wide.problem(runner, goal) if narrow else None)


class _Asked:
    """Requests of one kind; ``what`` is in them."""

    def __init__(self, what: str, reference: Runner, requests: Iterable[Example]) -> None:
        self._what = what
        self._requests: list[Example] = []
        self._answers: list[Outputs] = []
        for one in requests:
            with suppress(TrialFailed):  # it need not take that
                self._answers += reference.trials[0].answer([one], _TIMEOUT_S)
                self._requests.append(one)

    def problem(self, runner: Runner, goal: Goal) -> str | None:
        errors = compare(self._answers, runner.trials[0].answer(self._requests, _TIMEOUT_S))
        own = goal.budget is not None and goal.budget.is_own  # there are no labels for these
        if errors.faithful or not (own or goal.problem(errors)):
            return None
        return (
            f"requests with {self._what}, which no example has, get other answers "
            f"(max_rel {errors.max_rel or 0.0:.2g}, {errors.mismatches} mismatches)"
        )


def wide(example: Example) -> list[Example]:
    """The example with each of its inputs of INT64 in turn far beyond 32 bits."""
    return [
        {**example, name: np.full_like(array, _WIDE)}
        for name, array in example.items()
        if array.dtype == np.int64 and array.size
    ]


def shaken(example: Example, random: np.random.Generator) -> Mapping[str, Array]:
    """Whole numbers and booleans in another order; where all are alike, as in a mask, every second one is 0."""
    other = dict(example)
    for name, array in example.items():
        if array.dtype.kind not in "iub" or not array.ndim or not array.size:
            continue
        if (array == array.flat[0]).all():
            other[name] = array * (np.arange(array.shape[-1]) % 2 == 0)
        else:
            other[name] = random.permuted(array, axis=-1)
    return other

"""Half of a model's examples: what the reference answers to them, and how far another form's answers are from that."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from headrace.core.model import Signature
from headrace_backends.base import Array
from headrace_backends.optimize.accuracy import Errors, Metric, Outputs, compare, judged
from headrace_backends.optimize.batches import batches
from headrace_backends.optimize.clocking import Runner
from headrace_backends.optimize.examples import Examples, merged
from headrace_backends.optimize.trial import TrialFailed

ANSWER_TIMEOUT_S = 300.0  # for one batch
_TWICE = 32  # examples that the reference is asked a second time

Sizes = Callable[[int], Sequence[int]]  # of the batches in turn, for a model that merges so many rows


@dataclass(frozen=True, slots=True)
class Half:
    """Some examples, what the reference answers, and how they are batched; ``count`` of them are different ones."""

    examples: Examples
    answers: tuple[Outputs, ...]
    sizes: Sizes
    count: int

    def ask(self, runner: Runner) -> tuple[Outputs, ...]:
        """A form's answers to all of them, in batches as large as both the half and the form ask for.

        Raises:
            TrialFailed: it refuses one, or it died.
        """
        answers: list[Outputs] = []
        for batch in batches(self.examples.inputs, self.sizes(runner.signature.max_batch_size)):
            # One by one: all of them and their answers may be more than the process has memory for beside the model.
            (outputs,) = runner.trials[0].answer([merged(batch) if len(batch) > 1 else batch[0]], ANSWER_TIMEOUT_S)
            if len(batch) == 1:
                answers.append(outputs)
                continue
            for name, array in outputs.items():
                if array.shape[:1] != (len(batch),):
                    raise TrialFailed(f"output '{name}' has shape {list(array.shape)} for a batch of {len(batch)} rows")
            for place in range(len(batch)):
                answers.append({name: array[place : place + 1] for name, array in outputs.items()})  # noqa: PERF401
        return tuple(answers)

    def errors(self, answers: Sequence[Outputs], metric: Metric | None) -> Errors:
        """Answers beside the reference's, and by the owner's metric where there is one.

        Raises:
            MetricFailed: it raised, or gave no number.
        """
        errors = msgspec.structs.replace(compare(self.answers, answers), examples=self.count)
        if metric is None:
            return errors
        return msgspec.structs.replace(errors, own=judged(metric, answers, self.examples.labels))


def answered(reference: Runner, examples: Examples, sizes: Sizes, count: int) -> Half:
    """A half with the reference's answers.

    Raises:
        TrialFailed: it refuses one, or it died.
    """
    half = Half(examples, (), sizes, count)
    return replace(half, answers=half.ask(reference))


def refuse_silent(signature: Signature, *halves: Half) -> None:
    """See that the reference's answers have something in every output that others can be held against.

    Raises:
        TrialFailed: one is empty in all of them, or has no finite number.
    """
    for spec in signature.outputs:
        if 0 not in (spec.shape or ()) and not any(_tells(one[spec.name]) for half in halves for one in half.answers):
            raise TrialFailed(
                f"output '{spec.name}' is empty, or has no finite number, in the answers to all examples "
                f"({halves[0].examples.origin}): nothing can be compared with that. Give others with --calibration"
            )


def _tells(answer: Array) -> bool:
    return bool(answer.size) and (answer.dtype.kind in "OSUbiu" or bool(np.isfinite(answer.astype(np.float64)).any()))


def refuse_unsteady(reference: Runner, half: Half) -> None:
    """Ask the reference some of it again: what is random in there would look like an error of every form.

    Raises:
        TrialFailed: it does not answer as it did.
    """
    count = 0
    for batch in batches(half.examples.inputs, half.sizes(reference.signature.max_batch_size)):
        count += len(batch)  # whole batches, so that they are the same as the first time
        if count >= _TWICE:
            break
    once = Half(half.examples.first(count), half.answers[:count], half.sizes, count)
    errors = once.errors(once.ask(reference), None)
    if not errors.faithful:
        told = f"{errors.mismatches} values" if errors.mismatches else f"max_rel {errors.max_rel:.2g}"
        raise TrialFailed(
            f"answers the same inputs differently each time ({told}, between two runs of {count} examples): is "
            "dropout left on, or something drawn at random? Nothing can be compared with it"
        )

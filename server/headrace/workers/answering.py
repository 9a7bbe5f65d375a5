"""A batch's outputs to the requests that are in it."""

from collections.abc import Sequence
from time import monotonic_ns

from headrace.batching.pending import Pending
from headrace.core.errors import Kind, of_kind
from headrace.core.model import Signature
from headrace.workers import packing
from headrace.workers.frames import Done


def answer_jointly(
    signature: Signature, pending: Sequence[Pending], frame: Done, view: memoryview, extract: packing.Extract
) -> int:
    """The batch has one set of outputs, of which each request has its rows. Returns how many are answered.

    Raises:
        InternalError: the outputs are not those of so many rows; nobody is answered then.
    """
    rows = [one.rows for one in pending]
    if len(pending) == 1:
        answers = [packing.whole_outputs(signature, frame.outputs, view, rows[0], extract)]
    else:
        answers = packing.split_outputs(signature, frame.outputs, view, rows, extract)
    now_ns = monotonic_ns()
    return sum(one.resolve(outputs, now_ns) for one, outputs in zip(pending, answers, strict=True))


def answer_each(
    model: str,
    signature: Signature,
    pending: Sequence[Pending],
    frame: Done,
    view: memoryview,
    extract: packing.Extract,
) -> int:
    """Each request has its own answer or its own error. Returns how many have an answer."""
    answered = 0
    now_ns = monotonic_ns()
    for one, answer in zip(pending, frame.answers, strict=True):
        if answer.kind:
            one.fail(of_kind(Kind(answer.kind), f"model '{model}': {answer.message}"))
        else:
            outputs = packing.answer_outputs(signature, answer.outputs, view, extract)
            answered += one.resolve(outputs, now_ns, answer.parameters)
    return answered

"""What is to be made of a request's outputs before its client gets them: classes, where it asked for them."""

from collections.abc import Sequence

from headrace.batching.pending import OutputForm
from headrace.core.classification import classification_count, classify
from headrace.core.request import InferRequest
from headrace.core.tensor import Tensor
from headrace.repository.repository import Repository, Served
from headrace.repository.served_ensemble import ServedEnsemble


def output_form(repository: Repository, served: Served, request: InferRequest) -> OutputForm | None:
    """A function of the outputs that were asked for; None where they are given as they are.

    Raises:
        InvalidRequest: there cannot be so many classes.
    """
    counts = {
        output.name: count
        for output in request.outputs
        if output.parameters and (count := classification_count(output, request.model))
    }
    if not counts:
        return None
    batched = served.max_batch_size > 0
    labels = {name: _labels(repository, served, name) for name in counts}

    def form(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(
            classify(tensor, counts[tensor.name], batched, labels[tensor.name], request.model)
            if tensor.name in counts
            else tensor
            for tensor in outputs
        )

    return form


def _labels(repository: Repository, served: Served, output: str) -> Sequence[str]:
    """The labels of an output; where an ensemble has none of its own, those of the model that makes it."""
    own = served.info.labels.get(output)
    if own is not None or not isinstance(served, ServedEnsemble):
        return own or ()
    for planned in served.plan.steps:
        part = repository.find(*planned.step.part)
        for name, tensor in planned.step.outputs.items():
            if tensor == output and part is not None:
                return _labels(repository, part, name)
    return ()

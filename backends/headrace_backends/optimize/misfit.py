"""Whether a form's tensors can stand for the reference's, so that clients notice no difference."""

from headrace.core.model import Signature, TensorSpec


def misfit(reference: Signature, found: Signature) -> str:
    """Why a form with the signature ``found`` cannot be served in place of the reference; empty where it can.

    A form may take more than the reference does, but not less. It need not merge rows where the reference does, which
    costs throughput and nothing else; the other way round the rows of one request could change another's answer.
    """
    for what, wanted, got in (
        ("input", reference.inputs, found.inputs),
        ("output", reference.outputs, found.outputs),
    ):
        if [spec.name for spec in wanted] != [spec.name for spec in got]:
            names = [[spec.name for spec in specs] for specs in (got, wanted)]
            return f"its {what}s are {names[0]}, the reference has {names[1]}"
        for right, mine in zip(wanted, got, strict=True):
            if not _stands_for(mine, right, takes=what == "input"):
                return f"its {what} is {mine.describe()}, the reference has {right.describe()}"
    return "it merges rows, and the reference does not" if found.max_batch_size and not reference.max_batch_size else ""


def _stands_for(mine: TensorSpec, right: TensorSpec, *, takes: bool) -> bool:
    """Whether a tensor of the form can be the reference's. What it ``takes`` may be of more sizes and not of fewer."""
    if mine.datatype != right.datatype or mine.optional != right.optional:
        return False
    if mine.shape is None or right.shape is None:
        return True
    return len(mine.shape) == len(right.shape) and all(
        one in (other, -1) or (other == -1 and not takes) for one, other in zip(mine.shape, right.shape, strict=True)
    )

"""Training for a few epochs: fine-tuning, distilling; with a note for each epoch, and the best one kept."""

import copy
import math
from collections.abc import Callable
from typing import Annotated, Any

import msgspec
import torch
from torch.nn import Module

from headrace_backends.optimize.steps.base import StepFailed, StepTask
from headrace_backends.optimize.training import OwnerTraining

_LAST_SHARE = 0.05  # of the learning rate, in the last epoch

# What is made small: from the outputs, the batch's inputs and its labels.
Objective = Callable[[Any, tuple[torch.Tensor, ...], Any], torch.Tensor]


class Schedule(msgspec.Struct, frozen=True):
    """How long and how fast: Adam, whose rate falls along a cosine from epoch to epoch."""

    epochs: Annotated[int, msgspec.Meta(ge=0, le=10_000)]
    learning_rate: Annotated[float, msgspec.Meta(gt=0, le=10)]


def fit(
    module: Module,
    owner: OwnerTraining,
    schedule: Schedule,
    task: StepTask,
    objective: Objective | None = None,
    after_update: Callable[[], None] = lambda: None,
) -> None:
    """Train the module in place; in the end it has the weights of its best epoch and is in evaluation mode.

    Best is the epoch after which the owner's loss on ``batches(False)`` was least. ``after_update`` is called whenever
    the weights have changed.

    Raises:
        StepFailed: the owner's code failed, or the loss is no number any more.
    """
    objective = objective or (lambda outputs, _, labels: owner.loss(outputs, labels))
    best, kept, best_epoch = watched_loss(module, owner), None, 0
    task.note(f"before training: loss {best:.4g}{_scored(owner, module)}")
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=schedule.learning_rate)
    best = math.inf  # what came untrained out of a change is no epoch of its own
    for epoch in range(1, schedule.epochs + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate(schedule, epoch)
        trained = _epoch(module, owner, optimizer, objective, after_update)
        if not math.isfinite(trained):
            raise StepFailed(
                f"training came to nothing: the loss is {trained} in epoch {epoch}; "
                f"a learning_rate below {schedule.learning_rate:g} may help"
            )
        watched = watched_loss(module, owner)
        task.note(
            f"epoch {epoch} of {schedule.epochs}: {trained:.4g} in training, loss {watched:.4g}{_scored(owner, module)}"
        )
        if watched < best:
            best, best_epoch = watched, epoch
            kept = copy.deepcopy(module.state_dict())
    if kept is not None:
        module.load_state_dict(kept)
        if best_epoch < schedule.epochs:
            task.note(f"the weights are those of epoch {best_epoch}")
    module.eval()


def rate(schedule: Schedule, epoch: int) -> float:
    """The learning rate of an epoch, counted from 1: the whole in the first, a twentieth in the last."""
    if schedule.epochs == 1:
        return schedule.learning_rate
    way = (epoch - 1) / (schedule.epochs - 1)
    return schedule.learning_rate * (_LAST_SHARE + (1 - _LAST_SHARE) * (1 + math.cos(math.pi * way)) / 2)


def watched_loss(module: Module, owner: OwnerTraining) -> float:
    """The owner's loss on the batches that are not trained on, weighted by their rows."""
    module.eval()
    total, rows = 0.0, 0
    with torch.no_grad():
        for inputs, labels in owner.batches(training=False):
            count = len(inputs[0])
            total += count * float(owner.loss(_run(module, inputs, owner), labels))
            rows += count
    return total / rows


def _epoch(
    module: Module,
    owner: OwnerTraining,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    after_update: Callable[[], None],
) -> float:
    module.train()
    total, rows = 0.0, 0
    for inputs, labels in owner.batches(training=True):
        loss = objective(_run(module, inputs, owner), inputs, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call] # unannotated
        optimizer.step()
        after_update()
        total += len(inputs[0]) * float(loss.detach())
        rows += len(inputs[0])
    return total / rows


def _run(module: Module, inputs: tuple[torch.Tensor, ...], owner: OwnerTraining) -> Any:
    try:
        return module(*inputs)
    except Exception as error:
        shapes = [list(one.shape) for one in inputs]
        raise StepFailed(
            f"{owner.file.name}: the module does not run on a batch with inputs of shapes {shapes}: "
            f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        ) from error


def _scored(owner: OwnerTraining, module: Module) -> str:
    score = owner.score(module)
    return "" if score is None else f", score {score:.4g}"

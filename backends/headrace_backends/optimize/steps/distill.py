"""Distillation: the owner's small model, the student, learns to answer as the served one, the teacher."""

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import torch
from torch.nn.functional import kl_div, log_softmax, mse_loss, softmax

from headrace_backends.optimize import module_size
from headrace_backends.optimize.fitting import Schedule, fit
from headrace_backends.optimize.steps import options
from headrace_backends.optimize.steps.base import StepFailed, StepTask
from headrace_backends.optimize.training import named_outputs
from headrace_backends.optimize.workpiece import Workpiece


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``soft`` weighs being like the teacher, ``hard`` the owner's loss on the labels.

    Alike are ``probabilities`` by their divergence, both softened by ``temperature``, or ``values`` by their squared
    distance. Unsaid, it is probabilities, or values where the owner has a loss of their own, since outputs are hardly
    logits then.
    """

    temperature: Annotated[float, msgspec.Meta(gt=0, le=100)] = 4.0
    soft: Annotated[float, msgspec.Meta(ge=0)] = 0.7
    hard: Annotated[float, msgspec.Meta(ge=0)] = 0.3
    alike: Literal["probabilities", "values"] | None = None
    epochs: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 10
    learning_rate: Annotated[float, msgspec.Meta(gt=0, le=10)] = 1e-3


def apply(task: StepTask) -> Path:
    """Train the student and write it as ONNX."""
    wanted = options.read("distill", Options, task.options)
    if not wanted.soft + wanted.hard:
        raise StepFailed("distill: soft and hard are both 0, so there is nothing to learn")
    piece = Workpiece.begin(task)
    teacher, owner = piece.module, piece.owner
    student = owner.student()
    wanted_shapes, shapes = (
        {name: array.shape for name, array in piece.answers(one).items()} for one in (teacher, student)
    )
    if shapes != wanted_shapes:
        raise StepFailed(f"{owner.file.name}: student() gives outputs of {shapes}, the model's are {wanted_shapes}")
    score = piece.score()
    if score is not None:
        task.note(f"score {score:.4g} of the model, which is the teacher")
    before = module_size.size_of(teacher, piece.inputs, piece.rows)
    alike = wanted.alike or ("values" if owner.has_own_loss else "probabilities")

    def objective(outputs: Any, inputs: tuple[torch.Tensor, ...], labels: Any) -> torch.Tensor:
        with torch.no_grad():
            right = teacher(*inputs)
        loss = torch.zeros(())
        if wanted.soft:
            mine, theirs = (list(named_outputs(one, task.signature).values()) for one in (outputs, right))
            for one, other in zip(mine, theirs, strict=True):
                loss = loss + wanted.soft * distance(one, other, alike, wanted.temperature)
        return loss + wanted.hard * owner.loss(outputs, labels) if wanted.hard else loss

    fit(student, owner, Schedule(wanted.epochs, wanted.learning_rate), task, objective)
    task.note(module_size.told(before, module_size.size_of(student, piece.inputs, piece.rows)))
    return piece.export(student)


def distance(student: torch.Tensor, teacher: torch.Tensor, alike: str, temperature: float) -> torch.Tensor:
    """How unlike two outputs are. Divergences are scaled so that their gradients do not depend on the temperature."""
    if alike == "values":
        return mse_loss(student, teacher)
    return temperature**2 * kl_div(
        log_softmax(student.flatten(0, -2) / temperature, -1),
        softmax(teacher.flatten(0, -2) / temperature, -1),
        reduction="batchmean",
    )

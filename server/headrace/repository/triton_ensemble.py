"""Triton's section on ensembles: into ours and back."""

from collections.abc import Iterator

from headrace.repository.model_config import StepConfig
from headrace.wire import pb


def ensemble_problems(ensemble: pb.ModelEnsembling) -> Iterator[str]:
    """What has no place in our form, so that it cannot judge it."""
    for index, step in enumerate(ensemble.step):
        if step.model_version < -1:
            yield (
                f"ensemble_scheduling.step[{index}].model_version: is {step.model_version}, expected a version, "
                "or -1 for the newest"
            )


def plain_steps(ensemble: pb.ModelEnsembling) -> list[dict[str, object]]:
    """The steps laid out as in ``config.yaml``. Maps have no order on the wire, so theirs is by name."""
    return [
        {
            "model": step.model_name,
            "version": step.model_version if step.model_version > 0 else None,
            "inputs": dict(sorted(step.input_map.items())),
            "outputs": dict(sorted(step.output_map.items())),
        }
        for step in ensemble.step
    ]


def ensemble_message(steps: tuple[StepConfig, ...]) -> pb.ModelEnsembling:
    """Our steps in Triton's form."""
    return pb.ModelEnsembling(
        step=[
            pb.ModelEnsembling.Step(
                model_name=step.model,
                model_version=step.version or -1,
                input_map=step.inputs,
                output_map=step.outputs,
            )
            for step in steps
        ]
    )

"""ONNX files, TorchScript, exported programs and OpenVINO IR, as OpenVINO IR with the weights that they have."""

from pathlib import Path

from headrace_backends.optimize.steps.base import StepFailed, StepTask
from headrace_backends.optimize.steps.openvino_source import read, save


def apply(task: StepTask) -> Path:
    """Convert the model. There are no options.

    Raises:
        StepFailed: as ``read`` does.
    """
    if task.options:
        raise StepFailed(f"the step openvino has no options, got {', '.join(task.options)}")
    return save(task, read(task))

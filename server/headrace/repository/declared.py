"""What a model's folder says of its tensors before any worker has seen it."""

import json

import msgspec

from headrace.core.model import ModelInfo, ReshapeSpec, Signature, TensorSpec
from headrace.core.sequence import SequenceSpec
from headrace.repository.layout import ModelFolder
from headrace.repository.message_json import to_json
from headrace.repository.model_config import TensorConfig
from headrace.repository.to_triton import to_message
from headrace_backends.registry import PLATFORMS


def declared_signature(folder: ModelFolder) -> Signature:
    """The configured tensors, for the worker to agree them with the model.

    Where any inputs or outputs are declared, those are added that only the server and the model know: controls, of
    which nobody says how many dimensions they have, and states. Empty is told by the model.
    """
    config = folder.config
    inputs = tuple(map(_own_spec, config.inputs))
    outputs = tuple(map(_own_spec, config.outputs))
    if folder.sequence is not None:
        batches = None if config.max_batch_size is None else config.max_batch_size > 0
        hidden_inputs, hidden_outputs = _hidden(folder.sequence, batches)
        inputs = _with(inputs, hidden_inputs)
        outputs = _with(outputs, hidden_outputs)
    return Signature(inputs, outputs, config.max_batch_size or 0, config.decoupled)


def reshapes(folder: ModelFolder) -> tuple[ReshapeSpec, ...]:
    """The tensors that clients see in another shape than the model has them."""
    config = folder.config
    return tuple(
        ReshapeSpec(tensor.name, tensor.shape, tensor.reshape)
        for tensor in (*config.inputs, *config.outputs)
        if tensor.reshape is not None and tensor.reshape != tensor.shape
    )


def _own_spec(tensor: TensorConfig) -> TensorSpec:
    spec = tensor.spec()
    return spec if tensor.reshape is None else msgspec.structs.replace(spec, shape=tensor.reshape)


def config_json(folder: ModelFolder, version: int) -> str:
    """The configuration as Triton's Python models are given it; of the tensors only what is declared."""
    config = folder.config
    backend = folder.versions[version].backend
    signature = Signature(
        tuple(tensor.spec() for tensor in config.inputs),
        tuple(tensor.spec() for tensor in config.outputs),
        config.max_batch_size or 0,
        config.decoupled,
    )
    info = ModelInfo(folder.name, str(version), PLATFORMS.get(backend, backend), backend, signature)
    return json.dumps(to_json(to_message(config, info)))


def _with(declared: tuple[TensorSpec, ...], hidden: list[TensorSpec]) -> tuple[TensorSpec, ...]:
    names = {spec.name for spec in declared}
    return (*declared, *(spec for spec in hidden if spec.name not in names)) if declared else ()


def _hidden(sequence: SequenceSpec, batches: bool | None) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """The inputs and outputs that clients do not see; ``batches`` is None where only the model can tell."""
    inputs = [TensorSpec(control.input, control.datatype, None) for control in sequence.controls]
    outputs = []
    for state in sequence.states:
        shape = None if batches is None else (-1,) * batches + state.shape
        inputs.append(TensorSpec(state.input, state.datatype, shape))
        outputs.append(TensorSpec(state.output, state.datatype, shape))
    return inputs, outputs

"""What callers of ``headrace.optimize`` give: a model in the forms that Python has it in, and arrays as examples."""

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from headrace.core.model import Signature
from headrace_backends.base import Array
from headrace_backends.optimize.basis import model_digest
from headrace_backends.optimize.calibration import BadCalibration, given_examples, read_examples
from headrace_backends.optimize.examples import Examples


def file_of(model: Any, example_inputs: Any, folder: Path) -> Path:
    """The model's file: its own, or one that it is written to."""
    if isinstance(model, str | Path):
        return Path(model).resolve()
    if hasattr(model, "SerializeToString"):  # an onnx.ModelProto
        path = folder / "model.onnx"
        path.write_bytes(model.SerializeToString())
        return path
    import torch

    path = folder / "model.pt2"
    program = model if isinstance(model, torch.export.ExportedProgram) else _exported(model, example_inputs)
    torch.export.save(program, path)
    return path


def examples_of(given: Any, labels: Mapping[str, Array], signature: Signature) -> Examples:
    """The examples in a file, or in arrays or tensors with examples along the first axis.

    Raises:
        BadCalibration: they do not suit the model.
    """
    if isinstance(given, str | Path):
        return read_examples(Path(given), signature)
    names = [spec.name for spec in signature.inputs]
    if not isinstance(given, Mapping):
        several = _several(given)
        if len(several) != len(names):
            raise BadCalibration(
                f"got {len(several)} example inputs, expected one for each of {names}, examples along its first axis"
            )
        given = dict(zip(names, several, strict=True))
    both = sorted(given.keys() & labels)
    if both:
        raise BadCalibration(f"labels have the names {both}, which are inputs' names")
    named = {name: np.asarray(array_in(value)) for name, value in {**given, **labels}.items()}
    return given_examples(named, signature)


def digest_of(given: Any) -> str:
    """A hash of examples or labels, the same in every run."""
    if isinstance(given, str | Path):
        return model_digest(Path(given), {}) if Path(given).exists() else ""
    named = given if isinstance(given, Mapping) else dict(enumerate(_several(given)))
    running = blake2b(digest_size=16)
    for name, value in named.items():
        array = np.asarray(array_in(value))
        running.update(f"\0{name}\0{array.dtype}\0{array.shape}\0".encode())
        running.update(repr(array.tolist()).encode() if array.dtype.kind == "O" else array.tobytes())
    return running.hexdigest()


def array_in(value: Any) -> Any:
    """A tensor's values; anything else as it is."""
    if not hasattr(value, "detach"):
        return value
    from headrace_backends.torch_model import array_of

    return array_of(value)


def _several(given: Any) -> Sequence[Any]:
    return given if isinstance(given, list | tuple) else [given]


def _exported(module: Any, example_inputs: Any) -> Any:
    """The program of a module, for batches of any size where it allows that. The module stays in the mode it is in."""
    import torch

    if isinstance(example_inputs, str | Path):
        raise TypeError("a module is exported with example inputs, expected tensors or arrays, got a path")
    named = example_inputs if isinstance(example_inputs, Mapping) else None
    values = list(named.values()) if named else list(_several(example_inputs))
    held = next(chain(module.parameters(), module.buffers()), None)
    device = torch.device("cpu") if held is None else held.device
    training = [one for one in module.modules() if one.training]
    module.eval()
    try:
        # Of two rows, also where there is only one: the exporter would take the 1 for fixed.
        two = [_rows(torch, value, 2).to(device) for value in values]
        batch = torch.export.Dim("batch", min=1)
        shapes: Any = {name: {0: batch} for name in named} if named else tuple({0: batch} for _ in two)
        try:
            return _program(torch, module, two, named, shapes)
        except Exception:  # noqa: BLE001 - no batch dimension, or one tied to others; the exporter's types are many
            return _program(torch, module, [_rows(torch, value, 1).to(device) for value in values], named, None)
    finally:
        for one in training:
            one.training = True


def _program(torch: Any, module: Any, rows: Sequence[Any], named: Mapping[str, Any] | None, shapes: Any) -> Any:
    arguments = () if named else tuple(rows)
    keywords = dict(zip(named, rows, strict=True)) if named else None
    with torch.no_grad():
        return torch.export.export(module, arguments, keywords, dynamic_shapes=shapes)


def _rows(torch: Any, value: Any, count: int) -> Any:
    """So many rows of it, in memory of their own: the program keeps them."""
    tensor = value.detach().cpu() if hasattr(value, "detach") else torch.as_tensor(np.asarray(value))
    if not tensor.ndim or not len(tensor):
        return tensor
    return torch.cat([tensor[:count]] * count)[:count].clone()

"""What the class of a Python model says of its inputs and outputs, where its configuration leaves that to it."""

from typing import Any

from headrace.core.model import Signature, TensorSpec
from headrace.core.tensor import DATATYPE_BY_NAME
from headrace_backends.base import LoadError, ModelSource

_HOW_TO_DECLARE = (
    "declare them in config.yaml or as attributes of the class Model: "
    'inputs = [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}], outputs likewise, '
    "and max_batch_size = 32 where rows may be merged"
)
_SPEC_KEYS = {"name", "datatype", "shape", "optional"}


def declared_signature(source: ModelSource, model_class: Any, *, decoupled: bool) -> Signature:
    """What config.yaml declares, or else the class.

    Raises:
        LoadError: with everything that is wrong or missing.
    """
    problems: list[str] = []
    inputs = source.inputs or _declared(model_class, "inputs", problems)
    outputs = source.outputs or _declared(model_class, "outputs", problems)
    size = source.max_batch_size
    if size is None:
        size = getattr(model_class, "max_batch_size", 0)
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            problems.append(f"Model.max_batch_size is {size!r}, expected a whole number, 0 where rows cannot be merged")
            size = 0
    problems += [
        f"max_batch_size is {size}, but '{spec.name}' has shape {list(spec.shape)}, expected -1 as its first dimension"
        for spec in (*inputs, *outputs)
        if size and spec.shape is not None and spec.shape[:1] != (-1,)
    ]
    if problems:
        raise LoadError("; ".join(problems))
    return Signature(inputs, outputs, size, decoupled)


def _declared(model_class: Any, attribute: str, problems: list[str]) -> tuple[TensorSpec, ...]:
    """The tensors in a class attribute; what is wrong with it goes to ``problems``."""
    entries = getattr(model_class, attribute, None)
    if entries is None:
        problems.append(f"its {attribute} are not declared; {_HOW_TO_DECLARE}")
        return ()
    if not isinstance(entries, list | tuple) or not entries:
        problems.append(f"Model.{attribute} is {entries!r}, expected a list of dicts; {_HOW_TO_DECLARE}")
        return ()
    specs: list[TensorSpec] = []
    for index, entry in enumerate(entries):
        wrong = _entry_problem(entry, {spec.name for spec in specs})
        if wrong:
            problems.append(f"Model.{attribute}[{index}] {wrong}")
            continue
        shape = entry.get("shape")
        specs.append(
            TensorSpec(
                entry["name"],
                DATATYPE_BY_NAME[entry["datatype"]],
                None if shape is None else tuple(shape),
                entry.get("optional", False),
            )
        )
    return tuple(specs)


def _entry_problem(entry: Any, taken: set[str]) -> str | None:
    """What is wrong with one dict of a class's ``inputs`` or ``outputs``."""
    if not isinstance(entry, dict):
        return f"is {entry!r}, expected a dict with name, datatype and shape"
    name, datatype, shape = entry.get("name"), entry.get("datatype"), entry.get("shape")
    unknown = sorted(map(str, set(entry) - _SPEC_KEYS))
    problem = None
    if unknown:
        problem = f"has the unknown keys {unknown}, expected {sorted(_SPEC_KEYS)}"
    elif not isinstance(name, str) or not name or name in taken:
        problem = f"has the name {name!r}, expected a text that is not empty and not taken"
    elif not isinstance(datatype, str) or datatype not in DATATYPE_BY_NAME:
        problem = f"has the datatype {datatype!r}, expected one of {', '.join(DATATYPE_BY_NAME)}"
    elif shape is not None and not _is_shape(shape):
        problem = f"has the shape {shape!r}, expected a list of sizes, -1 for any"
    elif not isinstance(entry.get("optional", False), bool):
        problem = f"has optional {entry['optional']!r}, expected True or False"
    return problem


def _is_shape(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(type(size) is int and size >= -1 for size in value)

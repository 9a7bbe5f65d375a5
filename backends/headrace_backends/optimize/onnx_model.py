"""An ONNX file in the hands of a step: read whole, changed, and written with the inputs and outputs that it had."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from headrace_backends.base import Array
from headrace_backends.optimize.examples import Example, merged
from headrace_backends.optimize.steps.base import StepFailed, StepTask

MODEL_FILE = "model.onnx"
OPSET = 18  # what models are exported with
LEAST_OPSET = 13  # below, there is no quantisation by channel
_MOST_BYTES = 2**31 - 2**20  # what protobuf can hold in one message, less what a step adds
_QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulNBits", "QGemm")


def read(path: Path) -> Any:
    """The model with all its weights, also those that lie in other files.

    Raises:
        StepFailed: it cannot be read, or is too large to be changed as one message.
    """
    if path.suffix != ".onnx":
        raise StepFailed(f"'{path.name}' is no ONNX file, which this step needs")
    too_large = "'{}' has {:.1f} GB with its weights; steps can change up to 2 GB"
    if path.stat().st_size > _MOST_BYTES:
        raise StepFailed(too_large.format(path.name, path.stat().st_size / 1e9))
    try:
        model = onnx.load(path, load_external_data=False)
        size = path.stat().st_size + sum(map(_external_bytes, _tensors(model)))
        if size <= _MOST_BYTES:
            onnx.load_external_data_for_model(model, str(path.parent))
    except Exception as error:  # onnx and protobuf promise no types
        raise StepFailed(f"'{path.name}' cannot be read: {_gist(error)}") from error
    if size > _MOST_BYTES:
        raise StepFailed(too_large.format(path.name, size / 1e9))
    return model


def write(model: Any, task: StepTask, original: Any) -> Path:
    """Save the model, with the inputs and outputs declared as ``original`` has them.

    Raises:
        StepFailed: its inputs or outputs are others.
    """
    graph, before = model.graph, original.graph
    weights = {one.name for one in before.initializer} | {one.name for one in graph.initializer}
    for kind in ("input", "output"):
        wanted, found = (
            [(one.name, one.type.tensor_type.elem_type) for one in getattr(of, kind) if one.name not in weights]
            if kind == "input"
            else [(one.name, one.type.tensor_type.elem_type) for one in of.output]
            for of in (before, graph)
        )
        if sorted(wanted) != sorted(found):
            raise StepFailed(f"the step changed the model's {kind}s from {_named(wanted)} to {_named(found)}")
        declared = [one for one in getattr(before, kind) if kind == "output" or one.name not in weights]
        del getattr(graph, kind)[:]
        getattr(graph, kind).extend(declared)
    target = task.folder / MODEL_FILE
    onnx.save(model, target)
    return target


def of_opset(model: Any, least: int = LEAST_OPSET) -> Any:
    """The model in this version of the operators, where its own is older.

    Raises:
        StepFailed: it cannot be converted, or has none of these operators, as trees of other libraries.
    """
    if all(one.domain not in {"", "ai.onnx"} for one in model.opset_import):
        raise StepFailed("the model has none of ONNX's own operators, and so no layers that could be changed")
    version = opset(model)
    if version >= least:
        return model
    try:
        return onnx.version_converter.convert_version(model, least)
    except Exception as error:  # a C++ assertion of any kind
        raise StepFailed(
            f"the model uses version {version} of ONNX's operators and cannot be converted to {least}: {_gist(error)}"
        ) from error


def opset(model: Any) -> int:
    """The version of ONNX's own operators."""
    return max((one.version for one in model.opset_import if one.domain in {"", "ai.onnx"}), default=1)


def import_own(model: Any) -> None:
    """Declare that the model uses ONNX Runtime's own operators, where it does."""
    used = any(node.domain == "com.microsoft" for node in nodes_of(model.graph))
    if used and all(one.domain != "com.microsoft" for one in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))


def named(model: Any) -> Any:
    """The model, every node of its graph with a name of its own. The same file gets the same names in every run."""
    taken: Counter[str] = Counter(node.name for node in model.graph.node if node.name)
    for place, node in enumerate(model.graph.node):
        if not node.name or taken[node.name] > 1:
            taken[node.name] -= 1
            node.name = f"{node.name or node.op_type}_at_{place}"
    return model


def nodes_of(graph: Any) -> Iterator[Any]:
    """Every node, also of the graphs inside of If, Loop and Scan."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from nodes_of(attribute.g)
            for inner in attribute.graphs:
                yield from nodes_of(inner)


def rename(model: Any, names: Mapping[str, str]) -> None:
    """Give tensors other names everywhere in the model. Who has such a name already gets one that nobody has."""
    if all(old == new for old, new in names.items()):
        return
    taken = {name for node in nodes_of(model.graph) for name in (*node.input, *node.output)}
    taken |= {one.name for one in (*model.graph.input, *model.graph.output, *model.graph.initializer)}
    full = {new: f"{new}_inner" for new in names.values() if new in taken and new not in names} | dict(names)
    waiting = [model.graph]
    while waiting:
        graph = waiting.pop()
        for one in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
            one.name = full.get(one.name, one.name)
        for node in graph.node:
            for side in (node.input, node.output):
                for place, name in enumerate(side):
                    side[place] = full.get(name, name)
            for attribute in node.attribute:
                waiting += [attribute.g] if attribute.HasField("g") else []
                waiting += attribute.graphs


def counts(model: Any) -> dict[str, int]:
    """How many nodes there are of each operator, the most frequent first; of functions in the file too."""
    nodes = [*nodes_of(model.graph), *(node for function in model.functions for node in function.node)]
    return dict(Counter(node.op_type for node in nodes).most_common())


def is_quantized(operators: Iterable[str]) -> bool:
    """Whether a model with these operators has been quantised already."""
    return any(one.startswith(("QLinear", "ConvInteger", "MatMulInteger")) or one in _QUANTIZED for one in operators)


def refuse_quantized(model: Any) -> None:
    """Raise StepFailed where the model has been quantised already."""
    if is_quantized(counts(model)):
        raise StepFailed("the model is quantised already")


def session_of(model: Any, task: StepTask, level: Any = None) -> Any:
    """ONNX Runtime, ready to run a model or a file of one.

    Raises:
        StepFailed: it cannot.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = task.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL if level is None else level
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    what = str(model) if isinstance(model, Path) else model.SerializeToString()
    try:
        return onnxruntime.InferenceSession(what, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # one class of its own for every status
        raise StepFailed(f"ONNX Runtime cannot load the model: {_gist(error)}") from error


def has_gpu() -> bool:
    """Whether this ONNX Runtime was built for GPUs."""
    return any("CUDA" in one or "Tensorrt" in one for one in onnxruntime.get_available_providers())


def feeds(task: StepTask, most: int, rows: int) -> list[dict[str, Array]]:
    """Up to ``most`` examples as ONNX Runtime takes them, merged into batches of ``rows`` where the model allows that.

    Raises:
        StepFailed: there are none, or they are of a kind that cannot be fed.
    """
    examples = task.examples.first(most).inputs
    if not examples:
        raise StepFailed("there are no examples to calibrate with")
    if not task.examples.real:
        raise StepFailed(f"the examples are {task.examples.origin}; calibration needs real inputs")
    if not task.signature.max_batch_size:
        return [_fed(example) for example in examples]
    rows = min(rows, task.signature.max_batch_size)
    batches = []
    for group in _alike(examples):
        batches += [_fed(merged(group[start : start + rows])) for start in range(0, len(group), rows)]
    return batches


def run(session: Any, feed: Mapping[str, Array]) -> dict[str, Array]:
    """All outputs by name.

    Raises:
        StepFailed: the model refuses the example.
    """
    names = [one.name for one in session.get_outputs()]
    try:
        return dict(zip(names, session.run(names, dict(feed)), strict=True))
    except Exception as error:  # one class of its own for every status
        raise StepFailed(f"the model cannot run an example: {_gist(error)}") from error


def _alike(examples: Sequence[Example]) -> list[list[Example]]:
    groups: dict[Any, list[Example]] = {}
    for example in examples:
        shapes = tuple(sorted((name, array.shape[1:]) for name, array in example.items()))
        groups.setdefault(shapes, []).append(example)
    return list(groups.values())


def _fed(example: Example) -> dict[str, Array]:
    feed = {}
    for name, array in example.items():
        if array.dtype.name == "bfloat16":
            raise StepFailed(f"input '{name}' is bfloat16, which ONNX Runtime's Python interface does not take")
        feed[name] = _text(array) if array.dtype.kind in "OS" else array
    return feed


def _text(array: Array) -> Array:
    """ONNX strings are text."""
    texts = np.empty(array.size, np.object_)
    texts[:] = [one.decode(errors="replace") if isinstance(one, bytes) else one for one in array.reshape(-1).tolist()]
    return texts.reshape(array.shape)


def _tensors(model: Any) -> Iterator[Any]:
    yield from model.graph.initializer
    for node in nodes_of(model.graph):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            if attribute.HasField("g"):
                yield from attribute.g.initializer


def _external_bytes(tensor: Any) -> int:
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return 0
    return sum(int(one.value) for one in tensor.external_data if one.key == "length")


def _named(tensors: Iterable[tuple[str, int]]) -> list[str]:
    return [f"{name} {onnx.TensorProto.DataType.Name(kind)}" for name, kind in tensors]


def _gist(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__

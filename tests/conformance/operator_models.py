"""ONNX models of one operator each, what goes into them, and what ONNX Runtime makes of that in this process.

Two sources: the operator test cases that the ``onnx`` package ships, and models of our own that hand every
datatype through unchanged in every kind of shape, with the values that are easiest to get wrong.
"""

import ctypes
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from math import prod
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi import onnxruntime_pybind11_state as state

# ONNX Runtime's name of a tensor's type: the protocol's datatype and numpy's.
WIRE_TYPES = {
    "tensor(bool)": ("BOOL", np.dtype(np.bool_)),
    "tensor(uint8)": ("UINT8", np.dtype(np.uint8)),
    "tensor(uint16)": ("UINT16", np.dtype(np.uint16)),
    "tensor(uint32)": ("UINT32", np.dtype(np.uint32)),
    "tensor(uint64)": ("UINT64", np.dtype(np.uint64)),
    "tensor(int8)": ("INT8", np.dtype(np.int8)),
    "tensor(int16)": ("INT16", np.dtype(np.int16)),
    "tensor(int32)": ("INT32", np.dtype(np.int32)),
    "tensor(int64)": ("INT64", np.dtype(np.int64)),
    "tensor(float16)": ("FP16", np.dtype(np.float16)),
    "tensor(bfloat16)": ("BF16", np.dtype(ml_dtypes.bfloat16)),
    "tensor(float)": ("FP32", np.dtype(np.float32)),
    "tensor(double)": ("FP64", np.dtype(np.float64)),
    "tensor(string)": ("BYTES", np.dtype(np.object_)),
}
DTYPES = dict(WIRE_TYPES.values())

# What ONNX Runtime raises for a model or an input that it does not take.
REFUSALS = (state.InvalidArgument, state.InvalidGraph, state.Fail, state.NotImplemented, state.RuntimeException)

# Two runs of these differ in one and the same process. A seed does not help: it seeds the session, not the run,
# and a server has warmed the session up.
RANDOM = {
    "test_bernoulli": "draws from its input's probabilities",
    "test_bernoulli_double": "draws from its input's probabilities",
    "test_bernoulli_seed": "draws anew in each run",
    "test_bernoulli_expanded": "draws from RandomUniformLike",
    "test_bernoulli_double_expanded": "draws from RandomUniformLike",
    "test_bernoulli_seed_expanded": "draws anew in each run",
    "test_training_dropout": "drops at random",
    "test_training_dropout_default": "drops at random",
    "test_training_dropout_default_mask": "drops at random",
    "test_training_dropout_mask": "drops at random",
}


@dataclass(frozen=True)
class Tensor:
    """A named array with its protocol datatype; strings are an array of ``str``."""

    name: str
    datatype: str
    array: np.ndarray


@dataclass(frozen=True)
class OperatorModel:
    """A model and one request for it; ``outputs`` is what ONNX Runtime answers here."""

    name: str
    content: bytes
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Everything that travels."""
        return (*self.inputs, *self.outputs)


@dataclass
class Selection:
    """The models that can be compared, and those that cannot, each by its name."""

    models: dict[str, OperatorModel] = field(default_factory=dict)
    foreign: dict[str, bytes] = field(default_factory=dict)  # an input or output has a type the protocol lacks
    unloadable: dict[str, bytes] = field(default_factory=dict)  # ONNX Runtime does not load them here either
    unrunnable: dict[str, OperatorModel] = field(default_factory=dict)  # it loads them and refuses their input

    def contents(self) -> dict[str, bytes]:
        """Every model's file."""
        files = {name: model.content for name, model in (self.models | self.unrunnable).items()}
        return files | self.foreign | self.unloadable


def select(everything: bool) -> Selection:
    """Every usable model, or a few hundred of them: the same ones each time."""
    selection = Selection()
    seen: set[tuple[str, int]] = set()
    cases = [case for case in _operator_cases() if case.name not in RANDOM]
    for case in cases if everything else _representatives(cases):
        content = case.model.SerializeToString()
        types = _foreign_types(case.model)
        if types:
            if everything or not types <= seen:
                selection.foreign[case.name] = content
                seen |= types
            continue
        try:
            session = open_session(content)
        except REFUSALS:
            selection.unloadable[case.name] = content
            continue
        names = [one.name for one in case.model.graph.input]
        arrays = dict(zip(names, map(_values, case.data_sets[0][0]), strict=True))
        inputs = requested(session, arrays)
        try:
            selection.models[case.name] = OperatorModel(case.name, content, inputs, run(session, inputs))
        except REFUSALS:
            selection.unrunnable[case.name] = OperatorModel(case.name, content, inputs, ())
    selection.models |= {model.name: model for model in identity_models()}
    return selection


def write_repository(folder: Path, models: dict[str, bytes]) -> Path:
    """A repository of these models, each nothing but its file."""
    for name, content in models.items():
        version = folder / name / "1"
        version.mkdir(parents=True)
        (version / "model.onnx").write_bytes(content)
    return folder


def requested(session: onnxruntime.InferenceSession, arrays: dict[str, np.ndarray]) -> tuple[Tensor, ...]:
    """The values for a session's inputs, with their datatypes."""
    return tuple(_tensor(argument.name, argument.type, arrays[argument.name]) for argument in session.get_inputs())


def open_session(content: bytes) -> onnxruntime.InferenceSession:
    """The model in this process, on one thread, as the server opens it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def run(session: onnxruntime.InferenceSession, inputs: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """What ONNX Runtime answers in this process."""
    arguments = session.get_outputs()
    names = [argument.name for argument in arguments]
    if any(argument.type == "tensor(bfloat16)" for argument in arguments):
        feed = {tensor.name: _ort_value(tensor) for tensor in inputs}
        values = [_array(value) for value in session.run_with_ort_values(names, feed)]
    else:
        feed = {t.name: _ort_value(t) if t.datatype == "BF16" else t.array for t in inputs}
        values = session.run(names, feed)
    return tuple(
        _tensor(argument.name, argument.type, value) for argument, value in zip(arguments, values, strict=True)
    )


def _tensor(name: str, kind: str, value: object) -> Tensor:
    datatype, dtype = WIRE_TYPES[kind]
    array = np.asarray(value)
    if datatype == "BYTES":
        texts = [one.decode() if isinstance(one, bytes) else str(one) for one in array.reshape(-1).tolist()]
        array = np.array([*texts, None], dtype=np.object_)[:-1].reshape(array.shape)
    assert array.dtype == dtype, f"'{name}' is {array.dtype}, expected {dtype}"
    return Tensor(name, datatype, array)


def _ort_value(tensor: Tensor) -> onnxruntime.OrtValue:
    array = np.ascontiguousarray(tensor.array).reshape(tensor.array.shape)
    if tensor.datatype != "BF16":
        return onnxruntime.OrtValue.ortvalue_from_numpy(array)
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), TensorProto.BFLOAT16)


def _array(value: onnxruntime.OrtValue) -> np.ndarray:
    if value.data_type() != "tensor(bfloat16)":
        return value.numpy()
    raw = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes()) if prod(value.shape()) else b""
    return np.frombuffer(raw, dtype=ml_dtypes.bfloat16).reshape(value.shape())


# ---- the operator test cases of the onnx package ----


@cache
def _operator_cases() -> list:
    """All of them, by name. Their values come from seeded generators, so they are the same in every process."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():  # the cases divide by zero on purpose
        warnings.simplefilter("ignore")
        before = np.random.get_state()  # noqa: NPY002 - which the cases seed
        cases = collect_testcases(None)
        np.random.set_state(before)  # noqa: NPY002
    return sorted(cases, key=lambda case: case.name)


def _representatives(cases: list) -> Iterator:
    """For each operator one case of each kind: the types and ranks that go in and out."""
    seen = set()
    for case in cases:
        if "_expanded" in case.name:  # the same operator once more, spelt out in others
            continue
        graph = case.model.graph
        kind = (
            tuple(node.op_type for node in graph.node),
            tuple(_kind(value.type) for value in graph.input),
            tuple(_kind(value.type) for value in graph.output),
        )
        if kind not in seen:
            seen.add(kind)
            yield case


def _kind(kind: onnx.TypeProto) -> tuple:
    tensor = kind.tensor_type
    sizes = [dimension.dim_value for dimension in tensor.shape.dim if dimension.HasField("dim_value")]
    return (kind.WhichOneof("value"), tensor.elem_type, min(len(tensor.shape.dim), 3), 0 in sizes)


def _values(given: np.ndarray | TensorProto) -> np.ndarray:
    return numpy_helper.to_array(given) if isinstance(given, TensorProto) else np.asarray(given)


def _foreign_types(model: onnx.ModelProto) -> set[tuple[str, int]]:
    """The types of inputs and outputs that the protocol does not carry."""
    carried = {("tensor_type", helper.np_dtype_to_tensor_dtype(dtype)) for dtype in DTYPES.values()}
    types = [value.type for value in (*model.graph.input, *model.graph.output)]
    return {(one.WhichOneof("value"), one.tensor_type.elem_type) for one in types} - carried


# ---- every datatype in every kind of shape ----

SHAPES = {
    "scalar": ((), ()),
    "one": ((1,), (1,)),
    "empty": ((0,), (0,)),
    "empty_inside": ((3, 0, 2), (3, 0, 2)),
    "vector": ((37,), (37,)),
    "deep": ((1, 2, 1, 3, 1, 2, 1), (1, 2, 1, 3, 1, 2, 1)),
    "rows": (("n", 3), (5, 3)),
    "rows_of_nothing": (("n", 0), (4, 0)),
    "free": (("n", "m"), (2, 7)),
    "undeclared": (None, (2, 3)),
    "undeclared_scalar": (None, ()),
}
_TEXTS = ["", "a", "naïve", "日本語", "🌊", " spaced\tout\n", '"quoted\\"', "x" * 1000, "[1]", "null"]


def identity_models() -> Iterator[OperatorModel]:
    """Models that hand their input through, for each datatype and shape."""
    for datatype, dtype in DTYPES.items():
        for shape_name, (declared, actual) in SHAPES.items():
            kind = helper.np_dtype_to_tensor_dtype(dtype)
            graph = helper.make_graph(
                [helper.make_node("Identity", ["x"], ["y"])],
                "identity",
                [helper.make_tensor_value_info("x", kind, declared)],
                [helper.make_tensor_value_info("y", kind, declared)],
            )
            model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)])
            content = model.SerializeToString()
            session = open_session(content)
            inputs = requested(session, {"x": _telling(datatype, actual)})
            yield OperatorModel(f"identity_{datatype.lower()}_{shape_name}", content, inputs, run(session, inputs))


def _telling(datatype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values at the ends of a datatype's range, and those that have more than one spelling."""
    dtype = DTYPES[datatype]
    if datatype == "BYTES":
        values = np.array(_TEXTS, dtype=np.object_)
    elif datatype == "BOOL":
        values = np.array([True, False, True])
    elif dtype.kind in "iu":
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
        values = np.array([high, low, 0, 1, high - 1, low + 1, high // 3], dtype=dtype)
    else:
        limits = ml_dtypes.finfo(dtype)
        ends = [limits.max, limits.min, limits.tiny, limits.smallest_subnormal, limits.eps]
        plain = np.array([1 / 3, -0.0, np.nan, np.inf, -np.inf, 0.1, 1e-7, 12345.678], dtype=dtype)
        values = np.concatenate([np.array(ends, dtype=dtype), plain])
        values = np.roll(values, 5)  # a third first: what a scalar is
    return np.resize(values, shape) if prod(shape) else np.empty(shape, dtype=dtype)

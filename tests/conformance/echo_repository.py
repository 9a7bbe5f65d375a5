"""The models that the conformance cases are sent to: nearly all of them give back what they get."""

import json
from pathlib import Path

from onnx import TensorProto, helper
from wire_values import DATATYPES

ONNX_TYPES = {
    "BOOL": TensorProto.BOOL,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16,
    "BF16": TensorProto.BFLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
}

# Any one tensor of any datatype and any shape; outputs that nobody sent an input for are empty.
ANY = """
import ml_dtypes
import numpy as np

TYPES = {
    "BOOL": "?", "UINT8": "u1", "UINT16": "u2", "UINT32": "u4", "UINT64": "u8", "INT8": "i1", "INT16": "i2",
    "INT32": "i4", "INT64": "i8", "FP16": "f2", "BF16": ml_dtypes.bfloat16, "FP32": "f4", "FP64": "f8", "BYTES": "O",
}


class Model:
    inputs = [{"name": f"x_{name}", "datatype": name, "optional": True} for name in TYPES]
    outputs = [{"name": f"y_{name}", "datatype": name} for name in TYPES]

    def infer(self, inputs):
        return {f"y_{name}": inputs.get(f"x_{name}", np.zeros(0, dtype)) for name, dtype in TYPES.items()}
"""

# Several inputs and outputs, an optional one, rows that are merged with those of others.
ROWS = """
import numpy as np


class Model:
    inputs = [
        {"name": "numbers", "datatype": "INT32", "shape": [-1, 2]},
        {"name": "texts", "datatype": "BYTES", "shape": [-1, 1]},
        {"name": "offset", "datatype": "INT32", "shape": [-1, 1], "optional": True},
    ]
    outputs = [
        {"name": "sums", "datatype": "INT32", "shape": [-1, 1]},
        {"name": "texts_out", "datatype": "BYTES", "shape": [-1, 1]},
        {"name": "numbers_out", "datatype": "INT32", "shape": [-1, 2]},
    ]
    max_batch_size = 4

    def infer(self, inputs):
        numbers = inputs["numbers"]
        assert len(numbers) <= self.max_batch_size
        offset = inputs.get("offset", np.int32(0))
        return {
            "numbers_out": numbers,
            "sums": (numbers.sum(axis=1, keepdims=True, dtype=np.int32) + offset).astype(np.int32),
            "texts_out": inputs["texts"],
        }
"""

CONSTANT = """
import numpy as np


class Model:
    inputs = [{"name": "x", "datatype": "FP32", "shape": [1]}]
    outputs = [{"name": "y", "datatype": "INT32", "shape": [1]}]

    def infer(self, inputs):
        return {"y": np.array([%d], np.int32)}
"""


def write(repository: Path) -> Path:
    """Every model of the conformance tests, in a new folder."""
    _python(repository, "any", ANY)
    _python(repository, "rows", ROWS)
    for version in (1, 2, 7):
        _python(repository, "versions", CONSTANT % version, version)
    (repository / "versions/config.yaml").write_text("versions: all\n")
    for datatype in DATATYPES:
        onnx_echo(repository, f"onnx_{datatype.lower()}", datatype, ["rows", 3])
    onnx_echo(repository, "fixed", "FP32", [2, 3])
    onnx_echo(repository, "text", "BYTES", [1])
    fake(repository)
    (repository / "broken/1").mkdir(parents=True)
    (repository / "broken/1/model.onnx").write_bytes(b"this is no model")
    return repository


def write_small(repository: Path) -> Path:
    """The few models that hostile requests are sent to."""
    _python(repository, "any", ANY)
    _python(repository, "rows", ROWS)
    onnx_echo(repository, "onnx_fp32", "FP32", ["rows", 3])
    fake(repository)
    return repository


def onnx_echo(repository: Path, name: str, datatype: str, shape: list[int | str]) -> None:
    """An ONNX model of one Identity: x to y."""
    tensors = [helper.make_tensor_value_info(tensor, ONNX_TYPES[datatype], shape) for tensor in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "echo", tensors[:1], tensors[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    folder = repository / name / "1"
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def fake(repository: Path) -> None:
    """The model that fails as it is told to; one request runs and two more may wait."""
    (repository / "fake/1").mkdir(parents=True)
    config = {
        "backend": "fake",
        "max_batch_size": 1,
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 1]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 1]}],
        "batching": {"max_queue_size": 2},
    }
    (repository / "fake/config.yaml").write_text(json.dumps(config))


def _python(repository: Path, name: str, code: str, version: int = 1) -> None:
    folder = repository / name / str(version)
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(code)

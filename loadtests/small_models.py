"""Many small ONNX models, each with weights of its own, so that a mix-up shows."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from loadtests.graph import IR_VERSION, OPSET

WIDTH = 16  # numbers in and out


def model_name(number: int) -> str:
    """The name of one of them."""
    return f"many_{number:04}"


def weights(number: int, weight_kib: int) -> tuple[Any, Any]:
    """Small whole numbers, so that the sums are exact in any order; each model has its own."""
    hidden = max(1, weight_kib * 1024 // (2 * WIDTH * 4))
    random = np.random.default_rng(number)
    return (
        random.integers(-3, 4, (WIDTH, hidden)).astype(np.float32),
        random.integers(-3, 4, (hidden, WIDTH)).astype(np.float32),
    )


def row(number: int) -> Any:
    """The input that a model is asked with."""
    return ((np.arange(WIDTH) + number) % 3 - 1).astype(np.float32)


def answer(number: int, weight_kib: int) -> list[float]:
    """What it has to answer."""
    first, second = weights(number, weight_kib)
    return [float(one) for one in np.maximum(row(number) @ first, 0) @ second]


def place_models(repository: Path, models: int, weight_kib: int) -> None:
    """Write them all."""
    for number in range(models):
        path = repository / model_name(number) / "1" / "model.onnx"
        path.parent.mkdir(parents=True)
        path.write_bytes(_model(number, weight_kib).SerializeToString())


def _model(number: int, weight_kib: int) -> onnx.ModelProto:
    tensor = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "first"], ["sums"]),
            helper.make_node("Relu", ["sums"], ["hidden"]),
            helper.make_node("MatMul", ["hidden", "second"], ["y"]),
        ],
        "many",
        [tensor("x", TensorProto.FLOAT, ["n", WIDTH])],
        [tensor("y", TensorProto.FLOAT, ["n", WIDTH])],
        [
            numpy_helper.from_array(array, name)
            for array, name in zip(weights(number, weight_kib), ("first", "second"), strict=True)
        ],
    )
    return helper.make_model(graph, ir_version=IR_VERSION, opset_imports=[helper.make_opsetid("", OPSET)])

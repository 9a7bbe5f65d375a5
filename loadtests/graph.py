"""An ONNX graph under construction, its weights random and the same each time."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 17
IR_VERSION = 8  # what opset 17 came with, so that servers of some years ago read the files too

Dimensions = Sequence[int | str]


class Graph:
    """Nodes and weights. Every method gives back the name of the value it made."""

    def __init__(self, name: str, seed: int = 3) -> None:
        self._name = name
        self._random = np.random.default_rng(seed)
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: list[onnx.TensorProto] = []

    def add(self, operator: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """One node with one output."""
        name = output or f"{operator.lower()}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, list(inputs), [name], **attributes))
        return name

    def constant(self, array: Any, dtype: type[np.generic] = np.float32) -> str:
        """A weight of given values."""
        name = f"weight_{len(self._initializers)}"
        self._initializers.append(numpy_helper.from_array(np.asarray(array, dtype), name))
        return name

    def weight(self, *shape: int, scale: float) -> str:
        """A weight of normal values of this standard deviation."""
        return self.constant(self._random.standard_normal(shape, dtype=np.float32) * np.float32(scale))

    def linear(self, value: str, rows: int, columns: int, output: str = "") -> str:
        """``value @ W + b`` over the last dimension, with weights that keep the variance."""
        product = self.add("MatMul", value, self.weight(rows, columns, scale=rows**-0.5))
        return self.add("Add", product, self.weight(columns, scale=0.1), output=output)

    def model(
        self, inputs: Sequence[tuple[str, int, Dimensions]], outputs: Sequence[tuple[str, int, Dimensions]]
    ) -> onnx.ModelProto:
        """The whole model; inputs and outputs are name, element type and shape."""
        graph = helper.make_graph(
            self._nodes,
            self._name,
            [helper.make_tensor_value_info(name, kind, list(shape)) for name, kind, shape in inputs],
            [helper.make_tensor_value_info(name, kind, list(shape)) for name, kind, shape in outputs],
            self._initializers,
        )
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="loadtests"
        )


FLOAT = TensorProto.FLOAT
INT64 = TensorProto.INT64

"""An ONNX graph's outputs under other names."""

from collections.abc import Mapping
from typing import Any


def rename_outputs(model: Any, names: Mapping[str, str]) -> None:
    """Give outputs of the graph other names, in place."""
    taken = {name for node in model.graph.node for name in (*node.input, *node.output)}
    for output in model.graph.output:
        new = names.get(output.name)
        if new is None or new == output.name or new in taken:
            continue
        for node in model.graph.node:
            for values in (node.input, node.output):
                for index, value in enumerate(values):
                    if value == output.name:
                        values[index] = new
        output.name = new

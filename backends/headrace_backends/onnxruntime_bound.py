"""A session on a GPU with inputs bound to memory there: allocated once for each shape, captured if that is wanted."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime

from headrace_backends.base import Array

MAX_SHAPES = 64  # for which memory is kept; those used longest ago give theirs back

_NO_GRAPH = "-1"
_GRAPH_ID = "gpu_graph_id"

Shapes = tuple[tuple[int, ...], ...]


@dataclass(slots=True)
class _Place:
    """The memory of one combination of shapes. ``outputs`` are fixed only where a graph needs them to be."""

    binding: Any
    inputs: list[Any]
    number: int
    outputs: list[Any] = field(default_factory=list)
    captures: bool = True  # until that has failed


class BoundSession:
    """Runs a session whose inputs and outputs are numbers. ``device`` is as ONNX Runtime has it: cuda.

    With ``cuda_graphs`` what comes a second time in the same shapes is captured, and replayed from then on. No more
    than MAX_SHAPES are: a session does not give graphs back.
    """

    def __init__(
        self,
        session: Any,
        input_names: Sequence[str],
        output_names: Sequence[str],
        device: str,
        index: int,
        *,
        cuda_graphs: bool = False,
    ) -> None:
        self._session = session
        self._input_names = tuple(input_names)
        self._output_names = tuple(output_names)
        self._device = device
        self._index = index
        self._cuda_graphs = cuda_graphs
        self._places: OrderedDict[Shapes, _Place] = OrderedDict()
        self._made = 0
        self.graphs = 0

    def run(self, inputs: Mapping[str, Array]) -> list[Array]:
        """The outputs, in memory of their own. Raises what the session raises."""
        arrays = [np.ascontiguousarray(inputs[name]).reshape(inputs[name].shape) for name in self._input_names]
        shapes = tuple(array.shape for array in arrays)
        place = self._places.get(shapes)
        again = place is not None
        if place is None:
            place = self._make(arrays)
        else:
            for value, array in zip(place.inputs, arrays, strict=True):
                value.update_inplace(array)
        if self._cuda_graphs and again and place.captures and not place.outputs and self.graphs < MAX_SHAPES:
            self._capture(place)
        else:
            self._launch(place)
        found: list[Array] = place.binding.copy_outputs_to_cpu()
        self._keep(shapes, place)
        return found

    def _make(self, arrays: Sequence[Array]) -> _Place:
        binding = self._session.io_binding()
        values = []
        for name, array in zip(self._input_names, arrays, strict=True):
            value = onnxruntime.OrtValue.ortvalue_from_numpy(array, self._device, self._index)
            binding.bind_ortvalue_input(name, value)
            values.append(value)
        self._made += 1
        return _Place(binding, values, self._made)

    def _launch(self, place: _Place) -> None:
        if not place.outputs:
            # Anew for every run: memory of the last one would have to be as large again, and values may decide that.
            for name in self._output_names:
                place.binding.bind_output(name, self._device, self._index)
        self._session.run_with_iobinding(place.binding, self._options(place))

    def _capture(self, place: _Place) -> None:
        """Run it so that the session captures it; as before, and for good, where that cannot be."""
        self._fix_outputs(place)
        try:
            self._launch(place)
        except Exception:  # noqa: BLE001 - what waits for the GPU cannot be captured; a fault of another kind comes again
            place.outputs, place.captures = [], False
            self._launch(place)

    def _fix_outputs(self, place: _Place) -> None:
        """Give the outputs the memory that the last run gave them, for good: a graph writes always to the same."""
        place.outputs = list(place.binding.get_outputs())
        place.binding.clear_binding_outputs()
        for name, value in zip(self._output_names, place.outputs, strict=True):
            place.binding.bind_ortvalue_output(name, value)
        self.graphs += 1

    def _options(self, place: _Place) -> Any:
        options = onnxruntime.RunOptions()
        options.log_severity_level = 4
        if self._cuda_graphs:
            options.add_run_config_entry(_GRAPH_ID, str(place.number) if place.outputs else _NO_GRAPH)
        return options

    def _keep(self, shapes: Shapes, place: _Place) -> None:
        self._places[shapes] = place
        self._places.move_to_end(shapes)
        if len(self._places) > MAX_SHAPES:
            # A graph goes on using its memory, so that only what has none can go.
            for old, other in self._places.items():
                if not other.outputs:
                    del self._places[old]
                    break

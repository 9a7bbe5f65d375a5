"""An engine at work: named tensors, copies through pinned memory, one stream, CUDA graphs for shapes seen before."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from headrace.core.model import TensorSpec
from headrace.core.tensor import NUMPY_DTYPES
from headrace_backends.base import Array, InputError, LoadError
from headrace_backends.parameters import MAX_GRAPHS
from headrace_backends.tensorrt.buffers import TensorBuffer
from headrace_backends.tensorrt.contexts import Context, Contexts, failure
from headrace_backends.tensorrt.cuda import CudaError, Device
from headrace_backends.tensorrt.datatypes import datatype_of
from headrace_backends.tensorrt.library import Library, log
from headrace_backends.tensorrt.output_memory import make_output_memory
from headrace_backends.tensorrt.profiles import Profile, Range, Shape, choose, refusal

Shapes = tuple[Shape, ...]  # of the inputs, in their order


@dataclass(frozen=True, slots=True)
class EngineTensor:
    """One input or output of an engine. ``on_host``: the library reads or writes it in the host's memory."""

    spec: TensorSpec
    is_input: bool
    on_host: bool = False


@dataclass(slots=True)
class _Graph:
    """What was captured of a context, which it goes on using: so that is nobody else's, and has its shapes for good."""

    executable: int
    outputs: dict[str, Shape]
    context: Context


def read_tensors(engine: Any) -> list[EngineTensor]:
    """The engine's tensors, in its order.

    Raises:
        LoadError: one cannot be served.
    """
    tensors = []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        is_input = engine.get_tensor_mode(name).name == "INPUT"
        if engine.get_tensor_format(name).name != "LINEAR":
            raise LoadError(
                f"'{name}' of the engine has the memory layout {engine.get_tensor_format(name).name}, expected LINEAR: "
                "build it without --inputIOFormats and --outputIOFormats"
            )
        shape = tuple(engine.get_tensor_shape(name))
        spec = TensorSpec(name, datatype_of(engine.get_tensor_dtype(name), f"'{name}' of the engine"), shape)
        tensors.append(EngineTensor(spec, is_input, engine.get_tensor_location(name).name == "HOST"))
    return tensors


def read_profiles(engine: Any, tensors: Sequence[EngineTensor]) -> list[Profile]:
    """The shapes that the engine was built for."""
    inputs = [tensor for tensor in tensors if tensor.is_input]
    return [
        {
            tensor.spec.name: Range(*map(tuple, engine.get_tensor_profile_shape(tensor.spec.name, index)))
            for tensor in inputs
        }
        for index in range(max(1, engine.num_optimization_profiles))
    ]


class Execution:
    """One instance's stream, buffers and contexts. One thread uses it, the one that made it."""

    def __init__(
        self,
        library: Library,
        engine: Any,
        log: Any,
        device: Device,
        tensors: Sequence[EngineTensor],
        profiles: Sequence[Profile],
        *,
        cuda_graphs: bool = False,
    ) -> None:
        self._library = library
        self._log = log
        self._device = device
        self._inputs = [tensor for tensor in tensors if tensor.is_input]
        self._outputs = [tensor for tensor in tensors if not tensor.is_input]
        self._profiles = profiles
        # TensorRT-RTX replaces kernels while it runs, and captures graphs itself when they have settled. A graph would
        # keep what a tensor in the host's memory held when it was captured.
        self._captures = cuda_graphs and not library.is_rtx and not any(tensor.on_host for tensor in tensors)
        self._stream = device.make_stream()
        self._contexts = Contexts(library, engine, log, device, self._stream, captures=cuda_graphs)
        self._buffers = {tensor.spec.name: TensorBuffer(device) for tensor in tensors}
        self._graphs: OrderedDict[Shapes, _Graph | None] = OrderedDict()  # None: seen once

    @property
    def graphs(self) -> int:
        """How many CUDA graphs there are."""
        return sum(graph is not None for graph in self._graphs.values())

    def make_ready(self) -> None:
        """Make what the first run needs of the library, so that a load fails where there is no running.

        Raises:
            MemoryError: the GPU has not enough.
            RuntimeError: anything else, in the library's words.
        """
        self._contexts.of(0)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run one batch. The arrays are the execution's own memory, valid until the next run.

        Raises:
            InputError: no profile takes inputs of such shapes.
            MemoryError: the GPU has not enough.
            DeviceLost: this process cannot use the GPU any more.
            RuntimeError: anything else, in the library's words.
        """
        arrays = [inputs[tensor.spec.name] for tensor in self._inputs]
        shapes = tuple(array.shape for array in arrays)
        graph = self._graphs.get(shapes)
        if graph is None:
            return self._run_plainly(arrays, shapes)
        self._fill(arrays)
        self._graphs.move_to_end(shapes)
        self._device.launch(graph.executable, self._stream)
        self._device.wait(self._stream)
        return {tensor.spec.name: self._array(tensor, graph.outputs[tensor.spec.name]) for tensor in self._outputs}

    @contextmanager
    def steady(self) -> Iterator[None]:
        """Have equal inputs get equal answers within, also from TensorRT-RTX: from the kernels that it begins with."""
        if not self._library.is_rtx:
            yield
            return
        usual, self._contexts = self._contexts, self._contexts.steady()
        try:
            yield
        finally:
            self._contexts.close()
            self._contexts = usual

    def close(self) -> None:
        """Give everything back that is on the GPU."""
        self._forget_graphs()
        self._contexts.close()
        for buffer in self._buffers.values():
            buffer.release()
        self._device.end_stream(self._stream)
        self._log = None  # it may hold the library's runtime, which must go before the GPU does

    # -- one run ------------------------------------------------------------------------------------------

    def _run_plainly(self, arrays: Sequence[Array], shapes: Shapes) -> dict[str, Array]:
        by_name = {tensor.spec.name: array.shape for tensor, array in zip(self._inputs, arrays, strict=True)}
        index = choose(self._profiles, by_name)
        if index is None:  # before there is memory for it, which would stay
            raise InputError(refusal(self._profiles, by_name))
        context = self._contexts.of(index)
        self._reserve_inputs(arrays)
        self._fill(arrays)
        outputs = self._bind(context, by_name)
        try:
            self._enqueue(context, by_name, outputs)
            self._device.wait(self._stream)
        except BaseException:
            self._settle()
            raise
        known = {name: shape for name, shape in outputs.items() if shape is not None}
        if len(known) == len(outputs):
            if self._captures:
                self._capture(index, shapes, by_name, known)
            return {tensor.spec.name: self._array(tensor, known[tensor.spec.name]) for tensor in self._outputs}
        return self._fetch(context, known)

    def _bind(self, made: Context, shapes: Mapping[str, Shape]) -> dict[str, Shape | None]:
        """Tell the context where everything is. Returns the outputs' shapes, None where only their values tell."""
        context = made.context
        for tensor in self._inputs:
            name, buffer = tensor.spec.name, self._buffers[tensor.spec.name]
            if not context.set_input_shape(name, shapes[name]):
                raise InputError(f"input '{name}' of shape {list(shapes[name])}: {self._log.told()}")
            self._bind_address(context, tensor, buffer)
        missing = context.infer_shapes()
        if missing:
            raise RuntimeError(f"{self._library} lacks the shapes of {list(missing)}: {self._log.told()}")
        outputs: dict[str, Shape | None] = {}
        for tensor in self._outputs:
            name = tensor.spec.name
            shape = tuple(context.get_tensor_shape(name))
            if -1 in shape:
                outputs[name] = None
                self._bind_allocator(made, name)
                continue
            outputs[name] = shape
            if self._buffers[name].reserve(_nbytes(tensor.spec, shape)):
                self._forget_graphs()
            self._bind_address(context, tensor, self._buffers[name])
        return outputs

    def _bind_address(self, context: Any, tensor: EngineTensor, buffer: TensorBuffer) -> None:
        assert buffer.pinned is not None
        address = buffer.pinned.address if tensor.on_host else buffer.address
        if not context.set_tensor_address(tensor.spec.name, address):
            raise RuntimeError(f"{self._library} refuses the memory of '{tensor.spec.name}': {self._log.told()}")

    def _bind_allocator(self, made: Context, name: str) -> None:
        if name not in made.allocators:
            made.allocators[name] = make_output_memory(self._library, self._device)
            made.context.set_output_allocator(name, made.allocators[name])
        made.allocators[name].failure = None

    def _enqueue(self, made: Context, shapes: Mapping[str, Shape], outputs: Mapping[str, Shape | None]) -> None:
        """Have the stream copy in, run and copy out."""
        for tensor in self._inputs:
            buffer, nbytes = self._buffers[tensor.spec.name], _nbytes(tensor.spec, shapes[tensor.spec.name])
            if nbytes and not tensor.on_host:
                assert buffer.pinned is not None
                self._device.copy_in(buffer.address, buffer.pinned, nbytes, self._stream)
        self._compute(made)
        for tensor in self._outputs:
            shape = outputs[tensor.spec.name]
            nbytes = _nbytes(tensor.spec, shape) if shape is not None else 0
            if nbytes and not tensor.on_host:
                buffer = self._buffers[tensor.spec.name]
                assert buffer.pinned is not None
                self._device.copy_out(buffer.pinned, buffer.address, nbytes, self._stream)

    def _compute(self, made: Context) -> None:
        if made.context.execute_async_v3(self._stream):
            return
        for allocator in made.allocators.values():
            if allocator.failure is not None:
                raise allocator.failure
        raise failure(f"{self._library} cannot run the engine: {self._log.told()}")

    def _fetch(self, made: Context, known: Mapping[str, Shape]) -> dict[str, Array]:
        """The outputs, of which some have told their shape only now."""
        shapes = dict(known)
        for tensor in self._outputs:
            name = tensor.spec.name
            if name in shapes:
                continue
            memory = made.allocators[name]
            shapes[name] = memory.shape
            nbytes = _nbytes(tensor.spec, memory.shape)
            buffer = self._buffers[name]
            buffer.reserve(nbytes)
            if nbytes:
                assert buffer.pinned is not None
                self._device.copy_out(buffer.pinned, memory.address, nbytes, self._stream)
        self._device.wait(self._stream)
        return {tensor.spec.name: self._array(tensor, shapes[tensor.spec.name]) for tensor in self._outputs}

    # -- graphs -------------------------------------------------------------------------------------------

    def _capture(self, index: int, shapes: Shapes, by_name: Mapping[str, Shape], outputs: dict[str, Shape]) -> None:
        """Make a graph of what has just run, the second time that such shapes come: the first one may be the last.

        It has a context to itself, as NVIDIA advises: what a context keeps for its shapes changes when others come.
        That one runs once before, because a context puts off until then what new shapes ask of it.
        """
        if shapes not in self._graphs:
            self._remember(shapes, None)
            return
        try:
            made = self._contexts.make(index)
            self._bind(made, by_name)
            self._compute(made)
            self._device.wait(self._stream)
            executable = self._captured(made, by_name, outputs)
        except (MemoryError, RuntimeError) as error:  # what cannot be captured in one shape cannot in others
            self._settle()
            log.warning("no further CUDA graphs are captured: %s", error)
            self._log.told()
            self._captures = False
            return
        self._remember(shapes, _Graph(executable, outputs, made))

    def _captured(self, made: Context, by_name: Mapping[str, Shape], outputs: Mapping[str, Shape]) -> int:
        self._device.begin_capture(self._stream)
        try:
            self._enqueue(made, by_name, outputs)
        except BaseException:
            with suppress(CudaError):  # as it is where what cannot be captured has broken the capture off
                self._device.end_graph(self._device.end_capture(self._stream))
            raise
        return self._device.end_capture(self._stream)

    def _remember(self, shapes: Shapes, graph: _Graph | None) -> None:
        self._graphs[shapes] = graph
        self._graphs.move_to_end(shapes)
        while len(self._graphs) > MAX_GRAPHS:
            _, oldest = self._graphs.popitem(last=False)
            if oldest is not None:
                self._device.end_graph(oldest.executable)

    def _forget_graphs(self) -> None:
        """Drop them: they hold addresses that are others now."""
        for graph in self._graphs.values():
            if graph is not None:
                self._device.end_graph(graph.executable)
        self._graphs.clear()

    # -- memory -------------------------------------------------------------------------------------------

    def _reserve_inputs(self, arrays: Sequence[Array]) -> None:
        for tensor, array in zip(self._inputs, arrays, strict=True):
            if self._buffers[tensor.spec.name].reserve(array.nbytes):
                self._forget_graphs()

    def _fill(self, arrays: Sequence[Array]) -> None:
        for tensor, array in zip(self._inputs, arrays, strict=True):
            pinned = self._buffers[tensor.spec.name].pinned
            assert pinned is not None
            if array.size:
                np.copyto(pinned.data[: array.nbytes].view(array.dtype).reshape(array.shape), array)

    def _array(self, tensor: EngineTensor, shape: Shape) -> Array:
        pinned = self._buffers[tensor.spec.name].pinned
        assert pinned is not None
        dtype = NUMPY_DTYPES[tensor.spec.datatype]
        return pinned.data[: _nbytes(tensor.spec, shape)].view(dtype).reshape(shape)

    def _settle(self) -> None:
        """Wait for what a failed run has left on the stream, so that nothing writes to buffers that are used again."""
        with suppress(CudaError):  # not DeviceLost, which is the better answer
            self._device.wait(self._stream)


def _nbytes(spec: TensorSpec, shape: Shape) -> int:
    return prod(shape) * NUMPY_DTYPES[spec.datatype].itemsize

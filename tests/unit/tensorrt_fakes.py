"""A GPU and a TensorRT made of numpy: addresses are real, and copies and runs happen when the stream is waited for."""

import ctypes
from enum import Enum
from types import SimpleNamespace

import numpy as np

from headrace_backends.base import DeviceLost
from headrace_backends.tensorrt.cuda import CudaError, Gpu, Pinned
from headrace_backends.tensorrt.library import Library

ENUM = {
    "TensorIOMode": ["INPUT", "OUTPUT"],
    "TensorLocation": ["DEVICE", "HOST"],
    "TensorFormat": ["LINEAR", "CHW32"],
    "DataType": ["FLOAT", "HALF", "BF16", "INT8", "INT32", "INT64", "BOOL", "UINT8", "FP8"],
    "CudaGraphStrategy": ["DISABLED", "WHOLE_GRAPH_CAPTURE"],
    "ExecutionContextAllocationStrategy": ["STATIC", "ON_PROFILE_CHANGE", "USER_MANAGED"],
    "DynamicShapesKernelSpecializationStrategy": ["LAZY", "EAGER", "NONE"],
    "EngineValidity": ["VALID", "SUBOPTIMAL", "INVALID"],
}
_NOT_WHILE_CAPTURING = {"allocate", "free", "allocate_pinned", "wait", "begin_capture"}
NUMPY = {"FLOAT": np.float32, "INT64": np.int64, "INT32": np.int32, "HALF": np.float16}


class FakeDevice:
    """Memory of the GPU is memory of this process, filled with junk; nothing a stream is given happens before a wait.

    While a stream is captured the driver takes no memory and waits for nothing: to ask for that breaks the capture.
    ``fail_at`` makes the call of that name raise the error given.
    """

    def __init__(self, capability=(8, 9), total_bytes=1 << 30):
        self.gpu = Gpu(0, "Fake GPU", capability, total_bytes)
        self.blocks, self.pinned, self.streams, self.graphs = {}, {}, set(), {}
        self.queued, self.capturing, self.log = [], None, []
        self.fail_at = {}
        self.used = 0
        self.closed = False

    def _called(self, name):
        self.log.append(name)
        if self.capturing is not None and name in _NOT_WHILE_CAPTURING:
            self.broken = True
            raise CudaError(f"{name} says CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED (900)")
        if name in self.fail_at:
            raise self.fail_at[name]

    def allocate(self, nbytes):
        self._called("allocate")
        if self.used + nbytes > self.gpu.total_bytes:
            raise MemoryError("the GPU is out of memory: cuMemAlloc_v2 says CUDA_ERROR_OUT_OF_MEMORY (2)")
        block = (ctypes.c_uint8 * nbytes)()
        np.ctypeslib.as_array(block)[:] = 0xA5
        address = ctypes.addressof(block)
        self.blocks[address] = block
        self.used += nbytes
        return address

    def free(self, address):
        self._called("free")
        self.used -= len(self.blocks.pop(address))

    def allocate_pinned(self, nbytes):
        self._called("allocate_pinned")
        block = (ctypes.c_uint8 * nbytes)()
        pinned = Pinned(ctypes.addressof(block), np.ctypeslib.as_array(block))
        self.pinned[pinned.address] = block
        return pinned

    def free_pinned(self, pinned):
        del self.pinned[pinned.address]

    def enqueue(self, stream, work):
        assert stream in self.streams
        (self.queued if self.capturing is None else self.capturing).append(work)

    def copy_in(self, address, pinned, nbytes, stream):
        self._called("copy_in")
        assert nbytes <= len(self.blocks[address])
        self.enqueue(stream, lambda: ctypes.memmove(address, pinned.address, nbytes))

    def copy_out(self, pinned, address, nbytes, stream):
        self._called("copy_out")
        assert nbytes <= len(self.pinned[pinned.address])
        self.enqueue(stream, lambda: ctypes.memmove(pinned.address, address, nbytes))

    def make_stream(self):
        self.streams.add(len(self.log) + 1000)
        return len(self.log) + 1000

    def end_stream(self, stream):
        self.streams.remove(stream)

    def wait(self, stream):
        self._called("wait")
        assert stream in self.streams
        work, self.queued = self.queued, []
        for one in work:
            one()

    def begin_capture(self, stream):
        self._called("begin_capture")
        self.capturing, self.broken = [], False

    def end_capture(self, stream):
        work, self.capturing = self.capturing, None
        self._called("end_capture")
        if self.broken:
            raise BROKEN_CAPTURE
        graph = len(self.log)
        self.graphs[graph] = work
        return graph

    def launch(self, graph, stream):
        self._called("launch")
        self.queued += self.graphs[graph]

    def end_graph(self, graph):
        self._called("end_graph")
        del self.graphs[graph]

    def memory(self):
        return self.gpu.total_bytes - self.used, self.gpu.total_bytes

    def close(self):
        self.closed = True

    @property
    def empty(self):
        return not (self.blocks or self.pinned or self.streams or self.graphs)


class FakeTensor:
    """One of a fake engine's: ``profiles`` are (min, opt, max) of an input, for each profile."""

    def __init__(self, name, mode, shape, *profiles, kind="FLOAT", location="DEVICE", layout="LINEAR"):
        self.name, self.mode, self.shape, self.profiles = name, mode, shape, profiles
        self.kind, self.location, self.layout = kind, location, layout


class FakeEngine:
    """``compute`` takes arrays by name and returns arrays by name; ``shapes`` the outputs' shapes, -1 where unknown."""

    def __init__(self, device, library, tensors, compute, shapes):
        self.device, self.module = device, library.module
        self.tensors = {tensor.name: tensor for tensor in tensors}
        self.compute, self.shapes = compute, shapes
        self.contexts, self.configs = [], []
        self.device_memory_size_v2 = 96
        self.capturable = True
        self.num_io_tensors = len(tensors)
        self.num_optimization_profiles = max(len(tensor.profiles) for tensor in tensors)

    def get_tensor_name(self, index):
        return list(self.tensors)[index]

    def get_tensor_mode(self, name):
        return getattr(self.module.TensorIOMode, self.tensors[name].mode)

    def get_tensor_format(self, name):
        return getattr(self.module.TensorFormat, self.tensors[name].layout)

    def get_tensor_dtype(self, name):
        return getattr(self.module.DataType, self.tensors[name].kind)

    def get_tensor_shape(self, name):
        return self.tensors[name].shape

    def get_tensor_location(self, name):
        return getattr(self.module.TensorLocation, self.tensors[name].location)

    def get_tensor_profile_shape(self, name, index):
        return self.tensors[name].profiles[index]

    def create_runtime_config(self):
        lazy = self.module.DynamicShapesKernelSpecializationStrategy.LAZY
        return SimpleNamespace(cuda_graph_strategy=None, dynamic_shapes_kernel_specialization_strategy=lazy)

    def create_execution_context(self, config=None):
        self.configs.append(config)
        self.contexts.append(FakeContext(self))
        if config == self.module.ExecutionContextAllocationStrategy.USER_MANAGED:
            self.contexts[-1].workspace = (0, 0)
        return self.contexts[-1]


class FakeContext:
    """What it keeps on the host, its shapes, is read when the work is done: also by a graph of it.

    New shapes ask something of the driver in the first run that has them, so that it cannot be captured.
    ``workspace`` is None where it has memory of its own.
    """

    def __init__(self, engine):
        self.engine, self.profile = engine, None
        self.addresses, self.input_shapes, self.allocators = {}, {}, {}
        self.ran_with, self.workspace = None, None
        self.refuses = False

    def set_device_memory(self, memory, size):
        assert size >= self.engine.device_memory_size_v2
        self.workspace = memory, size

    def set_optimization_profile_async(self, index, stream):
        self.profile = index
        return True

    def set_input_shape(self, name, shape):
        low, _, high = self.engine.tensors[name].profiles[self.profile]
        assert all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)), "the profile was chosen wrongly"
        self.input_shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def set_output_allocator(self, name, allocator):
        self.allocators[name] = allocator

    def infer_shapes(self):
        inputs = [tensor.name for tensor in self.engine.tensors.values() if tensor.mode == "INPUT"]
        return [name for name in inputs if name not in self.input_shapes or name not in self.addresses]

    def get_tensor_shape(self, name):
        return self.engine.shapes(self.input_shapes)[name]

    def execute_async_v3(self, stream):
        if self.refuses:
            return False
        engine, inputs, addresses = self.engine, self.input_shapes, dict(self.addresses)
        declared = engine.shapes(inputs)
        if engine.device.capturing is not None and (self.ran_with != inputs or not engine.capturable):
            return False
        self.ran_with = dict(inputs)

        def work():
            if self.workspace is not None:
                assert len(engine.device.blocks[self.workspace[0]]) >= self.workspace[1]
            arrays = {name: _at(addresses[name], shape, engine.tensors[name].kind) for name, shape in inputs.items()}
            for name, array in engine.compute(arrays).items():
                if -1 not in declared[name]:
                    _at(addresses[name], array.shape, engine.tensors[name].kind)[...] = array

        for name, allocator in self.allocators.items():
            # The values decide, so that the library has to run as far as it takes to know them.
            engine.device.wait(stream)
            arrays = {one: _at(addresses[one], shape, engine.tensors[one].kind) for one, shape in inputs.items()}
            result = engine.compute(arrays)[name]
            address = allocator.reallocate_output(name, 0, result.nbytes, 256)
            assert isinstance(address, int)  # the bindings take nothing else, and complain of None on standard error
            if not address:
                return False
            _at(address, result.shape, engine.tensors[name].kind)[...] = result
            allocator.notify_shape(name, result.shape)
        engine.device.enqueue(stream, work)
        return True


def _at(address, shape, kind):
    dtype = np.dtype(NUMPY[kind])
    nbytes = int(np.prod(shape)) * dtype.itemsize
    block = (ctypes.c_uint8 * max(1, nbytes)).from_address(address)
    return np.ctypeslib.as_array(block)[:nbytes].view(dtype).reshape(shape)


class FakeLog:
    def __init__(self):
        self.lines = []

    def told(self):
        text = "; ".join(self.lines) or "it does not say why"
        self.lines.clear()
        return text


class Plain:
    """In place of a class of the library that ours derive from."""


def fake_library(name="tensorrt", version="10.13.3.9", **more):
    module = SimpleNamespace(**{kind: Enum(kind, values) for kind, values in ENUM.items()}, IOutputAllocator=Plain)
    vars(module).update(more)
    return Library(name, module, version)


LOST = DeviceLost("the GPU is lost to this process: cuStreamSynchronize says CUDA_ERROR_LAUNCH_FAILED (719)")
BROKEN_CAPTURE = CudaError("cuStreamEndCapture says CUDA_ERROR_STREAM_CAPTURE_INVALIDATED (901)")

"""Where outputs go whose shape their values decide: the library asks for memory while it runs."""
# ruff: noqa: ARG002 - what the methods take is the library's to say

from typing import Any

from headrace_backends.tensorrt.cuda import Device
from headrace_backends.tensorrt.library import Library


def make_output_memory(library: Library, device: Device) -> Any:
    """An ``IOutputAllocator`` for one output: ``address`` and ``shape`` are true when a run has ended."""
    module = library.module

    class OutputMemory(module.IOutputAllocator):  # type: ignore[misc, name-defined] # the class is the library's
        def __init__(self) -> None:
            module.IOutputAllocator.__init__(self)
            self.address = 0
            self.shape: tuple[int, ...] = ()
            self.failure: BaseException | None = None
            self._nbytes = 0

        def reallocate_output_async(self, tensor_name: str, memory: Any, size: int, alignment: int, stream: Any) -> int:
            return self.reallocate_output(tensor_name, memory, size, alignment)

        def reallocate_output(self, tensor_name: str, memory: Any, size: int, alignment: int) -> int:
            """Memory for so many bytes; the driver's is aligned by more than is ever asked for. 0: there is none."""
            if size > self._nbytes or not self.address:
                try:
                    self.release()
                    self.address = device.allocate(max(1, size))
                except (MemoryError, RuntimeError) as error:  # nothing may be raised through the library
                    self.failure = error
                    return 0
                self._nbytes = size
            return self.address

        def notify_shape(self, tensor_name: str, shape: Any) -> None:
            self.shape = tuple(shape)

        def release(self) -> None:
            """Give the memory back."""
            if self.address:
                device.free(self.address)
            self.address = self._nbytes = 0

    return OutputMemory()

"""An engine's execution contexts: one for each profile that is asked for, further ones for graphs."""

from dataclasses import dataclass, field
from typing import Any

from headrace_backends.tensorrt.cuda import Device
from headrace_backends.tensorrt.library import Library


@dataclass(slots=True)
class Context:
    """One of the library's, with the profile that it is for."""

    context: Any
    allocators: dict[str, Any] = field(default_factory=dict)  # of outputs whose shape their values decide


class Contexts:
    """Makes them. What lies between inputs and outputs is in one piece of memory, because one of them runs at a time.

    TensorRT-RTX gives each of them its own; with ``captures`` it captures graphs by itself, and while it runs it
    replaces kernels by others that it compiles for the shapes that come, unless they are ``steady``. One thread uses
    this.

    Raises:
        MemoryError: from each method, the GPU has not enough.
        RuntimeError: from each method, anything else, in the library's words.
    """

    def __init__(
        self,
        library: Library,
        engine: Any,
        log: Any,
        device: Device,
        stream: int,
        *,
        captures: bool = False,
        steady: bool = False,
    ) -> None:
        self._library = library
        self._engine = engine
        self._log = log
        self._device = device
        self._stream = stream
        self._captures = captures
        self._steady = steady
        self._of_profiles: dict[int, Context] = {}
        self._workspace = 0  # on the GPU

    def steady(self) -> "Contexts":
        """Others of the engine, whose kernels stay what they are."""
        return Contexts(self._library, self._engine, self._log, self._device, self._stream, steady=True)

    def of(self, profile: int) -> Context:
        """The profile's own."""
        if profile not in self._of_profiles:
            self._of_profiles[profile] = self.make(profile)
        return self._of_profiles[profile]

    def make(self, profile: int) -> Context:
        """A further one. It must be gone before ``close``."""
        made = self._make_of_rtx() if self._library.is_rtx else self._make()
        if made is None:
            raise failure(f"{self._library} cannot make an execution context: {self._log.told()}")
        if not self._library.is_rtx:
            nbytes = max(1, self._engine.device_memory_size_v2)  # as much as any profile needs
            self._workspace = self._workspace or self._device.allocate(nbytes)
            made.set_device_memory(self._workspace, nbytes)
        if not made.set_optimization_profile_async(profile, self._stream):
            raise failure(f"{self._library} cannot use profile {profile}: {self._log.told()}")
        self._device.wait(self._stream)
        return Context(made)

    def close(self) -> None:
        """Give back what is on the GPU."""
        for made in self._of_profiles.values():
            for allocator in made.allocators.values():
                allocator.release()
        self._of_profiles.clear()  # before the memory that they point to
        if self._workspace:
            self._device.free(self._workspace)
            self._workspace = 0
        self._engine = None
        self._log = None  # it may hold the library's runtime, which must go before the GPU does

    def _make(self) -> Any:
        return self._engine.create_execution_context(
            self._library.module.ExecutionContextAllocationStrategy.USER_MANAGED
        )

    def _make_of_rtx(self) -> Any:
        module, config = self._library.module, self._engine.create_runtime_config()
        if self._captures:
            config.cuda_graph_strategy = module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        if self._steady:
            none = module.DynamicShapesKernelSpecializationStrategy.NONE
            config.dynamic_shapes_kernel_specialization_strategy = none
        return self._engine.create_execution_context(config)


def failure(text: str) -> Exception:
    """The error that the library's words stand for."""
    memory = "out of memory" in text.lower() or "OutOfMemory" in text
    return MemoryError(text) if memory else RuntimeError(text)

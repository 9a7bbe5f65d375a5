"""PyTorch models on PyTorch: exported programs and compiled packages (.pt2), and TorchScript (.pt)."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from time import monotonic
from typing import Any

import msgspec
import torch

from headrace.core.model import Signature, TensorSpec
from headrace_backends import parameters, threads, torch_graphs, torch_running
from headrace_backends.base import Array, Backend, DeviceLost, LoadError, ModelSource, RequestInfo
from headrace_backends.compiled_package import CONSENT, is_package
from headrace_backends.failures import blamed, device_lost
from headrace_backends.made_up import made_up
from headrace_backends.row_trial import inferred_batching
from headrace_backends.torch_exported import read_exported
from headrace_backends.torch_graphs import Capture
from headrace_backends.torch_memory import answers_by_history, kept
from headrace_backends.torch_model import TORCH_DTYPES, TorchModel, array_of, gist, tensor_of
from headrace_backends.torch_package import read_package
from headrace_backends.torch_rows import at_least
from headrace_backends.torch_running import Running
from headrace_backends.torchscript import read_torchscript

_PARAMETERS = ("intra_op_threads", "tf32", *torch_running.NAMES, *torch_graphs.NAMES, CONSENT)
_RUNS_TO_A_GRAPH = 3  # of torch's own: the first compiles, the second records, the third is what requests will see
_REFUSALS = (RuntimeError, IndexError, ValueError, AssertionError)


class TorchBackend(Backend):
    """One module in inference mode."""

    warms_up = True

    def __init__(self, device: torch.device, model: TorchModel, max_batch_size: int, running: Running) -> None:
        self._device = device
        self._on_cpu = device.type == "cpu"
        self._running = running
        self._module = running.laid_out(model.module)
        self._call = model.call
        self._signature = Signature(
            tuple(tensor.spec for tensor in model.inputs),
            tuple(tensor.spec for tensor in model.outputs),
            max_batch_size,
        )
        self._dtypes = [TORCH_DTYPES[spec.datatype] for spec in self._signature.outputs]
        self._notes: list[str] = []

    @classmethod
    def load(cls, source: ModelSource) -> "TorchBackend":
        """Read the file, whose ending tells its kind; settle whether rows may be merged, and how many threads it gets.

        The number of threads is the process's: several of these backends would have to share it.
        """
        parameters.refuse_unknown("torch", source.parameters, _PARAMETERS)
        asked = parameters.intra_op_threads(source.parameters)
        running = Running.asked(source.parameters)
        read = _reader(source, running)
        device = torch_device(source)
        graph_sizes = torch_graphs.asked_sizes(source.parameters, device.type)
        on_cpu = device.type == "cpu"
        if on_cpu and "tf32" in source.parameters:
            raise LoadError("parameters.tf32 is for GPUs, and the device is cpu")
        # PyTorch lets convolutions have it unless told otherwise, and it changes answers in the third digit.
        tf32 = parameters.flag(source.parameters, "tf32")
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.set_num_threads(threads.first_choice(source.threads, asked if on_cpu else asked or source.threads))
        with suppress(RuntimeError):  # it can be set once in a process, before the first parallel work
            torch.set_num_interop_threads(1)
        model = read(source, device)
        backend = cls(device, model, source.max_batch_size or 0, running)
        if graph_sizes is not None and any(spec.optional for spec in backend.signature.inputs):
            raise LoadError("parameters.cuda_graphs: not for models with optional inputs")
        if source.max_batch_size != 0:
            backend._call = at_least(model.least_rows, model.call)
        backend._refuse_memory(source, model, lambda: running.laid_out(read(source, device).module))
        if running.channels_last or running.autocast is not None:
            backend._try_running(model)
        if source.max_batch_size is None:
            backend._infer_batching(model)
        backend._settle_filling(model)
        if on_cpu:
            backend._settle_threads(source, asked, model)
        if running.compile:
            backend._compile(model)
        if graph_sizes is not None:
            backend._capture(model, graph_sizes, torch_graphs.cuda_capture(device))
        return backend

    @property
    def signature(self) -> Signature:
        """What the exported program or the configuration says."""
        return self._signature

    def notes(self) -> list[str]:
        """How batching and threads were decided."""
        return list(self._notes)

    def execute(self, inputs: Mapping[str, Array], requests: Sequence[RequestInfo]) -> Mapping[str, Array]:
        """Run the module; an exception of its own is told to the client as a refused input."""
        del requests
        try:
            return self._run(inputs)
        except RuntimeError as error:  # of what a kernel did the copies tell, which wait for it
            lost = None if self._on_cpu else device_lost(error, str(error))
            if lost is None:
                raise
            raise lost from error

    def _run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        given = [
            None if spec.optional and spec.name not in inputs else self._tensor(inputs[spec.name])
            for spec in self._signature.inputs
        ]
        tensors = self._running.inputs(given)
        try:
            with torch.inference_mode(), self._running.context(self._device):
                values = self._running.outputs(self._call(self._module, tensors), self._dtypes)
        except _REFUSALS as error:
            told = gist(str(error)) or type(error).__name__
            text = "out of memory" if isinstance(error, torch.OutOfMemoryError) else str(error)
            raise blamed(text, told) from error
        specs = self._signature.outputs
        if len(values) != len(specs):
            raise RuntimeError(f"the model gave {len(values)} outputs, expected {[spec.name for spec in specs]}")
        return {spec.name: self._array(spec, value) for spec, value in zip(specs, values, strict=True)}

    def close(self) -> None:
        """Let go of the module, and give the GPU's cached memory back."""
        del self._module, self._call
        if not self._on_cpu:
            torch.cuda.empty_cache()

    def _tensor(self, array: Array) -> torch.Tensor:
        tensor = tensor_of(array)
        return tensor if self._on_cpu else tensor.to(self._device)

    def _array(self, spec: TensorSpec, value: Any) -> Array:
        if not isinstance(value, torch.Tensor) or value.dtype is not TORCH_DTYPES[spec.datatype]:
            got = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
            raise RuntimeError(f"output '{spec.name}' is {got}, expected {TORCH_DTYPES[spec.datatype]}")
        return array_of(value)

    def _refuse_memory(self, source: ModelSource, model: TorchModel, fresh: Callable[[], Any]) -> None:
        """Raise LoadError where a request leaves its traces in the module, as far as made-up inputs show that."""
        rows = 1 if self._signature.max_batch_size else None
        made = [one for one in (made_up(model.inputs, rows), made_up(model.inputs, rows and 2, 8)) if one is not None]
        by_size = {tuple(array.shape for array in one.values()): one for one in made}
        requests = list(by_size.values())
        if not isinstance(self._module, torch.nn.Module):  # compiled code

            def renew() -> None:
                self._module = fresh()

            if answers_by_history(self._run_made_up, requests, renew):
                raise LoadError(
                    f"'{source.path.name}' answers a request by those before it, which would be other clients'; "
                    "expected a module that keeps nothing from one to the next: compile it after eval(), with states "
                    "as inputs and outputs"
                )
            return
        names = kept(self._module, self._run_made_up, requests, fresh, model.flow)
        if names:
            raise LoadError(
                f"'{source.path.name}' keeps {', '.join(map(repr, names))} from one request to the next, which would "
                "be other clients' requests; expected a module that holds the same after every request: save it after "
                "eval(), with states as inputs and outputs"
            )

    def _infer_batching(self, model: TorchModel) -> None:
        if model.unmergeable is not None:
            self._notes.append(f"requests are not merged into batches: {model.unmergeable}")
            return
        checked = self._on_cpu or not model.indexes  # on a GPU an index out of range is the end of the process
        size, note = inferred_batching(
            self._run_made_up, model.inputs, model.outputs, model.most_rows, checks_indices=checked
        )
        self._signature = msgspec.structs.replace(self._signature, max_batch_size=size)
        if note is not None:
            self._notes.append(note)

    def _settle_filling(self, model: TorchModel) -> None:
        """Fill batches up only where rows are merged: whoever reads a batch as one must not find more in it."""
        if model.least_rows == 1:
            return
        if not self._signature.max_batch_size:
            self._call = model.call
            return
        why = (
            "it was exported for no fewer"
            if isinstance(model.module, torch.nn.Module)
            else "it was compiled for no fewer; with inductor_configs={'aot_inductor.check_lowerbound': False} one row "
            "is taken as it is"
        )
        self._notes.append(f"a batch of fewer than {model.least_rows} rows is filled up to that: {why}")

    def _settle_threads(self, source: ModelSource, asked: int | None, model: TorchModel) -> None:
        row_ms = threads.time_row(self._run_made_up, model.inputs, batches=self._signature.max_batch_size > 0)
        choice = threads.choose(source.threads, asked, row_ms)
        torch.set_num_threads(choice.count)
        self.cpu_threads = choice.busy
        if choice.note is not None:
            self._notes.append(choice.note)
        if choice.busy and model.compiled_threads > choice.busy:
            self.cpu_threads = min(model.compiled_threads, source.threads)
            self._notes.append(
                f"its code starts {model.compiled_threads} threads whatever it is given: that was decided by "
                "torch.set_num_threads where it was compiled"
            )

    def _try_running(self, model: TorchModel) -> None:
        """Refuse a layout or a precision that the module cannot be run in, though it could in its own."""
        row = self._made_up(model, 1)
        if row is None:
            return
        asked, self._running = self._running, Running()
        runs = self._takes(row)
        self._running = asked
        if runs:
            torch_running.warmed(lambda: self._run_made_up(row), "with these parameters")

    def _compile(self, model: TorchModel) -> None:
        """Compile it for a single row, and for batches where there are any. The threads are settled: they are built in.

        Where no inputs can be made up, the first request waits for the compiler.
        """
        most = max(1, self._signature.max_batch_size)
        runs = 1
        if self._running.launches_graphs and not self._on_cpu:
            torch_graphs.refuse_free_sizes("compile_mode", self._signature.max_batch_size, model.inputs)
            runs = _RUNS_TO_A_GRAPH
        made = [self._made_up(model, rows) for rows in dict.fromkeys((1, min(2, most), most))]
        taken = [inputs for inputs in made if inputs is not None and self._takes(inputs)]
        free = any(-1 in (spec.shape or ()) for spec in self._signature.inputs)
        began = monotonic()
        with torch_running.compile_folder(self._running.compile_cache) as folder:
            self._module = torch_running.compiled(self._module, folder, any_size=free, mode=self._running.mode)
            for inputs in taken * runs:
                torch_running.warmed(lambda inputs=inputs: self._run_made_up(inputs), "compiled")  # type: ignore[misc]
        self._notes.append(
            f"compiled in {monotonic() - began:.0f} s"
            if taken
            else "compiled at the first request, because no inputs could be made up"
        )

    def _capture(self, model: TorchModel, asked: Sequence[int], capture: Capture) -> None:
        """Have batches launched as CUDA graphs from now on, one of each size."""
        sizes = torch_graphs.sizes_for(asked, self._signature.max_batch_size, model.inputs)
        made = made_up(model.inputs, sizes[-1])
        if made is None:
            raise LoadError("parameters.cuda_graphs: the inputs are too large to be made up")
        call, module = self._call, self._module

        def run(tensors: list[torch.Tensor]) -> list[Any]:
            with self._running.context(
                self._device
            ):  # its own each time: autocast keeps what it has cast until the end
                return call(module, tensors)

        tensors = self._running.inputs([self._tensor(made[spec.name]) for spec in self._signature.inputs])
        with torch.inference_mode():
            graphs = torch_graphs.captured(run, tensors, sizes, capture)
        self._call = lambda _, tensors: graphs(tensors)
        self._notes.append(f"CUDA graphs for batches of {', '.join(map(str, sizes))} rows")

    def _takes(self, inputs: dict[str, Array]) -> bool:
        """Whether the module runs on what was made up for it: real inputs decide where it does not."""
        try:
            self._run_made_up(inputs)
        except DeviceLost:
            raise
        except Exception:  # noqa: BLE001 - a module may raise anything
            return False
        return True

    def _made_up(self, model: TorchModel, rows: int) -> dict[str, Array] | None:
        return made_up(model.inputs, rows if self._signature.max_batch_size else None)

    def _run_made_up(self, inputs: dict[str, Array]) -> Mapping[str, Array]:
        return self.execute(inputs, ())


def _reader(source: ModelSource, running: Running) -> Callable[[ModelSource, torch.device], TorchModel]:
    """What reads the file: two kinds of them share an ending, and only what was exported may be run in other ways."""
    if source.path.suffix != ".pt2":
        if running.compile:
            raise LoadError("parameters.compile is for exported programs (.pt2): TorchScript (.pt) is compiled already")
        return read_torchscript
    if not is_package(source.path):
        return read_exported
    if running.compile or running.channels_last or running.autocast is not None:
        raise LoadError(
            "parameters.compile, channels_last and autocast are for exported programs: "
            f"'{source.path.name}' is compiled already"
        )
    return read_package


def torch_device(source: ModelSource) -> torch.device:
    """The device that a model is on, as torch names it, and this thread's from now on where it is a GPU.

    Raises:
        LoadError: torch does not see it.
    """
    if source.gpu is None:
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if source.gpu >= count:
        raise LoadError(
            f"device '{source.device}' is not here: torch {torch.__version__} sees {count} GPUs; "
            "a GPU needs an NVIDIA driver and a torch built with CUDA"
        )
    device = torch.device("cuda", source.gpu)
    torch.cuda.set_device(device)  # not all that is asked for later names one: the first would have it
    return device

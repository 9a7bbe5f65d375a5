"""CUDA graphs of a PyTorch module: a batch is filled up to one of a few sizes, and launched as a whole."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from headrace_backends import parameters
from headrace_backends.base import DeviceLost, LoadError
from headrace_backends.parameters import MAX_GRAPHS
from headrace_backends.specs import FoundTensor
from headrace_backends.torch_model import gist
from headrace_backends.torch_rows import cut, fitting

NAMES = ("cuda_graphs", "graph_batch_sizes")

_WARM_UPS = 3  # runs before a capture, in which libraries choose their kernels and TorchScript is optimised
_TOLERANCE = (
    1e-2  # of the largest value, between a graph and the module: they are the same kernels, or something is wrong
)
_FAILED_BEFORE = "previous error during capture"  # CUDA's words

Run = Callable[[list[torch.Tensor]], list[Any]]
# Records what a function launches. Returns what launches it again, and the tensors that this writes to each time.
Capture = Callable[[Callable[[], list[Any]]], tuple[Callable[[], None], list[Any]]]


@dataclass(frozen=True, slots=True)
class _Graph:
    replay: Callable[[], None]
    outputs: list[Any]


class BatchGraphs:
    """A graph for each size of batch; all read the same inputs, of which each has as many rows as it takes.

    What is called before with ``inputs`` of the largest size is ``run``. Rows that a batch does not fill hold what was
    there before: rows are independent, or nobody may merge them, and theirs are cut off.
    """

    def __init__(self, run: Run, inputs: Sequence[torch.Tensor], sizes: Sequence[int], capture: Capture) -> None:
        self._sizes = sorted(sizes)
        self._inputs = [tensor.clone() for tensor in inputs]
        self._graphs: dict[int, _Graph] = {}
        for size in reversed(self._sizes):  # the largest first: smaller ones fit into the memory that it has taken
            rows = [tensor[:size] for tensor in self._inputs]
            expected = [value.clone() for value in run(rows)]
            replay, outputs = capture(lambda rows=rows: run(rows))  # type: ignore[misc] # mypy infers no default's type
            self._graphs[size] = _Graph(replay, outputs)
            replay()
            _prove(size, expected, outputs)

    def __call__(self, tensors: Sequence[torch.Tensor]) -> list[Any]:
        """The answers to a batch, which the next call overwrites."""
        rows = len(tensors[0])
        size = fitting(rows, self._sizes)
        if size is None:
            raise ValueError(f"a batch has {rows} rows, and the largest that was captured has {self._sizes[-1]}")
        for held, tensor in zip(self._inputs, tensors, strict=True):
            held[:rows].copy_(tensor)
        graph = self._graphs[size]
        graph.replay()
        return cut(graph.outputs, rows)


def asked_sizes(given: Mapping[str, Any], device: str) -> tuple[int, ...] | None:
    """The batch sizes that are asked for, rising; empty for those that ``sizes_for`` chooses, None where none are.

    Raises:
        LoadError: a parameter has a value that it cannot have, or there is no GPU.
    """
    wanted = parameters.flag(given, "cuda_graphs")
    if not wanted:
        if "graph_batch_sizes" in given:
            raise LoadError(
                "parameters.graph_batch_sizes is set and parameters.cuda_graphs is not, so nothing is captured"
            )
        return None
    if device == "cpu":
        raise LoadError("parameters.cuda_graphs is for GPUs, and the device is cpu")
    if parameters.flag(given, "compile"):
        raise LoadError(
            "parameters.cuda_graphs is for modules that are not compiled here; with parameters.compile it is "
            "compile_mode: reduce-overhead that launches whole graphs"
        )
    text = str(given.get("graph_batch_sizes", ""))
    sizes = tuple(map(int, re.findall(r"\d+", text)))
    if not re.fullmatch(r"\s*([1-9]\d{0,5}\s*(,\s*[1-9]\d{0,5}\s*)*)?", text) or list(sizes) != sorted(set(sizes)):
        raise LoadError(f"parameters.graph_batch_sizes is {text!r}, expected rising batch sizes as '1, 8, 32'")
    return sizes


def sizes_for(asked: Sequence[int], max_batch_size: int, inputs: Sequence[FoundTensor]) -> list[int]:
    """The sizes to capture: those asked for and the largest batch, by themselves powers of two.

    Raises:
        LoadError: there are no batches, other dimensions vary as well, or there would be too many.
    """
    if not max_batch_size:
        raise LoadError("parameters.cuda_graphs needs batches, and requests of this model are not merged")
    refuse_free_sizes("cuda_graphs", max_batch_size, inputs)
    if asked and asked[-1] > max_batch_size:
        raise LoadError(
            f"parameters.graph_batch_sizes goes to {asked[-1]} rows, and batches have at most {max_batch_size}"
        )
    sizes = sorted({*(asked or (1 << power for power in range(max_batch_size.bit_length()))), max_batch_size})
    if len(sizes) > MAX_GRAPHS:
        raise LoadError(
            f"parameters.graph_batch_sizes has {len(sizes)} sizes with max_batch_size, expected {MAX_GRAPHS}"
        )
    return sizes


def refuse_free_sizes(parameter: str, max_batch_size: int, inputs: Sequence[FoundTensor]) -> None:
    """Raise LoadError where there could be any number of graphs, as there is one for every size that is captured."""
    counted = 1 if max_batch_size else 0  # dimensions with no more sizes than a batch has rows
    free = [one.spec for one in inputs if one.spec.shape is None or -1 in one.spec.shape[counted:]]
    if free:
        told = ", ".join(f"'{spec.name}' has {list(spec.shape or ())}" for spec in free)
        raise LoadError(f"parameters.{parameter} needs sizes that are fixed but for the rows of batches: {told}")


def cuda_capture(device: torch.device) -> Capture:
    """Captures on a GPU, all into one pool of memory: graphs of one instance never run at the same time.

    All on one stream, too: what a pool holds is given again to the stream only that had it before.
    """
    pool = torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call] # unannotated

    def capture(run: Callable[[], list[Any]]) -> tuple[Callable[[], None], list[Any]]:
        with torch.cuda.device(device):
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    run()
            torch.cuda.current_stream(device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                outputs = run()
        return graph.replay, outputs

    return capture


def captured(run: Run, inputs: Sequence[torch.Tensor], sizes: Sequence[int], capture: Capture) -> BatchGraphs:
    """The graphs of a module, each proved to answer as the module does.

    Raises:
        LoadError: it cannot be captured, or a graph answers otherwise.
    """
    try:
        return BatchGraphs(run, inputs, sizes, capture)
    except (LoadError, DeviceLost):
        raise
    except Exception as error:  # whatever CUDA and a module make of it
        # The end of a capture that has failed fails as well, and stands before the reason.
        why = error.__context__ if _FAILED_BEFORE in str(error) else None
        raise LoadError(f"it cannot be captured as a CUDA graph: {_told(why or error)}") from error


def _told(error: BaseException) -> str:
    return gist(str(error)) or type(error).__name__


def _prove(size: int, expected: Sequence[Any], outputs: Sequence[Any]) -> None:
    for index, (right, value) in enumerate(zip(expected, outputs, strict=True)):
        if right.shape[:1] != (size,):
            raise LoadError(
                f"result {index} has the shape {list(right.shape)} for {size} rows, and parameters.cuda_graphs needs a "
                "row for each"
            )
        scale = 0.0
        if right.is_floating_point() and right.numel():
            scale = _TOLERANCE * float(right.abs().nan_to_num(0.0, 0.0).max())
        if not torch.allclose(value, right, rtol=_TOLERANCE, atol=scale, equal_nan=True):
            raise LoadError(f"the CUDA graph for {size} rows answers otherwise than the module")

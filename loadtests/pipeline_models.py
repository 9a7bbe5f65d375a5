"""The pipeline under load, from a JPEG to its five best classes: models, pictures, and its steps without a server."""

import io
import runpy
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, cycle, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from headrace.core.tensor import Array
from loadtests.graph import FLOAT, INT64, IR_VERSION, OPSET, Graph
from loadtests.inputs import SEED
from loadtests.resnet import build_resnet50

MAX_BATCH_SIZE = 8
BEST = 5
STEPS = ("decode", "classify", "best")
PICTURE_SIZE = (500, 375)
TOLERANCE = 1e-4  # of a score: the last bits depend on the batch that it was computed in
_CLASSES = 1000

# Width and stride of each pair of a depthwise and a 1x1 convolution.
_MOBILE_LAYERS = ((32, 1), (64, 2), (64, 1), (128, 2), (128, 1), (256, 2), *([(256, 1)] * 5), (512, 2), (512, 1))

_DECODE = """
import io

import numpy as np
from PIL import Image

from headrace_backends.python import InputError

MEAN = np.array([123.675, 116.28, 103.53], np.float32)
SCALE = np.float32(1) / np.array([58.395, 57.12, 57.375], np.float32)


class Model:
    inputs = [{"name": "file", "datatype": "BYTES", "shape": [-1, 1]}]
    outputs = [{"name": "pixels", "datatype": "FP32", "shape": [-1, 3, 224, 224]}]
    max_batch_size = %d

    def infer(self, inputs):
        files = inputs["file"].reshape(-1)
        pixels = np.empty((len(files), 3, 224, 224), np.float32)
        for index, file in enumerate(files):
            pixels[index] = self.normalized(file).transpose(2, 0, 1)
        return {"pixels": pixels}

    def normalized(self, file):
        try:
            with Image.open(io.BytesIO(file)) as picture:
                width, height = picture.size
                side = min(width, height) * 224 / 256
                left, top = (width - side) / 2, (height - side) / 2
                small = picture.convert("RGB").resize(
                    (224, 224), Image.Resampling.BILINEAR, (left, top, left + side, top + side)
                )
        except OSError as error:
            raise InputError(f"'file' is no picture: {error}") from error
        return (np.asarray(small, np.float32) - MEAN) * SCALE
"""

_CALLING = """
class Model:
    inputs = [{"name": "file", "datatype": "BYTES", "shape": [-1, 1]}]
    outputs = [
        {"name": "scores", "datatype": "FP32", "shape": [-1, %d]},
        {"name": "classes", "datatype": "INT64", "shape": [-1, %d]},
    ]
    max_batch_size = %d

    def load(self, context):
        self.context = context

    def infer(self, inputs):
        pixels = self.context.infer("decode", inputs)["pixels"]
        logits = self.context.infer("%s", {"data": pixels})["logits"]
        return self.context.infer("best", {"logits": logits})
"""

_ENSEMBLE = """
ensemble:
- {model: decode, inputs: {file: file}, outputs: {pixels: pixels}}
- {model: %s, inputs: {data: pixels}, outputs: {logits: logits}}
- {model: best, inputs: {logits: logits}, outputs: {scores: scores, classes: classes}}
"""


# ---- the models ----


def build_mobilenet() -> onnx.ModelProto:
    """``data`` FP32 [batch, 3, 224, 224] to ``logits`` FP32 [batch, 1000]: MobileNet v1 at half its width."""
    graph = Graph("mobilenet")
    value = graph.add("Relu", _convolution(graph, "data", (16, 3, 3), stride=2))
    channels = 16
    for width, stride in _MOBILE_LAYERS:
        value = graph.add("Relu", _convolution(graph, value, (channels, 1, 3), stride=stride, group=channels))
        value = graph.add("Relu", _convolution(graph, value, (width, channels, 1)))
        channels = width
    value = graph.add("Flatten", graph.add("GlobalAveragePool", value))
    graph.linear(value, channels, _CLASSES, output="logits")
    return graph.model([("data", FLOAT, ("batch", 3, 224, 224))], [("logits", FLOAT, ("batch", _CLASSES))])


def _convolution(graph: Graph, value: str, sizes: tuple[int, int, int], *, stride: int = 1, group: int = 1) -> str:
    """``sizes`` are filters, channels that each of them sees, and kernel."""
    filters, channels, kernel = sizes
    # He's scale keeps activations level.
    weight = graph.weight(filters, channels, kernel, kernel, scale=(2 / (channels * kernel * kernel)) ** 0.5)
    bias = graph.weight(filters, scale=0.05)
    pads = [kernel // 2] * 4
    return graph.add(
        "Conv", value, weight, bias, kernel_shape=[kernel, kernel], strides=[stride, stride], pads=pads, group=group
    )


def build_best() -> onnx.ModelProto:
    """``logits`` FP32 [batch, 1000] to the five highest, ``scores``, and where they stand, ``classes``."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("TopK", ["logits", "count"], ["scores", "classes"], axis=1)],
        "best",
        [value("logits", FLOAT, ["batch", _CLASSES])],
        [value("scores", FLOAT, ["batch", BEST]), value("classes", INT64, ["batch", BEST])],
        [numpy_helper.from_array(np.array([BEST], np.int64), "count")],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="loadtests"
    )


NETS: dict[str, Callable[[], onnx.ModelProto]] = {"resnet50": build_resnet50, "mobilenet": build_mobilenet}


def ensemble_of(net: str) -> str:
    """The name of the ensemble with this net in its middle."""
    return f"{net}_ensemble"


def caller_of(net: str) -> str:
    """The name of the Python model that calls the three."""
    return f"{net}_caller"


def place_pipeline(repository: Path, nets: Sequence[str], threads: int) -> None:
    """Everything for these nets, each of which runs on so many threads.

    Raises:
        ValueError: there is no such net.
    """
    unknown = sorted(set(nets) - set(NETS))
    if unknown:
        raise ValueError(f"there is no net {', '.join(unknown)}; there are {', '.join(NETS)}")
    _put(repository, "decode", "model.py", (_DECODE % MAX_BATCH_SIZE).encode())
    _put(repository, "best", "model.onnx", build_best().SerializeToString(), _onnx_config(1))
    for net in nets:
        _put(repository, net, "model.onnx", NETS[net]().SerializeToString(), _onnx_config(threads))
        _put(repository, caller_of(net), "model.py", (_CALLING % (BEST, BEST, MAX_BATCH_SIZE, net)).encode())
        folder = repository / ensemble_of(net)
        folder.mkdir()
        (folder / "config.yaml").write_text(_ENSEMBLE % net)


def _onnx_config(threads: int) -> str:
    return f"max_batch_size: {MAX_BATCH_SIZE}\nparameters: {{intra_op_threads: {threads}}}\n"


def _put(repository: Path, model: str, file: str, content: bytes, config: str = "") -> None:
    path = repository / model / "1" / file
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    if config:
        (repository / model / "config.yaml").write_text(config)


# ---- the pictures ----


def make_pictures(count: int) -> list[bytes]:
    """JPEG files that differ, the same ones each time: clouds of several sizes and some grain, as photos have."""
    random = np.random.default_rng(SEED)
    return [_picture(random) for _ in range(count)]


def _picture(random: np.random.Generator) -> bytes:
    from PIL import Image

    width, height = PICTURE_SIZE
    canvas = np.full((height, width, 3), random.uniform(90, 160, 3))
    for cells, strength in ((3, 60), (8, 35), (24, 18), (80, 9)):
        clouds = random.integers(0, 256, (cells, cells, 3), np.uint8)
        smooth = Image.fromarray(clouds).resize(PICTURE_SIZE, Image.Resampling.BICUBIC)
        canvas += (np.asarray(smooth, np.float64) - 127.5) * (strength / 64)
    canvas += random.normal(0, 4, canvas.shape)
    file = io.BytesIO()
    Image.fromarray(canvas.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


# ---- the steps without a server ----


@dataclass(frozen=True, slots=True)
class Cost:
    """What one picture takes of the CPU without a server, ``callers`` threads at a time, each with its own batch.

    ``step_us`` has the parts, in the order of STEPS; None where several callers cannot be told apart.
    """

    batch_rows: int
    callers: int
    cpu_us: float
    step_us: tuple[float, ...] | None
    pictures_per_s: float


class Steps:
    """The same files and settings as the server's, called one after the other."""

    def __init__(self, repository: Path, net: str, threads: int) -> None:
        self._decode: Any = runpy.run_path(str(repository / "decode" / "1" / "model.py"))["Model"]().infer
        self._classify = _session(repository / net / "1" / "model.onnx", threads)
        self._best = _session(repository / "best" / "1" / "model.onnx", 1)

    def run(self, files: Sequence[bytes]) -> tuple[Array, Array, tuple[int, ...]]:
        """Scores and classes of a batch of files, and the CPU time of the whole process in each step, in ns."""
        batch = np.array(files, np.object_).reshape(-1, 1)
        times = [time.process_time_ns()]
        pixels = self._decode({"file": batch})["pixels"]
        times.append(time.process_time_ns())
        (logits,) = self._classify.run(["logits"], {"data": pixels})
        times.append(time.process_time_ns())
        scores, classes = self._best.run(["scores", "classes"], {"logits": logits})
        times.append(time.process_time_ns())
        return scores, classes, tuple(after - before for before, after in pairwise(times))


def _session(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # as the server has it
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def expected_scores(repository: Path, net: str, threads: int, files: Sequence[bytes]) -> Array:
    """The right answer for each file.

    Raises:
        ValueError: two files have the same, so that answers swapped would not be noticed.
    """
    steps = Steps(repository, net, threads)
    scores = np.concatenate([steps.run([file])[0] for file in files])
    apart = np.abs(scores[:, None] - scores[None]).max(axis=2) + np.eye(len(files))
    if apart.min() < 10 * TOLERANCE:
        raise ValueError(f"two pictures have the same scores of net '{net}' but for {apart.min():.2g}")
    return scores


def measure_steps(
    repository: Path,
    net: str,
    threads: int,
    files: Sequence[bytes],
    batches: Sequence[int],
    callers: int,
    seconds: float,
) -> list[Cost]:
    """Each batch size, ``seconds`` each: by one caller, and by ``callers`` at a time where that is more than one.

    Call it in a process with nothing else to do.
    """
    steps = Steps(repository, net, threads)
    return [_measure(steps, files, rows, count, seconds) for rows in batches for count in dict.fromkeys((1, callers))]


def _measure(steps: Steps, files: Sequence[bytes], rows: int, callers: int, seconds: float) -> Cost:
    batches = [[files[(first + offset) % len(files)] for offset in range(rows)] for first in range(0, len(files), rows)]
    steps.run(batches[0])  # the first call of a shape plans its memory

    def call_until(end: float) -> list[tuple[int, ...]]:
        parts = []
        for batch in cycle(batches):
            parts.append(steps.run(batch)[2])
            if time.monotonic() >= end:
                return parts
        return parts

    with ThreadPoolExecutor(callers) as pool:
        started, cpu_started_ns = time.monotonic(), time.process_time_ns()
        parts = list(chain.from_iterable(pool.map(call_until, [started + seconds] * callers)))
        elapsed_s, cpu_ns = time.monotonic() - started, time.process_time_ns() - cpu_started_ns
    pictures = len(parts) * rows
    step_us = tuple(sum(times) / pictures / 1e3 for times in zip(*parts, strict=True)) if callers == 1 else None
    return Cost(rows, callers, cpu_ns / pictures / 1e3, step_us, pictures / elapsed_s)

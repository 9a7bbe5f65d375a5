"""Plans made by hand for the tests of serving them: a form of a model that adds a constant, and its proof."""

import tempfile
from pathlib import Path

import msgspec
import numpy as np
from onnx import TensorProto, helper, numpy_helper

from headrace.core.model import Signature, TensorSpec
from headrace.core.tensor import DataType
from headrace.repository.layout import read_folder
from headrace.repository.plans import digest_of
from headrace_backends.optimize.accuracy import Errors
from headrace_backends.optimize.basis import versions
from headrace_backends.optimize.findings import Point
from headrace_backends.optimize.form import Form, Step
from headrace_backends.optimize.hardware import hardware
from headrace_backends.optimize.plan import REPLAY_FILE, Basis, Plan
from headrace_backends.optimize.plan_cache import PlanCache
from headrace_backends.optimize.replay import write_replay

Inputs = dict[str, np.ndarray]
SHAPE = (-1, -1)
SIGNATURE = Signature((TensorSpec("x", DataType.FP32, SHAPE),), (TensorSpec("y", DataType.FP32, SHAPE),), 32)

# What a form says of itself that does as a file beside it tells: "wrong" answers, a "crash", a "hang".
OBEDIENT = """
import os, signal, time
from pathlib import Path

class Model:
    inputs = [{{"name": "x", "datatype": "FP32", "shape": [-1, -1]}}]
    outputs = [{{"name": "y", "datatype": "FP32", "shape": [-1, -1]}}]
    max_batch_size = 32

    def infer(self, inputs):
        order = Path({marker!r}).read_text() if Path({marker!r}).exists() else ""
        if order == "crash" and inputs["x"].max() > 100:
            os.kill(os.getpid(), signal.SIGSEGV)
        if order == "hang" and inputs["x"].max() > 100:
            time.sleep(3600)
        if order == "raise":
            raise RuntimeError("told to")
        return {{"y": inputs["x"] + {add} + (1 if order == "wrong" else 0)}}
"""


def obedient(marker: Path, add: float = 1) -> str:
    """The code of a form that does what the file ``marker`` says."""
    return OBEDIENT.format(marker=str(marker), add=float(add))


def other_onnx(add: float) -> bytes:
    """An ONNX model that adds a constant in two steps, where load.py's does so in one."""
    value = helper.make_tensor_value_info
    half = numpy_helper.from_array(np.array([add / 2], np.float32), "half")
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "half"], ["z"]), helper.make_node("Add", ["z", "half"], ["y"])],
        "add twice",
        [value("x", TensorProto.FLOAT, ["n", "m"])],
        [value("y", TensorProto.FLOAT, ["n", "m"])],
        [half],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return model.SerializeToString()


def put_plan(
    cache: PlanCache,
    model_folder: Path,
    artifact: bytes | str | None,
    *,
    replayed: tuple[list[Inputs], list[Inputs]] | None = None,
    add: float = 1,
    recorded: float | None = None,
    backend: str = "",
    signature: Signature | None = SIGNATURE,
    **changes: object,
) -> Path:
    """Put a plan for version 1 of a model; ``recorded`` is what its recorded answers add, if not ``add``.

    ``replayed`` has recorded inputs and answers of another model. An artifact that is text is the code of a Python
    model, none is the model's own file. Returns the plan's folder.
    """
    folder = read_folder(model_folder)
    file = "model.py" if isinstance(artifact, str) else "model.onnx"
    backend = backend or ("python" if isinstance(artifact, str) else "onnxruntime")
    plan = Plan(
        model=folder.name,
        version="1",
        basis=Basis(digest_of(folder, 1), hardware(), versions(backend)),
        form=Form(backend, (Step("simplify"),)),
        artifact=file if artifact is not None else "",
        files={},
        budget=None,
        allow=(),
        objective="latency",
        examples="4 made up",
        errors=Errors(4, 0.0, 0.0, 1.0),
        speedup=2.5,
        curve=(Point(1, 0.1, 0.2), Point(8, 0.4, 0.5)),
        reference_curve=(Point(1, 0.25, 0.3), Point(8, 1.0, 1.2)),
        made_at="2026-01-01T00:00:00Z",
        signature=signature,
    )
    plan = msgspec.structs.replace(plan, **changes)
    with tempfile.TemporaryDirectory() as made_in:
        if artifact is not None:
            (Path(made_in) / file).write_bytes(artifact.encode() if isinstance(artifact, str) else artifact)
        inputs = [{"x": np.array([[1, number]], np.float32)} for number in range(4)]
        added = add if recorded is None else recorded
        answers = [{"y": one["x"] + np.float32(added)} for one in inputs]
        write_replay(Path(made_in) / REPLAY_FILE, *(replayed or (inputs, answers)))
        return cache.put(Path(made_in), plan)[1]

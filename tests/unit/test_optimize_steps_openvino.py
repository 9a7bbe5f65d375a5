"""The steps to OpenVINO IR: names, datatypes and shapes stay, answers stay near, nothing is printed or sent."""

import logging
import os
import subprocess
import sys
import warnings

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from headrace.core.model import Signature, TensorSpec
from headrace.core.tensor import DataType
from headrace_backends.base import ModelSource
from headrace_backends.openvino import OpenVinoBackend
from headrace_backends.openvino_quietly import ov
from headrace_backends.optimize.examples import Examples
from headrace_backends.optimize.steps.base import StepFailed, StepTask
from headrace_backends.optimize.steps.registry import step

RANDOM = np.random.default_rng(7)
FIRST = RANDOM.standard_normal((16, 3, 3, 3)).astype(np.float32) / 5
SECOND = RANDOM.standard_normal((16, 16, 3, 3)).astype(np.float32) / 12
LAST = RANDOM.standard_normal((16, 4)).astype(np.float32) / 4
CNN = Signature(
    (TensorSpec("image", DataType.FP32, (-1, 3, 16, 16)),), (TensorSpec("scores", DataType.FP32, (-1, 4)),), 32
)


@pytest.fixture(scope="module")
def cnn(tmp_path_factory):
    """Two convolutions, their first with a bias, and a classifier; the nodes have names."""
    node, value = helper.make_node, helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            node("Conv", ["image", "first", "bias"], ["a"], name="one", pads=[1] * 4),
            node("Relu", ["a"], ["b"]),
            node("Conv", ["b", "second"], ["c"], name="two", pads=[1] * 4),
            node("Relu", ["c"], ["d"]),
            node("GlobalAveragePool", ["d"], ["e"]),
            node("Flatten", ["e"], ["f"]),
            node("MatMul", ["f", "last"], ["scores"], name="three"),
        ],
        "cnn",
        [value("image", TensorProto.FLOAT, ["n", 3, 16, 16])],
        [value("scores", TensorProto.FLOAT, ["n", 4])],
        [
            numpy_helper.from_array(array, name)
            for name, array in {
                "first": FIRST,
                "second": SECOND,
                "last": LAST,
                "bias": np.full(16, 0.1, np.float32),
            }.items()
        ],
    )
    path = tmp_path_factory.mktemp("cnn") / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def images(count):
    random = np.random.default_rng(count)
    rows = [{"image": random.standard_normal((1, 3, 16, 16)).astype(np.float32)} for _ in range(count)]
    return Examples(tuple(rows), tuple({} for _ in rows), "test")


def take(kind, source, folder, options=None, signature=CNN, examples=None):
    folder.mkdir()
    notes = []
    examples = images(12) if examples is None else examples
    path = step(kind)(StepTask(source, folder, signature, examples, options or {}, note=notes.append))
    assert path == folder / "model.xml"
    assert sorted(file.name for file in folder.iterdir()) == ["model.bin", "model.xml"]
    return path, notes


def load(path):
    return OpenVinoBackend.load(ModelSource("m", "1", path))


def operators(path):
    return [operator.get_type_name() for operator in ov.Core().read_model(path).get_ops()]


@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [
        ("openvino", {}, 1e-6),
        ("openvino_int8", {}, 0.1),
        ("openvino_int8", {"preset": "performance", "samples": 4, "fast_bias_correction": True}, 0.1),
        ("openvino_int8_weights", {}, 0.05),
        ("openvino_int8_weights", {"symmetric": True}, 0.05),
    ],
)
def test_the_model_stays_the_same_to_its_clients(cnn, tmp_path, capfd, kind, options, tolerance):
    path, _ = take(kind, cnn, tmp_path / "made", options)
    assert capfd.readouterr() == ("", "")
    made = load(path)
    assert made.signature == CNN
    batch = {"image": np.concatenate([one["image"] for one in images(8).inputs])}
    wanted = load(cnn).execute(batch, ())["scores"].copy()
    difference = np.abs(made.execute(batch, ())["scores"] - wanted).max() / np.abs(wanted).max()
    assert difference <= tolerance
    assert difference > 0 or kind == "openvino"


def test_weights_become_bytes(cnn, tmp_path):
    full, _ = take("openvino", cnn, tmp_path / "full")
    small, _ = take("openvino_int8_weights", cnn, tmp_path / "small")
    sizes = [path.with_suffix(".bin").stat().st_size for path in (full, small)]
    assert sizes[1] < sizes[0] / 2


@pytest.mark.parametrize("keep", [["two"], ["c"], ["two", "three"], ["Convolution"]])
def test_layers_that_are_kept_are_not_quantised(cnn, tmp_path, keep):
    everything, _ = take("openvino_int8", cnn, tmp_path / "everything")
    mixed, notes = take("openvino_int8", cnn, tmp_path / "mixed", {"keep": keep})
    assert operators(mixed).count("FakeQuantize") < operators(everything).count("FakeQuantize")
    assert operators(mixed).count("FakeQuantize") > 0
    assert [note for note in notes if "not found" in note] == []


def test_a_product_is_found_by_the_name_that_it_had_with_its_bias(cnn, tmp_path):
    weights, _ = take("openvino_int8_weights", cnn, tmp_path / "kept", {"keep": ["one"]})
    constants = [
        one.get_element_type() for one in ov.Core().read_model(weights).get_ops() if one.get_type_name() == "Constant"
    ]
    assert constants.count(ov.Type.u8) == 2 * 2  # weights and zero points of the other two


def test_logging_stays_as_it_is(cnn, tmp_path, caplog):
    log = logging.getLogger("headrace.after_a_step")
    take("openvino_int8_weights", cnn, tmp_path / "made")
    log.warning("still heard")
    assert "still heard" in caplog.text
    assert type(logging.getLogger("headrace.made_after_a_step")) is logging.Logger


def test_unknown_layers_are_told(cnn, tmp_path):
    _, notes = take("openvino_int8", cnn, tmp_path / "some", {"keep": ["two", "nowhere"]})
    assert "not found in OpenVINO's graph, so not kept as they are: nowhere" in notes
    for kind in ("openvino_int8", "openvino_int8_weights"):
        with pytest.raises(StepFailed, match="none of the layers to keep are in OpenVINO's graph"):
            take(kind, cnn, tmp_path / kind, {"keep": ["nowhere"]})


@pytest.mark.parametrize(
    ("kind", "options", "problem"),
    [
        ("openvino_int8", {"presets": "mixed"}, "the options are wrong: .*presets"),
        ("openvino_int8", {"preset": "best"}, "the preset is 'best', expected performance or mixed"),
        ("openvino_int8", {"samples": 0}, "no examples to calibrate with"),
        ("openvino_int8_weights", {"symmetric": "no"}, "the options are wrong: .*bool"),
        ("openvino", {"half": True}, "the step openvino has no options, got half"),
    ],
)
def test_wrong_options(cnn, tmp_path, kind, options, problem):
    with pytest.raises(StepFailed, match=problem):
        take(kind, cnn, tmp_path / "made", options)


def test_what_there_is_no_example_of_is_not_quantised(cnn, tmp_path):
    with pytest.raises(StepFailed, match="no examples to calibrate with"):
        take("openvino_int8", cnn, tmp_path / "made", examples=images(0))


def test_what_has_no_weights_is_not_quantised(tmp_path):
    x = ov.opset13.parameter([-1, 3], ov.Type.f32)
    x.output(0).set_names({"x"})
    y = ov.opset13.relu(x)
    y.output(0).set_names({"y"})
    ov.save_model(ov.Model([y], [x], "m"), tmp_path / "model.xml")
    signature = Signature((TensorSpec("x", DataType.FP32, (-1, 3)),), (TensorSpec("y", DataType.FP32, (-1, 3)),), 32)
    examples = Examples(({"x": np.ones((1, 3), np.float32)},), ({},), "test")
    with pytest.raises(StepFailed, match="NNCF"):
        take("openvino_int8", tmp_path / "model.xml", tmp_path / "made", signature=signature, examples=examples)


def test_what_cannot_be_read_is_told(cnn, tmp_path):
    broken = tmp_path / "model.onnx"
    broken.write_bytes(b"garbage")
    with pytest.raises(StepFailed, match=r"^cannot load 'model\.onnx': it is not in the format ONNX$"):
        take("openvino", broken, tmp_path / "one")
    other = Signature(CNN.inputs, (TensorSpec("labels", DataType.FP32, (-1, 4)),), 32)
    with pytest.raises(StepFailed, match=r"OpenVINO finds no output 'labels' in it; there are \['scores'\]"):
        take("openvino", cnn, tmp_path / "two", signature=other)
    texts = Signature((TensorSpec("t", DataType.BYTES, (-1,)),), CNN.outputs, 32)
    with pytest.raises(StepFailed, match="OpenVINO does not run models with strings, as 't'"):
        take("openvino", cnn, tmp_path / "three", signature=texts)


def test_ir_is_a_source_too(cnn, tmp_path):
    path, _ = take("openvino", cnn, tmp_path / "one")
    again, _ = take("openvino_int8", path, tmp_path / "two")
    assert load(again).signature == CNN


class Pair(torch.nn.Module):
    def forward(self, left, right):
        return left + right, left - 2 * right.float()


PAIR_IN = (TensorSpec("left", DataType.FP32, (-1, 3)), TensorSpec("right", DataType.INT64, (-1, 3)))
PAIR = {"left": np.array([[1, 2, 3.5]], np.float32), "right": np.array([[4, 5, 6]])}


def saved(folder, ending):
    example = (torch.ones(2, 3), torch.ones(2, 3, dtype=torch.int64))
    path = folder / f"model{ending}"
    if ending == ".pt2":
        rows = torch.export.Dim("rows")
        torch.export.save(torch.export.export(Pair(), example, dynamic_shapes=({0: rows}, {0: rows})), path)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            torch.jit.save(torch.jit.trace(Pair(), example), path)
    return path


@pytest.mark.parametrize(
    ("ending", "inputs", "outputs"),
    [
        (".pt2", PAIR_IN, ("output_0", "output_1")),
        (".pt2", PAIR_IN, ("output_1", "output_0")),
        (".pt", PAIR_IN, ("OUTPUT__1", "OUTPUT__0")),
        (".pt", PAIR_IN[::-1], ("OUTPUT__0", "OUTPUT__1")),
    ],
)
def test_torch_files(tmp_path, ending, inputs, outputs, capfd):
    specs = tuple(TensorSpec(name, DataType.FP32, (-1, 3)) for name in outputs)
    path, _ = take("openvino", saved(tmp_path, ending), tmp_path / "made", signature=Signature(inputs, specs, 32))
    assert capfd.readouterr() == ("", "")
    made = load(path)
    assert set(made.signature.inputs) == set(inputs)
    assert set(made.signature.outputs) == set(specs)
    answers = made.execute(PAIR, ())
    for name in outputs:
        expected = [[5, 7, 9.5]] if name.endswith("0") else [[-7, -8, -8.5]]
        assert answers[name].tolist() == expected


def test_nothing_is_sent_or_printed_and_torch_stays_out(cnn, tmp_path):
    code = f"""
import socket, sys
from pathlib import Path
import numpy as np
def refuse(*_): raise AssertionError("somebody is called")
socket.socket.connect = refuse
from headrace.core.model import Signature, TensorSpec
from headrace.core.tensor import DataType
from headrace_backends.optimize.examples import Examples
from headrace_backends.optimize.steps.base import StepTask
from headrace_backends.optimize.steps.registry import step
signature = Signature(
    (TensorSpec("image", DataType.FP32, (-1, 3, 16, 16)),), (TensorSpec("scores", DataType.FP32, (-1, 4)),), 32
)
rows = tuple({{"image": np.ones((1, 3, 16, 16), np.float32) * n}} for n in range(3))
for kind in ("openvino_int8", "openvino_int8_weights"):
    folder = Path({str(tmp_path)!r}) / kind
    folder.mkdir()
    step(kind)(StepTask(Path({str(cnn)!r}), folder, signature, Examples(rows, ({{}},) * 3, "test")))
import nncf.telemetry.wrapper
assert type(nncf.telemetry.wrapper.telemetry).__name__ != "NNCFTelemetry"
assert sys.modules.get("openvino_telemetry") is None
assert "torch" not in sys.modules
"""
    home = tmp_path / "home"
    home.mkdir()
    environment = {**os.environ, "HOME": str(home)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)
    assert list(home.iterdir()) == []


def test_a_tensorflow_lite_file_keeps_the_names_of_its_signature(tmp_path):
    litert = pytest.importorskip("headrace_backends.litert", reason="ai-edge-litert is not installed")
    from tflite_nets import linear

    random = np.random.default_rng(11)
    weights = random.standard_normal((64, 3)).astype(np.float32)
    path = linear(tmp_path / "model.tflite", weights)  # whose graph calls them in:0 and out:0
    signature = litert.LiteRtBackend.load(ModelSource("m", "1", path)).signature
    (tmp_path / "made").mkdir()
    task = StepTask(path, tmp_path / "made", signature, Examples((), (), "none"))
    backend = OpenVinoBackend.load(ModelSource("m", "1", step("openvino")(task)))
    assert (backend.signature.inputs, backend.signature.outputs) == (signature.inputs, signature.outputs)
    rows = random.standard_normal((5, 64)).astype(np.float32)
    np.testing.assert_allclose(backend.execute({"x": rows}, ())["y"], rows @ weights, rtol=1e-4, atol=1e-4)

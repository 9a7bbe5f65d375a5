"""What is read of model files before anything is tried, and the hush around talkative libraries."""

import logging
import subprocess
import sys
import warnings

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from unit.onnx_nets import convolutions, save, task_for, two_layers, value

from headrace_backends.optimize.quiet import hushed
from headrace_backends.optimize.steps import int8_static
from headrace_backends.optimize.traits import Traits, operator_counts, traits_of


def test_a_convolutional_net(tmp_path):
    traits = traits_of(convolutions(tmp_path))
    assert (traits.convolutions, traits.products, traits.free_products, traits.depthwise) == (3, 1, 0, 1)
    assert traits.convolution_macs == 36 * 16 * (27 + 9 + 16)
    assert traits.product_macs == 80
    assert traits.mostly_convolutions
    assert (traits.quantized, traits.transformer, traits.control_flow, traits.opset) == (False, False, False, 17)
    assert traits.dynamic_batch
    assert traits.parameter_types == ("FLOAT",)
    assert traits.parameter_bytes == 4 * (16 * 27 + 16 * 9 + 16 * 16 + 5 * 16 + 16 * 3 + 5 + 2)
    assert traits.operators["Conv"] == 3


def test_a_quantised_net_is_known_and_its_layers_still_count(tmp_path):
    path = convolutions(tmp_path)
    traits = traits_of(int8_static.apply(task_for(path, tmp_path)))
    assert traits.quantized
    assert (traits.convolutions, traits.products) == (3, 1)
    assert traits.convolution_macs == traits_of(path).convolution_macs


def test_a_net_of_products(tmp_path):
    traits = traits_of(two_layers(tmp_path))
    assert (traits.convolutions, traits.products, traits.product_macs) == (0, 2, 32 * 64 + 64 * 8)
    assert not traits.mostly_convolutions


def test_attention_makes_a_transformer(tmp_path):
    node = helper.make_node
    nodes = [
        node("LayerNormalization", ["x", "one"], ["n"], axis=-1),
        node("Transpose", ["n"], ["t"], perm=[0, 2, 1]),
        node("MatMul", ["n", "t"], ["scores"]),
        node("Softmax", ["scores"], ["share"]),
        node("MatMul", ["share", "n"], ["y"]),
    ]
    inputs, outputs = ([value(name, TensorProto.FLOAT, "n", "s", 8)] for name in "xy")
    traits = traits_of(save(tmp_path, nodes, inputs, outputs, {"one": np.ones(8, np.float32)}))
    assert traits.transformer
    assert traits.free_products == 2
    assert traits.product_macs is None  # as many as there are tokens


def test_control_flow_and_fixed_batches_are_seen(tmp_path):
    inner = [
        helper.make_graph([helper.make_node("Relu", ["x"], ["q"])], name, [], [value("q", TensorProto.FLOAT, 2, 2)])
        for name in ("yes", "no")
    ]
    nodes = [helper.make_node("If", ["b"], ["y"], then_branch=inner[0], else_branch=inner[1])]
    inputs = [value("x", TensorProto.FLOAT, 2, 2), value("b", TensorProto.BOOL)]
    traits = traits_of(save(tmp_path, nodes, inputs, [value("y", TensorProto.FLOAT, 2, 2)]))
    assert traits.control_flow
    assert traits.dynamic_batch is False
    assert traits.operators == {"Relu": 2, "If": 1}


def test_weights_in_other_files_are_counted_and_not_read(tmp_path):
    path = convolutions(tmp_path)
    onnx.save(onnx.load(path), tmp_path / "m.onnx", save_as_external_data=True, location="weights", size_threshold=0)
    (tmp_path / "weights").unlink()
    assert traits_of(tmp_path / "m.onnx") == traits_of(path)


def test_other_files_tell_what_they_can(tmp_path):
    module = torch.nn.Linear(64, 32)
    torch.export.save(torch.export.export(module, (torch.zeros(2, 64),)), tmp_path / "m.pt2")
    traits = traits_of(tmp_path / "m.pt2")
    assert traits.parameter_bytes is not None
    assert traits.parameter_bytes >= 4 * 65 * 32
    assert traits.convolutions is None
    assert traits.mostly_convolutions is None
    (tmp_path / "m.xml").write_text(
        '<net><layers><layer type="Parameter"/><layer type="MatMul"/>'
        '<layer type="Const"/><layer type="MatMul"/></layers></net>'
    )
    (tmp_path / "m.bin").write_bytes(b"x" * 40)
    assert traits_of(tmp_path / "m.xml") == Traits(operators={"MatMul": 2}, parameter_bytes=40)
    (tmp_path / "m.param").write_text("7767517\n3 3\nInput x 0 1 x\nReLU r 1 1 x y\nReLU s 1 1 y z\n")
    assert operator_counts(tmp_path / "m.param") == {"ReLU": 2}
    assert operator_counts(tmp_path / "model.plan") == {}
    assert traits_of(tmp_path / "model.plan") == Traits()


def test_the_module_imports_no_framework():
    code = (
        "import sys, headrace_backends.optimize.traits, headrace_backends.optimize.sensitivity;"
        "sys.exit(any(name in sys.modules for name in ('onnx', 'onnxruntime', 'torch')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_hushed_catches_what_is_printed_logged_and_warned_of(capsys):
    root = logging.getLogger()
    before = list(root.handlers)
    with hushed() as told:
        sys.stdout.write("progress\n")
        sys.stderr.write("trouble\n")
        logging.getLogger("library").warning("deep %s", "trouble")
        warnings.warn("old\n  thing", DeprecationWarning, stacklevel=1)
    assert told == ["deep trouble", "old thing"]
    assert capsys.readouterr() == ("", "")
    assert root.handlers == before

"""Steps on ONNX files: answers before and after, inputs and outputs kept, and reasons where there can be no step."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from unit.onnx_nets import answers, attention, convolutions, declared, examples_of, save, task_for, two_layers, value

from headrace.core.model import Signature
from headrace_backends.optimize import onnx_model, quantizing
from headrace_backends.optimize.examples import Examples
from headrace_backends.optimize.quantizing import Quantizer, Recipe, int8_layers
from headrace_backends.optimize.sensitivity import relative_error
from headrace_backends.optimize.steps import fuse_transformer, half, int8_dynamic, int8_static, simplify
from headrace_backends.optimize.steps.base import StepFailed, StepTask

NODE = helper.make_node
FLOAT, INT64, STRING = TensorProto.FLOAT, TensorProto.INT64, TensorProto.STRING


def error(path, made, examples):
    return relative_error(answers(path, examples), answers(made, examples))


def test_static_int8_keeps_the_interface_and_nearly_the_answers(tmp_path, capfd):
    path, notes = convolutions(tmp_path), []
    examples = examples_of(path)
    made = int8_static.apply(task_for(path, tmp_path, notes))
    assert declared(made) == declared(path)
    assert sorted(int8_layers(onnx.load(made))) == ["depthwise", "first", "gemm", "last"]
    assert 0 < error(path, made, examples) < 0.1
    assert notes == ["4 of 4 layers are in int8, calibrated with 24 examples"]
    assert [file.name for file in made.parent.iterdir()] == ["model.onnx"]
    assert capfd.readouterr() == ("", "")


def test_better_rounding_is_better(tmp_path):
    path = convolutions(tmp_path)
    examples = examples_of(path, 200)
    errors = {}
    for rounding in ("nearest", "best"):
        folder = tmp_path / rounding
        folder.mkdir()
        task = task_for(path, folder, examples=examples, rounding=rounding, samples=100)
        errors[rounding] = error(path, int8_static.apply(task), examples)
    assert errors["best"] < 0.9 * errors["nearest"]


@pytest.mark.parametrize("kept", [["depthwise"], ["depthwise", "gemm"], ["Gemm"], ["Conv"]])
def test_kept_layers_stay_in_float_also_in_the_runtime(tmp_path, kept):
    path = convolutions(tmp_path)
    made = int8_static.apply(task_for(path, tmp_path, keep=kept))
    model = onnx.load(made)
    kinds = {"first": "Conv", "depthwise": "Conv", "last": "Conv", "gemm": "Gemm"}
    wanted = [name for name, kind in kinds.items() if name not in kept and kind not in kept]
    assert sorted(int8_layers(model)) == sorted(wanted)
    # Left as plain convolutions, ONNX Runtime would quantise them by itself.
    floats = {node.name: node.op_type for node in model.graph.node if node.name in kinds and node.name not in wanted}
    assert floats == {name: f"Fused{kinds[name]}" for name in floats}
    examples = examples_of(path)
    assert error(path, made, examples) < 0.1
    as_written = answers(made, examples, onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL)
    assert relative_error(as_written, answers(made, examples)) < 0.005


def test_the_ends_of_a_net_stay_in_float_with_all_that_is_between(tmp_path):
    path = convolutions(tmp_path)
    made = int8_static.apply(task_for(path, tmp_path, keep_first=2, keep_last=1, keep=["add"]))
    model = onnx.load(made)
    assert int8_layers(model) == ["last"]
    readers = {name: node.op_type for node in model.graph.node for name in node.input}
    makers = {name: node.op_type for node in model.graph.node for name in node.output}
    assert (readers["x"], makers["y"]) == ("FusedConv", "FusedGemm")
    depthwise = next(node for node in model.graph.node if node.name == "depthwise")
    assert makers[depthwise.input[0]] == "Relu"
    assert error(path, made, examples_of(path)) < 0.05
    with pytest.raises(StepFailed, match="the model has 4 layers: none would be left"):
        int8_static.apply(task_for(path, tmp_path, keep_first=3, keep_last=1))


def test_a_model_with_one_int8_layer_differs_less_than_one_with_all(tmp_path):
    path = convolutions(tmp_path)
    examples, task = examples_of(path), task_for(path, tmp_path)
    quantizer = Quantizer(task, Recipe(samples=24))
    errors = []
    for number, only in enumerate((["gemm"], [])):
        target = tmp_path / f"{number}.onnx"
        onnx.save(quantizer.made(only=only), target)
        errors.append(error(path, target, examples))
    assert 0 < errors[0] < errors[1]
    assert quantizer.group("depthwise") == ["depthwise", "clip"]
    assert quantizer.group("last") == ["last"]


@pytest.mark.parametrize("options", [{"calibrate": "percentile"}, {"calibrate": "entropy"}, {"activations": "int8"}])
def test_other_recipes_make_models_too(tmp_path, options, capfd):
    path = convolutions(tmp_path)
    made = int8_static.apply(task_for(path, tmp_path, **options))
    assert error(path, made, examples_of(path)) < 0.6
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"keep": ["nobody"]}, "no layers or operators ['nobody']"),
        ({"calibrate": "guess"}, "int8_static"),
        ({"samples": 0}, "int8_static"),
        ({"colour": "red"}, "colour"),
        ({"keep": ["Conv", "Gemm"]}, "nothing of the model"),
    ],
)
def test_static_int8_refuses_what_it_is_not_told_well(tmp_path, options, reason):
    path = convolutions(tmp_path)
    with pytest.raises(StepFailed, match=reason.replace("[", r"\[")):
        int8_static.apply(task_for(path, tmp_path, **options))


def test_static_int8_wants_real_examples_and_a_model_in_float(tmp_path):
    path = convolutions(tmp_path)
    with pytest.raises(StepFailed, match="real inputs"):
        int8_static.apply(task_for(path, tmp_path, examples=examples_of(path, real=False)))
    with pytest.raises(StepFailed, match="no examples"):
        int8_static.apply(task_for(path, tmp_path, examples=examples_of(path, 0)))
    made = int8_static.apply(task_for(path, tmp_path))
    with pytest.raises(StepFailed, match="quantised already"):
        int8_static.apply(task_for(made, tmp_path / "made", examples=examples_of(path)))


def test_several_inputs_and_outputs_integers_among_them(tmp_path):
    path = two_layers(tmp_path)
    for number, step in enumerate((int8_static, int8_dynamic, half)):
        folder = tmp_path / str(number)
        folder.mkdir()
        made = step.apply(task_for(path, folder))
        assert declared(made) == declared(path)
        assert error(path, made, examples_of(path)) < 0.1


def test_strings_are_calibrated_with(tmp_path):
    nodes = [
        NODE("Equal", ["s", "word"], ["same"]),
        NODE("Cast", ["same"], ["f"], to=FLOAT),
        NODE("MatMul", ["f", "w"], ["y"]),
    ]
    weights = {"word": np.array(["word"], object), "w": np.ones((4, 4), np.float32)}
    inputs, outputs = [value("s", STRING, "n", 4)], [value("y", FLOAT, "n", 4)]
    path = save(tmp_path, nodes, inputs, outputs, weights, opset=19)
    made = int8_static.apply(task_for(path, tmp_path))
    text = examples_of(path, 2)
    for one in text.inputs:
        one["s"][:] = "word"
    assert [one["y"].tolist() for one in answers(made, text)] == [[[4.0] * 4]] * 2


def test_old_operators_are_converted(tmp_path):
    path = convolutions(tmp_path, opset=11)
    made = int8_static.apply(task_for(path, tmp_path))
    assert onnx_model.opset(onnx.load(made)) >= onnx_model.LEAST_OPSET
    assert error(path, made, examples_of(path)) < 0.1


def test_a_bias_may_have_a_dimension_of_one_before_it_as_tensorflow_writes_them(tmp_path):
    random = np.random.default_rng(8)
    weights = {"w": random.standard_normal((16, 4)), "b": random.standard_normal((1, 4))}
    weights = {name: array.astype(np.float32) for name, array in weights.items()}
    nodes = [NODE("MatMul", ["x", "w"], ["p"]), NODE("Add", ["p", "b"], ["y"])]
    path = save(tmp_path, nodes, [value("x", FLOAT, "n", 16)], [value("y", FLOAT, "n", 4)], weights)
    made = int8_static.apply(task_for(path, tmp_path))
    assert len(int8_layers(onnx.load(made))) == 1
    assert error(path, made, examples_of(path)) < 0.05


def test_shape_inference_that_gives_up_leaves_nothing_in_the_working_directory(tmp_path, monkeypatch):
    original = quantizing.quant_pre_process

    def gives_up(source, target, *, skip_symbolic_shape):
        if not skip_symbolic_shape:
            Path("sym_shape_infer_temp.onnx").write_bytes(b"the model")
            raise RuntimeError("Incomplete symbolic shape inference")
        original(source, target, skip_symbolic_shape=True)

    monkeypatch.setattr(quantizing, "quant_pre_process", gives_up)
    path = convolutions(tmp_path)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    made = int8_static.apply(task_for(path, tmp_path))
    assert [file.name for file in made.parent.iterdir()] == ["model.onnx"]
    assert not list(here.iterdir())


def test_weights_in_other_files_come_along(tmp_path):
    path = convolutions(tmp_path)
    model = onnx.load(path)
    outside = tmp_path / "outside"
    outside.mkdir()
    onnx.save(model, outside / "m.onnx", save_as_external_data=True, location="weights", size_threshold=16)
    made = int8_static.apply(task_for(outside / "m.onnx", tmp_path, examples=examples_of(path)))
    assert error(path, made, examples_of(path)) < 0.1


def test_files_that_are_too_large_or_broken_are_refused(tmp_path):
    large = tmp_path / "large.onnx"
    with large.open("wb") as file:
        file.truncate(3 * 10**9)
    with pytest.raises(StepFailed, match=r"'large.onnx' has 3.0 GB with its weights; steps can change up to 2 GB"):
        onnx_model.read(large)
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    with pytest.raises(StepFailed, match=r"'broken.onnx' cannot be read"):
        onnx_model.read(broken)
    with pytest.raises(StepFailed, match="no ONNX file"):
        onnx_model.read(tmp_path / "model.pt2")


def test_dynamic_int8_leaves_convolutions_alone(tmp_path):
    path, notes = convolutions(tmp_path), []
    made = int8_dynamic.apply(task_for(path, tmp_path, notes))
    counts = onnx_model.counts(onnx.load(made))
    assert (counts["Conv"], counts["MatMulInteger"]) == (3, 1)
    assert notes[0] == "in int8: 1 MatMulInteger"
    assert declared(made) == declared(path)
    with pytest.raises(StepFailed, match="nothing of the model"):
        int8_dynamic.apply(task_for(path, tmp_path, keep=["gemm_MatMul"]))
    with pytest.raises(StepFailed, match="no layers or operators"):
        int8_dynamic.apply(task_for(path, tmp_path, keep=["nobody"]))


def test_dynamic_int8_can_keep_products_that_contract(tmp_path):
    path = two_layers(tmp_path)
    made = onnx.load(int8_dynamic.apply(task_for(path, tmp_path, keep_contracting=True)))
    counts = onnx_model.counts(made)
    assert (counts["MatMulInteger"], counts["MatMul"]) == (1, 1)  # 32 to 64 is in int8, 64 to 8 is not


def test_subgraphs_go_through(tmp_path):
    inner = [
        helper.make_graph([NODE(kind, ["p"], ["q"])], kind, [], [value("q", FLOAT, "n", 8)]) for kind in ("Relu", "Neg")
    ]
    nodes = [
        NODE("MatMul", ["x", "w"], ["p"]),
        NODE("If", ["yes"], ["y"], then_branch=inner[0], else_branch=inner[1]),
    ]
    random = np.random.default_rng(1)
    weights = {"w": random.standard_normal((8, 8)).astype(np.float32)}
    inputs = [value("x", FLOAT, "n", 8), value("yes", TensorProto.BOOL)]
    path = save(tmp_path, nodes, inputs, [value("y", FLOAT, "n", 8)], weights)
    x = [random.standard_normal((1, 8)).astype(np.float32) for _ in range(8)]
    examples = Examples(
        tuple({"x": one, "yes": np.array(place % 2 == 0)} for place, one in enumerate(x)), ({},) * 8, "tests"
    )
    for number, step in enumerate((int8_static, int8_dynamic)):
        folder = tmp_path / str(number)
        folder.mkdir()
        task = StepTask(path, folder, Signature((), ()), examples)
        assert error(path, step.apply(task), examples) < 0.1


def test_simplify_folds_and_removes(tmp_path):
    random = np.random.default_rng(2)
    nodes = [
        NODE("Conv", ["x", "w"], ["c"]),
        NODE("BatchNormalization", ["c", "scale", "bias", "mean", "var"], ["n"]),
        NODE("Add", ["none", "none"], ["nothing"]),
        NODE("Add", ["n", "nothing"], ["m"]),
        NODE("Identity", ["m"], ["i"]),
        NODE("Relu", ["i"], ["y"]),
        NODE("Exp", ["c"], ["nobody_asks"]),
    ]
    weights = {"w": random.standard_normal((4, 3, 3, 3)).astype(np.float32), "none": np.zeros(1, np.float32)}
    weights |= {name: random.random(4).astype(np.float32) + 0.5 for name in ("scale", "bias", "mean", "var")}
    inputs, outputs = [value("x", FLOAT, "n", 3, 6, 6)], [value("y", FLOAT, "n", 4, 4, 4)]
    path, notes = save(tmp_path, nodes, inputs, outputs, weights), []
    made = simplify.apply(task_for(path, tmp_path, notes))
    assert onnx_model.counts(onnx.load(made)) == {"Conv": 1, "Relu": 1}
    assert declared(made) == declared(path)
    assert error(path, made, examples_of(path)) < 1e-5
    assert notes[0].startswith("7 operators became 2: ")
    with pytest.raises(StepFailed, match="nothing to simplify"):
        simplify.apply(task_for(made, tmp_path, examples=examples_of(path)))


def test_half_keeps_float32_at_the_edges(tmp_path):
    path = convolutions(tmp_path)
    made = half.apply(task_for(path, tmp_path))
    assert declared(made) == declared(path)
    types = {one.data_type for one in onnx.load(made).graph.initializer}
    assert TensorProto.FLOAT16 in types
    assert error(path, made, examples_of(path)) < 0.01


def test_half_refuses_what_float16_cannot_hold_and_says_where_bfloat16_does_not_run(tmp_path):
    path = save(
        tmp_path,
        [NODE("MatMul", ["x", "w"], ["y"])],
        [value("x", FLOAT, "n", 2)],
        [value("y", FLOAT, "n", 2)],
        {"w": np.array([[1e6, 0], [0, 1]], np.float32)},
    )
    with pytest.raises(StepFailed, match=r"beyond what float16 can hold: \['w'\]"):
        half.apply(task_for(path, tmp_path))
    if not onnx_model.has_gpu():
        with pytest.raises(StepFailed, match="ONNX Runtime cannot load the model"):
            half.apply(task_for(path, tmp_path, to="bfloat16"))


def test_bfloat16_is_inside_and_float32_around_it(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_model, "has_gpu", lambda: True)  # no processor need have the operators
    path = convolutions(tmp_path)
    made = half.apply(task_for(path, tmp_path, to="bfloat16", keep=["depthwise"]))
    model = onnx.load(made)
    onnx.checker.check_model(model, full_check=True)
    assert declared(made) == declared(path)
    types = {one.name: one.data_type for one in model.graph.initializer}
    assert {name for name, kind in types.items() if kind == TensorProto.BFLOAT16} == {
        f"{name}_bfloat16" for name in ("w0", "b0", "w2", "b2", "w3", "b3")
    }
    assert "w0" not in types


def test_gelu_is_fused_and_a_net_without_any_is_refused(tmp_path):
    nodes = [
        NODE("MatMul", ["x", "w"], ["p"]),
        NODE("Add", ["p", "b"], ["s"]),
        NODE("Div", ["s", "root"], ["d"]),
        NODE("Erf", ["d"], ["e"]),
        NODE("Add", ["e", "one"], ["g"]),
        NODE("Mul", ["s", "g"], ["m"]),
        NODE("Mul", ["m", "half"], ["y"]),
    ]
    random = np.random.default_rng(3)
    weights = {
        "w": random.standard_normal((16, 16)).astype(np.float32),
        "b": random.standard_normal(16).astype(np.float32),
        "root": np.float32(2**0.5),
        "one": np.float32(1),
        "half": np.float32(0.5),
    }
    path, notes = save(tmp_path, nodes, [value("x", FLOAT, "n", 16)], [value("y", FLOAT, "n", 16)], weights), []
    made = fuse_transformer.apply(task_for(path, tmp_path, notes))
    assert "BiasGelu" in onnx_model.counts(onnx.load(made))
    assert error(path, made, examples_of(path)) < 1e-4
    assert "1 BiasGelu" in notes[-1]
    int8_dynamic.apply(task_for(made, tmp_path / "made", examples=examples_of(path)))
    with pytest.raises(StepFailed, match="nothing in the graph"):
        fuse_transformer.apply(task_for(convolutions(tmp_path), tmp_path))
    with pytest.raises(StepFailed, match="model_type is 'poem'"):
        fuse_transformer.apply(task_for(path, tmp_path, model_type="poem"))


@pytest.mark.parametrize("family", ["auto", "bert", "vit"])
def test_fused_attention_heeds_masks_that_no_example_has(tmp_path, family):
    path, random = attention(tmp_path), np.random.default_rng(4)
    unhidden = [{"x": random.standard_normal((1, 6, 16)).astype(np.float32), "mask": np.ones((1, 6), int)}] * 2
    task = task_for(path, tmp_path, examples=Examples(tuple(unhidden), ({}, {}), "tests"), model_type=family)
    made = fuse_transformer.apply(task)
    assert "Attention" in onnx_model.counts(onnx.load(made))
    hidden = [
        {"x": random.standard_normal((1, 6, 16)).astype(np.float32), "mask": np.array([mask])}
        for mask in ([0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 0, 1, 1, 0, 1])
    ]
    assert error(path, made, Examples(tuple(hidden), ({},) * 3, "tests")) < 1e-4
    quantised = int8_dynamic.apply(task_for(made, tmp_path / "made"))
    assert "QAttention" in onnx_model.counts(onnx.load(quantised))


def test_what_is_fused_must_answer_alike_also_where_whole_numbers_are_others(tmp_path, monkeypatch):
    path = attention(tmp_path)
    plain = fuse_transformer._fused

    def masks_lost(task, original, family, chosen):
        model = plain(task, original, family, chosen)
        for node in model.graph.node if model else ():
            if node.op_type == "Attention":
                node.input[3] = ""
        return model

    monkeypatch.setattr(fuse_transformer, "_fused", masks_lost)
    example = {
        "x": np.random.default_rng(4).standard_normal((1, 6, 16)).astype(np.float32),
        "mask": np.ones((1, 6), int),
    }
    with pytest.raises(StepFailed, match="answers otherwise than before"):
        fuse_transformer.apply(
            task_for(path, tmp_path, examples=Examples((example,), ({},), "tests"), model_type="bert")
        )


def test_renaming_moves_aside_who_has_the_name():
    graph = helper.make_graph(
        [NODE("Relu", ["a"], ["b"]), NODE("Neg", ["b"], ["c"])], "g", [value("a", FLOAT, 1)], [value("c", FLOAT, 1)]
    )
    model = helper.make_model(graph)
    onnx_model.rename(model, {"a": "b"})
    assert [(list(node.input), list(node.output)) for node in model.graph.node] == [
        (["b"], ["b_inner"]),
        (["b_inner"], ["c"]),
    ]
    assert model.graph.input[0].name == "b"


@pytest.mark.parametrize("step", [int8_static, int8_dynamic])
def test_trees_and_the_like_have_nothing_to_quantise(tmp_path, step):
    scaler = NODE("Scaler", ["x"], ["y"], domain="ai.onnx.ml", offset=[1.0] * 4, scale=[2.0] * 4)
    graph = helper.make_graph([scaler], "net", [value("x", FLOAT, "n", 4)], [value("y", FLOAT, "n", 4)])
    path = tmp_path / "source.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("ai.onnx.ml", 3)], ir_version=8), path)
    with pytest.raises(StepFailed, match="none of ONNX's own operators"):
        step.apply(task_for(path, tmp_path))

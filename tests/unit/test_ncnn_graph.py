"""The text of ncnn's models: what is read of it, what is written, and what is refused."""

import pytest

from headrace_backends.ncnn_graph import NcnnGraph, NotNcnn

TEXT = """7767517
4 5
Input                    in0                      0 1 in0
Split                    splitncnn_0              1 2 in0 1 2
ReLU                     relu                     1 1 1 out0
Pooling                  pool                     1 1 2 out1 0=1 4=1
"""


def test_inputs_and_outputs():
    graph = NcnnGraph.parse(TEXT)
    assert graph.inputs == {"in0": None}
    assert graph.outputs == ["out0", "out1"]


def test_what_is_written_reads_the_same():
    graph = NcnnGraph.parse(TEXT)
    assert NcnnGraph.parse(str(graph)) == graph
    assert str(graph).splitlines()[:2] == ["7767517", "4 5"]


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (7, 2, 3, 5)])
def test_shapes_are_kept_in_the_text(shape):
    graph = NcnnGraph.parse(str(NcnnGraph.parse(TEXT).with_shapes({"in0": shape})))
    assert graph.inputs == {"in0": shape}


def test_the_sizes_of_an_input_are_where_ncnn_looks_for_them():
    assert "Input in0 0 1 in0 2=3 1=224 0=225" in str(NcnnGraph.parse(TEXT).with_shapes({"in0": (3, 224, 225)}))


def test_tensors_are_renamed_wherever_they_are_named():
    graph = NcnnGraph.parse(TEXT).with_names({"in0": "image", "out0": "a", "out1": "b"})
    assert graph.inputs == {"image": None}
    assert graph.outputs == ["a", "b"]
    assert "Split splitncnn_0 1 2 image 1 2" in str(graph)


def test_a_new_name_that_is_taken_is_taken_from_the_other():
    graph = NcnnGraph.parse(TEXT).with_names({"in0": "1", "out0": "2", "out1": "out0"})
    assert graph.inputs == {"1": None}
    assert graph.outputs == ["2", "out0"]
    assert [layer.reads for layer in graph.layers] == [(), ("1",), ("_1",), ("_2",)]


def test_outputs_come_in_the_order_that_is_wanted():
    graph = NcnnGraph.parse(TEXT)
    assert graph.with_outputs(["out0", "out1"]) == graph
    turned = graph.with_outputs(["out1", "out0"])
    assert turned.outputs == ["out1", "out0"]
    assert NcnnGraph.parse(str(turned)) == turned


@pytest.mark.parametrize("name", ["two words", "", "same"])
def test_names_that_the_text_cannot_hold(name):
    with pytest.raises(NotNcnn, match=f"'{name}' cannot be the name of a tensor"):
        NcnnGraph.parse(TEXT).with_names({"in0": name, "out0": "same"})


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "does not begin with 7767517"),
        ("\0\1\2", "does not begin with 7767517"),
        ("7767517\n", "its second line does not say"),
        ("7767517\nmany layers\n", "its second line does not say"),
        (TEXT.replace("4 5", "5 5"), "promises 5 layers and has 4"),
        (TEXT.rsplit("\n", 2)[0], "promises 4 layers and has 3"),
        (TEXT.replace("1 1 1 out0", "1 1 1"), "'ReLU relu 1 1 1' is no layer with 1 inputs and 1 outputs"),
        (TEXT.replace("1 1 1 out0", "one one"), "'ReLU relu one one' is no layer"),
        (TEXT.replace("1 1 1 out0", "-1 1 1 out0"), "is no layer with -1 inputs"),
        (TEXT.replace("0=1 4=1", "0=1 4"), "is no layer"),
    ],
)
def test_what_is_no_graph(text, why):
    with pytest.raises(NotNcnn, match=why):
        NcnnGraph.parse(text)

"""The text of ncnn's models: what is read of it, what is written, and what is refused."""

import pytest

from headrace_backends.ncnn.graph import NcnnGraph, NotNcnn

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


@pytest.mark.parametrize("shape", [(-1, 5), (1, 5), (-1, 3, 5), (-1, 2, 3, 5), (1, 2, 3, 5), (-1, 7, 2, 3, 5)])
def test_shapes_are_kept_in_the_text(shape):
    graph = NcnnGraph.parse(str(NcnnGraph.parse(TEXT).with_shapes({"in0": shape})))
    assert graph.inputs == {"in0": shape}


def test_the_sizes_of_an_input_are_where_ncnn_looks_for_them():
    assert "Input in0 0 1 in0 2=3 1=224 0=225" in str(NcnnGraph.parse(TEXT).with_shapes({"in0": (-1, 3, 224, 225)}))


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
        (TEXT.replace("0=1 4=1", "0=1 4"), r"layer 'pool' \(Pooling\) has '4' where an option is expected"),
        (TEXT.replace("0=1 4=1", "0=1 0=1"), "has '0=1' where an option is expected, each once"),
        (TEXT.replace("0=1 4=1", "0=1 -23300=1,1"), "has '-23300=1,1' where an option is expected, each once"),
        (TEXT.replace("0=1 4=1", "0=1 -23304=2147483647"), "has '-23304=2147483647' where an option"),
        (TEXT.replace("0=1 4=1", "0=inf"), "has '0=inf' where an option is expected"),
        (TEXT.replace("1 1 1 out0", "1 1 3 out0"), "layer 'relu' .* reads '3', which is written by none before"),
        (TEXT.replace("1 1 2 out1", "1 1 1 out1"), "layer 'pool' .* reads '1', which is read by two layers, without a"),
        (TEXT.replace("1 1 2 out1", "1 1 2 out0"), "layer 'pool' .* writes 'out0', which another one writes too"),
        (TEXT.replace("1 1 1 out0", "1 1 out0 out0"), "layer 'relu' .* reads 'out0', which is written by none before"),
    ],
)
def test_what_is_no_graph(text, why):
    with pytest.raises(NotNcnn, match=why):
        NcnnGraph.parse(text)


def test_more_layers_than_ncnn_can_go_through():
    """It calls itself for each, so a long enough row of them is the end of its stack."""
    lines = [f"ReLU r{place} 1 1 {place} {place + 1}" for place in range(10_000)]
    with pytest.raises(NotNcnn, match="it has 10001 layers, and at most 10000 are taken"):
        NcnnGraph.parse("\n".join(("7767517", "10001 10001", "Input x 0 1 0", *lines)))


def test_options():
    (layer,) = NcnnGraph.parse('7767517\n1 1\nInput x 0 1 x 0=5 1=1.5 -23303=2,7,-1 6="0w,-1" 4=2\n').layers
    assert (layer.number(0), layer.number(2), layer.number(2, 9)) == (5, 0, 9)
    assert (layer.numbers(3), layer.numbers(5), layer.listed(3)) == ([7, -1], [], ["7", "-1"])
    assert (layer.real(1, 0.5), layer.real(8, 0.5)) == (1.5, 0.5)
    assert (layer.text(6), layer.text(7)) == ("0w,-1", "")
    assert (layer.flag(7), layer.flag(7, 1)) == (False, True)
    for read in (
        lambda: layer.number(1),
        lambda: layer.number(3),
        lambda: layer.numbers(0),
        lambda: layer.text(0),
        lambda: layer.real(6, 0.0),
        lambda: layer.flag(4),
    ):
        with pytest.raises(NotNcnn, match="layer 'x'"):
            read()

"""What sizes layers of ncnn can be given: each kind's rule, by the numbers that ncnn's files have for it."""

import pytest

from headrace_backends.ncnn.graph import NcnnGraph
from headrace_backends.ncnn.sizes import is_checked, refusal, unserved


def layer(kind, options, inputs=1, outputs=1):
    reads, writes = (
        [f"{letter}{place}" for place in range(count)] for letter, count in (("x", inputs), ("y", outputs))
    )
    lines = [f"Input {name} 0 1 {name}" for name in reads]
    lines.append(" ".join((kind, "it", str(inputs), str(outputs), *reads, *writes, options)))
    return NcnnGraph.parse("\n".join(("7767517", f"{len(lines)} 9", *lines, ""))).layers[-1]


@pytest.mark.parametrize(
    ("kind", "options", "fitting", "unfit"),
    [
        ("Convolution", "0=8 1=3 6=288", (4, 7, 9), (3, 7, 9)),
        ("Convolution", "0=8 1=3 11=1 6=96", (4, 7, 9), (5, 7, 9)),
        ("Convolution", "0=8 1=3 6=72", (1, 7, 9), (7, 9)),
        ("Convolution", "0=8 1=1 6=32", (4,), (5,)),  # one pixel
        ("Convolution", "0=8 1=3 6=288 2=2", (4, 5, 5), (4, 5, 4)),
        ("Convolution", "0=8 1=3 6=288 2=2 4=1", (4, 3, 3), (4, 3, 2)),
        ("Convolution", "0=8 1=3 6=288 4=-233", (4, 1, 1), (4, 1, 2**27)),
        ("ConvolutionDepthWise", "0=4 1=1 6=4 7=4", (4, 1, 1), (4,)),
        ("Convolution", "0=8 1=3 11=1 6=96", (4, 7, 9), (4,)),
        ("ConvolutionDepthWise", "0=4 1=3 6=36 7=4", (4, 7, 9), (8, 7, 9)),
        ("ConvolutionDepthWise", "0=8 1=3 6=144 7=2", (4, 7, 9), (2, 7, 9)),
        ("Deconvolution", "0=8 1=2 6=96", (3, 7, 9), (4, 7, 9)),
        ("Convolution1D", "0=8 1=5 6=120", (3, 20), (4, 20)),
        ("Deconvolution", "0=8 1=4 3=2 4=1 6=384", (3, 1, 1), (3, 5000, 5000)),
        ("Deconvolution", "0=8 1=2 4=1 6=96", (3, 2, 2), (3, 1, 1)),
        ("Convolution3D", "0=2 1=3 11=3 21=2 6=108", (3, 4, 7, 9), (2, 4, 7, 9)),
        ("InnerProduct", "0=3 2=90", (30,), (31,)),
        ("InnerProduct", "0=3 2=90", (2, 3, 5), (2, 3, 4)),
        ("InnerProduct", "0=3 2=90", (7, 30), (7, 29)),
        ("LSTM", "0=5 1=240 2=2", (9, 6), (9, 7)),
        ("LSTM", "0=5 1=480 2=0 3=10", (9, 12), (9, 24)),
        ("GRU", "0=5 1=90", (9, 6), (9, 5)),
        ("RNN", "0=5 1=30", (9, 6), (9, 5)),
        ("BatchNorm", "0=16", (16, 3, 3), (3, 16, 16)),
        ("Scale", "0=16 1=1", (16,), (17,)),
        ("PReLU", "0=16", (16, 3, 3), (15, 3, 3)),
        ("InstanceNorm", "0=16", (16, 3, 3), (17, 3, 3)),
        ("InstanceNorm", "0=16", (16, 3, 3), (16, 9)),
        ("GroupNorm", "0=4 1=16", (16, 3, 3), (12, 3, 3)),
        ("LayerNorm", "0=6", (9, 6), (6, 9)),
        ("LayerNorm", "0=54", (2, 9, 6), (2, 9, 7)),
        ("RMSNorm", "0=6", (9, 6), (9, 5)),
        ("MultiHeadAttention", "0=8 1=2 2=64", (5, 8), (5, 9)),
        ("Gemm", "3=1 5=1 6=1 8=4 9=6 10=4", (3, 6), (3, 7)),
        ("Gemm", "2=1 5=1 6=1 8=4 9=6 10=4", (6, 3), (3, 6)),
        ("Gemm", "4=1 6=1 7=4 8=3 9=6 10=4", (6, 3), (3, 6)),
        ("Gemm", "5=1 6=1 7=3 8=4 9=6 10=1", (3, 6), (2, 6)),  # what is added is one number for each row
        ("Pooling", "0=0 1=3 2=2 5=1", (4, 3, 3), (4, 3, 2)),
        ("Pooling", "0=1 1=3 2=2 3=1 5=0", (4, 1, 1), (4, 1)),
        ("Pooling", "0=1 4=1", (4, 9, 9), (9, 9)),
        ("Pooling", "0=1 7=1 8=3 18=-233", (4, 9, 9), (9,)),
        ("Pooling1D", "0=0 1=2 5=1", (3, 2), (3, 1)),
        ("Pooling3D", "0=0 1=2 5=1", (3, 2, 2, 2), (3, 1, 2, 2)),
        ("Padding", "0=1 1=1 2=2 3=2 4=0", (4, 1, 1), (4, 2**14, 2**14)),
        ("Padding", "0=1 1=1 2=2 3=2 4=2", (4, 2, 3), (4, 2, 2)),  # it reflects
        ("Padding", "7=1", (4, 2, 2), (2, 2)),
        ("Interp", "0=2 1=2.0 2=2.0", (4, 3, 3), (4, 9000, 9000)),
        ("Interp", "0=1 1=0.5 2=0.5", (4, 2, 2), (4, 1, 2)),
        ("Interp", "0=1 3=7 4=5", (4,), (1, 4, 2, 2)),
        ("Crop", "0=1 1=1 2=1 3=5 4=5 5=2", (3, 6, 6), (3, 5, 6)),
        ("Crop", "0=1 3=-233", (6,), (1,)),
        ("Crop", "-23309=2,1,2 -23310=2,5,-1 -23311=2,1,2", (4, 5, 4), (4, 1, 4)),
        ("Crop", "-23309=1,-2 -23310=1,2147483647 -23311=1,-1", (4, 2), (4, 1)),
        ("Crop", "-23309=1,0 -23310=1,64 -23311=1,2", (1, 1, 8), (1, 8)),
        ("PixelShuffle", "0=2", (8, 3, 3), (6, 3, 3)),
        ("Reorg", "0=2", (3, 4, 6), (3, 4, 5)),
        ("ShuffleChannel", "0=2", (4, 3, 3), (3, 3, 3)),
        ("LRN", "0=0 1=5", (4, 3, 3), (4, 3)),
        ("Normalize", "0=0 1=0 3=4", (4, 3, 3), (5, 3, 3)),
        ("Reshape", "0=6 1=-1", (4, 3), (4, 4)),
        ("Reshape", "0=0 1=0 2=4", (4, 3, 2), (8, 3, 2)),
        ("Reshape", '6="0w,-1"', (4, 3), (2, 3, 4, 0)),
        ("Reshape", '12=0 13=0 6="1,1,//(256,0n),0n"', (256,), (255,)),
        ("Reshape", '6="*(0w,2),-1"', (4, 3), (3, 3)),
        ("Permute", "0=5", (4, 3, 2), (4, 3)),
        ("Squeeze", "-23303=1,1", (4, 1), (4,)),
        ("ExpandDims", "-23303=2,0,1", (4, 1), (4, 1, 1)),
        ("Tile", "-23302=2,2,3", (4, 1), (4,)),
        ("Tile", "0=1 1=1000", (4, 3), (4,)),
        ("Flip", "-23300=1,2", (4, 3, 2), (4, 3)),
        ("Reduction", "0=3 1=0 -23303=1,2", (4, 3, 2), (4, 3)),
        ("Softmax", "0=-2 1=1", (4, 3), (4,)),
        ("GLU", "0=1", (3, 4), (4, 3)),
    ],
)
def test_one_input(kind, options, fitting, unfit):
    assert refusal(layer(kind, options), [fitting]) is None
    problem = refusal(layer(kind, options), [unfit])
    assert problem is not None
    assert problem.startswith(f"layer 'it' ({kind}) is given {list(unfit)}, and ")


@pytest.mark.parametrize(
    ("kind", "options", "fitting", "unfit"),
    [
        ("BinaryOp", "0=0", ((4,), (4,)), ((4,), (5,))),
        ("BinaryOp", "0=0", ((4, 1), (1, 5)), ((4, 2), (1, 5))),
        ("BinaryOp", "0=0", ((3,), (3, 4, 5)), ((2,), (3, 4, 5))),
        ("BinaryOp", "0=0", ((3, 4, 5), (5,)), ((3, 4, 5), (4,))),
        ("BinaryOp", "0=0", ((3, 4), (3, 4, 5)), ((4, 5), (3, 4, 5))),
        ("BinaryOp", "0=0", ((3, 1, 5), (3, 4, 5, 6)), ((8, 7, 9), (1, 8, 1, 1))),
        ("Eltwise", "0=1", ((4, 2), (4, 2)), ((4, 2), (4, 1))),
        ("Concat", "0=0", ((4, 2), (3, 2)), ((4, 2), (4, 3))),
        ("Concat", "0=-1", ((4, 2), (4, 3)), ((4, 2), (3, 2))),
        ("Concat", "0=0", ((4,), (5,)), ((4,), (5, 1))),
        ("MatMul", "", ((3, 4), (4, 5)), ((3, 4), (5, 4))),
        ("MatMul", "0=1", ((2, 3, 4), (2, 5, 4)), ((2, 3, 4), (2, 4, 5))),
        ("MatMul", "", ((2, 3, 4), (2, 4, 5)), ((2, 3, 4), (3, 4, 5))),
        ("MatMul", "", ((3, 4), (4,)), ((3, 4), (3,))),
        ("MatMul", "", ((2, 3, 4), (7, 2, 4, 5)), ((7, 3, 4), (7, 2, 4, 5))),
        ("Scale", "0=-233", ((4, 3, 3), (4,)), ((4, 3, 3), (3,))),
        ("LSTM", "0=5 1=120 2=0", ((9, 6), (1, 5), (1, 5)), ((9, 6), (1, 4), (1, 5))),
        ("LSTM", "0=5 1=120 2=0", ((9, 6), (1, 1, 5), (1, 1, 5)), ((9, 6), (1, 2, 5), (1, 1, 5))),
        ("Reshape", '6="0w,1h,1c"', ((4, 3), (2, 2, 9)), ((4, 3), (2, 3, 9))),
        ("Interp", "0=2 5=1", ((4, 3, 3), (1, 6, 6)), ((4, 3, 3), (1, 20000, 20000))),
        ("DeformableConv2D", "0=6 1=3 4=1 6=216", ((4, 8, 9), (18, 8, 9)), ((4, 8, 9), (18, 7, 9))),
        ("BinaryOp", "0=0", ((30000, 1), (1, 3)), ((30000, 1), (1, 30000))),  # each with each are too many
        ("Gemm", "3=1", ((3, 4), (5, 4)), ((3, 4), (4, 5))),
        ("Gemm", "", ((3, 4), (4, 5)), ((3, 4), (5, 4))),
        ("MultiHeadAttention", "0=8 1=2 2=64 3=6", ((5, 8), (7, 6), (7, 8)), ((5, 8), (7, 8), (7, 8))),
        ("MultiHeadAttention", "0=8 1=2 2=64 5=1", ((5, 8), (5, 5)), ((5, 7), (5, 5))),
    ],
)
def test_several_inputs(kind, options, fitting, unfit):
    some = layer(kind, options, len(fitting))
    assert refusal(some, fitting) is None
    assert " and ".join(str(list(shape)) for shape in unfit) in (refusal(some, unfit) or "")


@pytest.mark.parametrize(("options", "fitting", "unfit"), [
    ("-23300=2,4,6 1=0", (10, 3), (9, 3)),
    ("-23300=2,4,-233 1=-1", (3, 5), (5, 3)),
    ("-23302=1,-2 1=1", (3, 3), (3, 2)),
    ("-23300=2,1,1 1=1", (3, 2), (2,)),
])  # fmt: skip
def test_what_is_taken_apart(options, fitting, unfit):
    some = layer("Slice", options, outputs=2)
    assert refusal(some, [fitting]) is None
    assert "(Slice) is given" in (refusal(some, [unfit]) or "")
    assert "its options do not go together" in (refusal(layer("Slice", options, outputs=4), [fitting]) or "")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PReLU", "0=1"),  # one slope for all
        ("InstanceNorm", "0=16 2=0"),  # without weights
        ("BinaryOp", "0=0 1=1 2=3.5"),  # with a number
        ("Softmax", "0=0"),
    ],
)
def test_whatever_comes(kind, options):
    assert refusal(layer(kind, options), [(3, 4, 5)]) is None


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Convolution", "0=8 1=3 6=0 19=1"),  # the weights are a tensor
        ("Convolution", "0=8 1=3 6=287"),
        ("Convolution", "0=8 1=3 6=288 3=0"),
        ("Convolution", "0=8 1=3 6=288 4=-5"),
        ("Convolution", "0=8 1=3 6=288 4=-233 14=0"),
        ("ConvolutionDepthWise", "0=8 1=3 6=288 7=3"),
        ("Deconvolution", "0=8 1=3 6=288 18=-1"),
        ("Pooling", "0=0 1=0"),
        ("Pooling", "0=0 1=3 3=-1"),
        ("Pooling", "0=1 7=1 8=-5"),
        ("Padding", "0=-2147483648"),
        ("Padding", "0=-233 1=-233 2=-233 3=-233"),
        ("Interp", "0=2 1=-1.0 2=2.0"),
        ("Interp", "0=1 3=-12 4=15"),
        ("Interp", "0=1 3=100000 4=100000"),
        ("Crop", "0=1 1=-2147483648 3=2 4=2 5=2"),
        ("Crop", "-23309=1,1 -23310=2,5,5"),
        ("Crop", "-23309=1,0 -23310=1,5 -23311=1,7"),
        ("Reshape", "0=-1 1=-1"),
        ("Reshape", "0=-5 1=-5"),
        ("Reshape", '6="+(0w,2),-1"'),
        ("Reshape", '6="//(0w,0),-1"'),
        ("Reshape", '6="9w,-1"'),
        ("Reshape", '6="0w,-1,"'),
        ("Reshape", '12=0 13=0 6="//(4,*(1,1))"'),
        ("Reshape", '12=0 13=0 6="0w,-1,2"'),
        ("Reshape", "12=0 13=0 0=64"),
        ("Tile", "0=0 1=1000000000"),
        ("Reduction", "0=77"),
        ("MultiHeadAttention", "0=8 1=2 2=64 7=1"),  # with a cache
        ("LSTM", "0=5 1=80 2=0 8=1"),  # quantised
        ("BinaryOp", "0=0 1=1.5"),
        ("Concat", "0=3"),
    ],
)
def test_whatever_comes_is_refused(kind, options):
    assert refusal(layer(kind, options), [(4, 4, 4)]) is not None


def test_a_layer_that_takes_no_numbers_with_a_fraction():
    assert "it takes whole numbers" in (refusal(layer("Embed", "0=4 1=10 3=40"), [(3,)]) or "")


def test_kinds_that_are_looked_at():
    assert is_checked(layer("Convolution", "0=8 1=3 6=288"))
    assert not is_checked(layer("ReLU", ""))


@pytest.mark.parametrize(
    ("one", "why"),
    [
        (layer("ReLU", ""), None),
        (layer("Split", "", outputs=3), None),
        (layer("MemoryData", "0=4 1=4", inputs=0), None),
        (layer("Proposal", "0=2"), "layer 'it' is a Proposal, a kind that is not served"),
        (layer("Quantize", "0=1"), "layer 'it' is a Quantize, a kind that is not served"),
        (layer("ReLU", "", outputs=2), r"layer 'it' (ReLU) has 1 inputs and 2 outputs"),
        (layer("Concat", "", inputs=0), r"layer 'it' (Concat) has 0 inputs and 1 outputs"),
        (layer("MemoryData", "0=-4", inputs=0), "layer 'it' (MemoryData) is given nothing, and its options do not"),
        (layer("MemoryData", "0=4 21=3", inputs=0), "it holds other numbers than FP32"),
        (layer("MemoryData", "0=70000 1=70000", inputs=0), "a tensor has at most 268435456"),
    ],
)
def test_what_is_not_served_whatever_it_is_given(one, why):
    problem = unserved(one)
    assert problem is None if why is None else why in (problem or "")

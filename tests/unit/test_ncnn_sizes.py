"""What sizes layers of ncnn can be given: each kind's rule, by the numbers that ncnn's files have for it."""

import pytest

from headrace_backends.ncnn_graph import NcnnGraph
from headrace_backends.ncnn_sizes import is_checked, refusal


def layer(kind, options, inputs=1):
    names = " ".join(f"x{place}" for place in range(inputs))
    return NcnnGraph.parse(f"7767517\n1 1\n{kind} it {inputs} 1 {names} y {options}\n").layers[0]


@pytest.mark.parametrize(
    ("kind", "options", "fitting", "unfit"),
    [
        ("Convolution", "0=8 1=3 6=288", (4, 7, 9), (3, 7, 9)),
        ("Convolution", "0=8 1=3 11=1 6=96", (4, 7, 9), (5, 7, 9)),
        ("Convolution", "0=8 1=3 6=72", (7, 9), (4, 7, 9)),  # a picture without channels is one
        ("Convolution", "0=8 1=3 6=288", (4, 7, 9), (7, 9)),
        ("Convolution", "0=8 1=1 6=32", (4,), (5,)),
        ("Convolution", "0=8 1=3 11=1 6=24", (9,), (4, 7, 9)),
        ("Convolution", "0=8 1=3 11=1 6=96", (4, 7, 9), (4,)),
        ("ConvolutionDepthWise", "0=4 1=3 6=36 7=4", (4, 7, 9), (8, 7, 9)),
        ("ConvolutionDepthWise", "0=8 1=3 6=144 7=2", (4, 7, 9), (2, 7, 9)),
        ("Deconvolution", "0=8 1=2 6=96", (3, 7, 9), (4, 7, 9)),
        ("Convolution1D", "0=8 1=5 6=120", (3, 20), (4, 20)),
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
        ("Gemm", "4=1 6=1 7=4 9=6 10=4", (6, 3), (3, 6)),
        ("Slice", "-23300=2,4,6 1=0", (10, 3), (9, 3)),
        ("Slice", "-23300=3,4,4,-233 1=-1", (3, 10), (10, 3)),
        ("Slice", "-23300=2,1,1 1=1", (3, 2), (2,)),
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


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Convolution", "0=8 1=3 6=0 19=1"),  # the weights are a tensor
        ("Scale", "0=-233"),
        ("PReLU", "0=1"),  # one slope for all
        ("InstanceNorm", "0=16 2=0"),  # without weights
        ("LayerNorm", "0=6 2=0"),
        ("BinaryOp", "0=0 1=1 2=3.5"),  # with a number
        ("MultiHeadAttention", "0=8 1=2 2=64 7=1"),  # with a cache
        ("Softmax", "0=0"),
    ],
)
def test_whatever_comes(kind, options):
    assert refusal(layer(kind, options), [(3, 4, 5)]) is None


def test_a_layer_that_takes_no_numbers_with_a_fraction():
    assert "it takes whole numbers" in (refusal(layer("Embed", "0=4 1=10 3=40"), [(3,)]) or "")


def test_kinds_that_are_looked_at():
    assert is_checked(layer("Convolution", "0=8 1=3 6=288"))
    assert not is_checked(layer("ReLU", ""))

"""What ncnn reads of a file of weights for each kind of layer: as much as is said here, and no number less."""

import numpy as np
import pytest

pytest.importorskip("ncnn", reason="ncnn is not installed: pip install 'headrace[ncnn]'")

import ncnn

from headrace_backends.base import LoadError, ModelSource
from headrace_backends.ncnn.backend import NcnnBackend

TABLE, EIGHT_BITS = 5, 0x000D4B38
PICTURE, LINES, NUMBERS, VOLUME = "0=9 1=8 2=4", "0=8 1=6", "0=12", "0=5 1=6 2=4 11=3"
# By the layer and what it is given: how many numbers, those behind a word of how they are kept with a minus.
KINDS = [
    (PICTURE, "Convolution", "0=8 1=3 4=1 5=1 6=288", [-288, 8]),
    (PICTURE, "Convolution", "0=8 1=3 6=288", [-288]),
    (PICTURE, "ConvolutionDepthWise", "0=4 1=3 5=1 6=36 7=4", [-36, 4]),
    (PICTURE, "Deconvolution", "0=6 1=3 3=2 4=1 5=1 6=216", [-216, 6]),
    (PICTURE, "DeconvolutionDepthWise", "0=4 1=2 3=2 5=1 6=16 7=4", [-16, 4]),
    (LINES, "Convolution1D", "0=5 1=3 4=1 5=1 6=90", [-90, 5]),
    (LINES, "ConvolutionDepthWise1D", "0=6 1=3 4=1 5=1 6=18 7=6", [-18, 6]),
    (LINES, "Deconvolution1D", "0=5 1=4 3=2 4=1 5=1 6=120", [-120, 5]),
    (VOLUME, "Convolution3D", "0=5 1=3 4=1 5=1 6=540", [-540, 5]),
    (VOLUME, "Deconvolution3D", "0=2 1=2 3=2 5=1 6=64", [-64, 2]),
    (NUMBERS, "InnerProduct", "0=5 1=1 2=60", [-60, 5]),
    (PICTURE, "BatchNorm", "0=4", [4, 4, 4, 4]),
    (PICTURE, "Bias", "0=4", [4]),
    (PICTURE, "Scale", "0=4 1=1", [4, 4]),
    (PICTURE, "PReLU", "0=4", [4]),
    (PICTURE, "InstanceNorm", "0=4", [4, 4]),
    (PICTURE, "GroupNorm", "0=2 1=4", [4, 4]),
    (PICTURE, "Normalize", "0=0 1=0 2=0.001 3=4 4=1 9=1", [4]),
    (LINES, "LayerNorm", "0=8", [8, 8]),
    (LINES, "RMSNorm", "0=8", [8]),
    (LINES, "LSTM", "0=5 1=320 2=2", [-320, -40, -200]),
    (LINES, "LSTM", "0=3 1=160 2=0 3=5", [-160, -20, -60, -15]),
    (LINES, "GRU", "0=5 1=120", [-120, -20, -75]),
    (LINES, "RNN", "0=5 1=40", [-40, -5, -25]),
    (LINES, "MultiHeadAttention", "0=8 1=2 2=64", [-64, 8, -64, 8, -64, 8, -64, 8]),
    (LINES, "Gemm", "3=1 5=1 6=1 8=5 9=8 10=4", [-40, -5]),
    (LINES, "Gemm", "4=1 6=1 7=3 8=8 9=6 10=3", [-18, -24]),
]


def net_of(folder, shape, kind, options, weights):
    path = folder / "model.param"
    path.write_text(f"7767517\n2 2\nInput x 0 1 x {shape}\n{kind} it 1 1 x y {options}\n")
    path.with_suffix(".bin").write_bytes(weights)
    return path


def load(path):
    return NcnnBackend.load(ModelSource("m", "1", path))


def written(parts, tag=0):
    return b"".join((tag.to_bytes(4, "little") if part < 0 else b"") + bytes(abs(part) * 4) for part in parts)


@pytest.mark.parametrize(("shape", "kind", "options", "parts"), KINDS)
def test_as_much_as_ncnn_reads(tmp_path, shape, kind, options, parts):
    weights = written(parts)
    load(net_of(tmp_path, shape, kind, options, weights))
    path = net_of(tmp_path, shape, kind, options, weights[:-4])
    with pytest.raises(
        LoadError, match=rf"it ends in the weights of layer 'it' \({kind}\), after {len(weights) - 4} b"
    ):
        load(path)
    net = ncnn.Net()
    assert net.load_param(str(path)) == 0
    assert net.load_model(str(path.with_suffix(".bin"))) != 0
    with pytest.raises(LoadError, match=f"it has {len(weights) + 4} bytes, and its layers read {len(weights)} of them"):
        load(net_of(tmp_path, shape, kind, options, weights + bytes(4)))


def test_a_tensor_that_is_kept_with_the_weights(tmp_path):
    path = tmp_path / "model.param"
    text = "7767517\n3 3\nInput x 0 1 x 0=9 1=8 2=4\nMemoryData d 0 1 d 0=9 1=8 2=4 21={}\nBinaryOp b 2 1 x d y 0=0\n"
    kept = np.arange(288, dtype=np.float32).reshape(1, 4, 8, 9)
    for load_type, before in ((1, b""), (0, bytes(4))):
        path.write_text(text.format(load_type))
        path.with_suffix(".bin").write_bytes(before + kept.tobytes())
        np.testing.assert_array_equal(load(path).execute({"x": np.zeros_like(kept)}, [])["y"], kept)


@pytest.mark.parametrize(("scales", "kind", "options"), [
    ([8, 1], "Convolution", "0=8 1=3 5=1 6=288 8=2"),
    ([8, 1, 1], "Convolution", "0=8 1=3 5=1 6=288 8=102"),
    ([4, 1], "ConvolutionDepthWise", "0=4 1=3 5=1 6=36 7=4 8=1"),
    ([1, 1], "ConvolutionDepthWise", "0=4 1=3 5=1 6=36 7=4 8=2"),
    ([5, 1], "InnerProduct", "0=5 1=1 2=1440 8=2"),
])  # fmt: skip
def test_quantised_weights(tmp_path, scales, kind, options):
    layer = dict(option.split("=") for option in options.split())
    count, outputs = int(layer["2" if kind == "InnerProduct" else "6"]), int(layer["0"])
    weights = EIGHT_BITS.to_bytes(4, "little") + bytes([1]) * count + bytes(4 * outputs)
    weights += np.ones(sum(scales), np.float32).tobytes()
    load(net_of(tmp_path, PICTURE, kind, options, weights))
    with pytest.raises(LoadError, match="it ends in the weights of layer 'it'"):  # of which ncnn itself would die
        load(net_of(tmp_path, PICTURE, kind, options, weights[:-4]))


def test_weights_that_are_places_in_a_table(tmp_path):
    weights = TABLE.to_bytes(4, "little") + np.full(256, 0.5, np.float32).tobytes() + bytes(60)
    backend = load(net_of(tmp_path, NUMBERS, "InnerProduct", "0=5 2=60", weights))
    np.testing.assert_allclose(backend.execute({"x": np.ones((1, 12), np.float32)}, [])["y"], np.full((1, 5), 6))


@pytest.mark.parametrize(("kind", "options", "why"), [
    ("Convolution", "0=8 1=3 6=287", r"has 0 weights by its options"),
    ("Convolution", "0=8 1=0 6=288", r"has 0 weights by its options"),
    ("ConvolutionDepthWise", "0=8 1=3 6=288 7=3", r"has 0 weights by its options"),
    ("Convolution", "0=8 1=3 5=2 6=288", r"has 5=2, expected 0 or 1"),
    ("InnerProduct", "0=7 2=60", r"has 0 weights by its options"),
    ("LSTM", "0=5 1=319", r"has 0 weights by its options"),
    ("MultiHeadAttention", "0=8 1=3 2=64", r"has 0 weights by its options"),
    ("BatchNorm", "0=-4", r"has -4 weights by its options"),
    ("Gemm", "5=1 6=1 8=5 9=8 10=7", r"has 0 weights by its options"),
    ("Gemm", "5=3 8=5 9=8", r"has 5=3, expected 0 or 1"),
])  # fmt: skip
def test_options_that_no_weights_fit(tmp_path, kind, options, why):
    with pytest.raises(LoadError, match=rf"layer 'it' \({kind}\) {why}"):
        load(net_of(tmp_path, LINES, kind, options, bytes(5000)))

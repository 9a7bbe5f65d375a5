"""The weights of an ncnn model (``.bin``): whether the file has those that the layers are to read."""

from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path

from headrace_backends.ncnn.graph import Layer
from headrace_backends.ncnn.rule import SEPARATE
from headrace_backends.ncnn.windows import channels

_RAW = 4  # bytes of a number that stands there as it is
# What may stand before numbers: in how many bytes each is kept.
_KEPT = {0x00000000: 4, 0x0002C056: 4, 0x01306B47: 2, 0x01348B83: 2, 0x000D4B38: 1}
_EIGHT_BITS = 0x000D4B38
_TABLE_BYTES = 256 * _RAW  # before the numbers that are places in it
_TAG_BYTES = 4

Part = tuple[int, bool]  # so many numbers, with a word before them that says how they are kept or without


def missing(layers: Sequence[Layer], path: Path) -> str | None:
    """What is wrong with the file of the weights of these layers, all of which are served; None if nothing is.

    ncnn would find a file that is too short by itself, but not numbers of 8 bits where others are expected.

    Raises:
        NotNcnn: an option is no number.
        OSError: the file cannot be read.
    """
    whole, place = path.stat().st_size, 0
    with path.open("rb") as file:
        for layer in layers:
            for count, tagged in _parts(layer):
                if count < 1:
                    return f"layer '{layer.name}' ({layer.kind}) has {count} weights by its options"
                tag = 0
                if tagged:
                    file.seek(place)
                    tag = int.from_bytes(file.read(_TAG_BYTES), "little")
                    place += _TAG_BYTES
                if tag == _EIGHT_BITS and not layer.number(8):
                    return f"those of layer '{layer.name}' ({layer.kind}) are kept in 8 bits, and it is not quantised"
                if tag not in _KEPT:
                    place += _TABLE_BYTES
                place += -(-count * _KEPT.get(tag, 1) // _TAG_BYTES) * _TAG_BYTES
                if place > whole:
                    return f"it ends in the weights of layer '{layer.name}' ({layer.kind}), after {whole} bytes"
    return None if place == whole else f"it has {whole} bytes, and its layers read {place} of them"


def _parts(layer: Layer) -> Iterator[Part]:
    """What the layer reads, in that order."""
    find = _PARTS.get(layer.kind)
    return iter(()) if find is None else find(layer)


def _filters(layer: Layer) -> Iterator[Part]:
    yield layer.number(6) if channels(layer) else 0, True
    if layer.flag(5):
        yield layer.number(0), False
    term = layer.number(8)
    if term:
        # Convolutions in groups have one scale for all weights, or one for each group.
        grouped = layer.kind == "ConvolutionDepthWise"
        yield (layer.number(0) if not grouped else layer.number(7, 1) if term % 100 == 1 else 1), False
        yield 1, False
        if term > 100:
            yield 1, False


def _dense(layer: Layer) -> Iterator[Part]:
    yield layer.number(2) if layer.number(0) and not layer.number(2) % layer.number(0) else 0, True
    if layer.flag(1):
        yield layer.number(0), False
    if layer.number(8):
        yield layer.number(0), False
        yield 1, False


def _recurrent(gates: int, biases: int) -> Callable[[Layer], Iterator[Part]]:
    def parts(layer: Layer) -> Iterator[Part]:
        directions, outputs = 2 if layer.number(2) == 2 else 1, layer.number(0)
        hidden = layer.number(3, outputs) if gates == 4 else outputs
        steps = directions * hidden * gates
        yield layer.number(1) if steps and not layer.number(1) % steps else 0, True
        yield hidden * biases * directions, True
        yield outputs * hidden * gates * directions, True
        if hidden != outputs:
            yield hidden * outputs * directions, True

    return parts


def _attention(layer: Layer) -> Iterator[Part]:
    embedded, weights = layer.number(0), layer.number(2)
    key, value, heads = layer.number(3, embedded), layer.number(4, embedded), layer.number(1)
    if min(embedded, heads) < 1 or embedded % heads or weights % embedded:
        yield 0, True
    for count, biases in (
        (weights, embedded),
        (embedded * key, embedded),
        (embedded * value, embedded),
        (weights, weights // max(1, embedded)),
    ):
        yield count, True
        yield biases, False


def _matrices(layer: Layer) -> Iterator[Part]:
    rows, columns, inner = layer.number(7), layer.number(8), layer.number(9)
    if layer.flag(4):
        yield rows * inner, True
    if layer.flag(5):
        yield columns * inner, True
    if layer.flag(6) and layer.number(10) >= 0:
        yield dict(enumerate((1, rows, rows, rows * columns, columns))).get(layer.number(10), 0), True


def _tensor(layer: Layer) -> Iterator[Part]:
    yield prod(max(1, layer.number(key)) for key in (0, 1, 2, 11)), layer.number(21, 1) == 0


def _times(times: int, key: int, unless: tuple[int, int] | None = None) -> Callable[[Layer], Iterator[Part]]:
    """So many times as many as an option says, unless another is 0, whose default is told with it."""

    def parts(layer: Layer) -> Iterator[Part]:
        if unless is None or layer.flag(*unless):
            yield from ((layer.number(key), False) for _ in range(times))

    return parts


def _scale(layer: Layer) -> Iterator[Part]:
    if layer.number(0) != SEPARATE:
        yield layer.number(0), False
    if layer.flag(1):
        yield layer.number(0), False


_FILTERS = ("Convolution", "ConvolutionDepthWise", "Deconvolution", "DeconvolutionDepthWise")
_PARTS: dict[str, Callable[[Layer], Iterator[Part]]] = {
    **{f"{kind}{dimensions}": _filters for kind in _FILTERS for dimensions in ("1D", "", "3D")},
    "DeformableConv2D": _filters,
    "InnerProduct": _dense,
    "LSTM": _recurrent(4, 4),
    "GRU": _recurrent(3, 4),
    "RNN": _recurrent(1, 1),
    "BatchNorm": _times(4, 0),
    **dict.fromkeys(("Bias", "PReLU"), _times(1, 0)),
    "Scale": _scale,
    "InstanceNorm": _times(2, 0, (2, 1)),
    "GroupNorm": _times(2, 1, (3, 1)),
    "LayerNorm": _times(2, 0, (2, 1)),
    "RMSNorm": _times(1, 0, (2, 1)),
    "Normalize": _times(1, 3),
    "MultiHeadAttention": _attention,
    "Gemm": _matrices,
    "MemoryData": _tensor,
    "Embed": lambda layer: iter([(layer.number(3), True)]),
}

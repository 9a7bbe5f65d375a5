"""What sizes a layer of ncnn can be given: it looks at few itself, and reads beyond its weights and its tensors."""

from collections.abc import Sequence

from headrace_backends.ncnn.graph import Layer, NotNcnn
from headrace_backends.ncnn.orders import (
    along,
    any_shapes,
    copied,
    equal,
    expanded,
    flipped,
    gated,
    joined,
    parted,
    permuted,
    reduced,
    repeated,
    reshaped,
    squeezed,
)
from headrace_backends.ncnn.products import (
    attention,
    dense,
    general_product,
    pairwise,
    product,
    recurrent,
)
from headrace_backends.ncnn.rule import SEPARATE, UNFIT_OPTIONS, Rule, Shape, too_many
from headrace_backends.ncnn.windows import (
    channels_of_pixels,
    convolution,
    cut,
    deconvolution,
    deformable,
    enlargement,
    neighbours,
    padding,
    pixels_of_channels,
    pooling,
    shuffled,
)

# Kinds that write another number of tensors than one, and that read none.
_WRITES_SEVERAL = ("Split", "Slice", "Noop", "LSTM", "GRU", "RNN")
_READS_NONE = ("Input", "MemoryData")


def unserved(layer: Layer) -> str | None:
    """Why a net with such a layer is not run, whatever it is given; None where it depends on that."""
    if layer.kind not in _RULES:
        return (
            f"layer '{layer.name}' is a {layer.kind}, a kind that is not served: what it can be given is not known here"
        )
    reads_none = layer.kind in _READS_NONE
    if bool(layer.reads) == reads_none or (len(layer.writes) != 1 and layer.kind not in _WRITES_SEVERAL):
        return f"layer '{layer.name}' ({layer.kind}) has {len(layer.reads)} inputs and {len(layer.writes)} outputs"
    return refusal(layer, ()) if reads_none else None


def refusal(layer: Layer, given: Sequence[Shape]) -> str | None:
    """Why a layer that is served cannot be given tensors of these shapes; None where it can."""
    try:
        problem = _RULES[layer.kind](layer, given)
    except NotNcnn as error:  # an option is no number
        return str(error)
    if problem is None:
        return None
    shapes = " and ".join(str(list(shape)) for shape in given)
    return f"layer '{layer.name}' ({layer.kind}) is given {shapes or 'nothing'}, and {problem}"


def is_checked(layer: Layer) -> bool:
    """Whether there are shapes that the layer is refused."""
    return layer.kind not in _READS_NONE and _RULES[layer.kind] is not any_shapes


def _channels(key: int) -> Rule:
    def rule(layer: Layer, given: Sequence[Shape]) -> str | None:
        channels = layer.number(key)
        return None if channels == given[0][0] else f"its weights are those of {channels} channels"

    return rule


def _scaled(layer: Layer, given: Sequence[Shape]) -> str | None:
    if layer.number(0) != SEPARATE:
        return _channels(0)(layer, given) if len(given) == 1 else UNFIT_OPTIONS
    fits = len(given) == 2 and given[1] == given[0][:1] and not layer.number(1)
    return None if fits else "it takes a factor for each channel from a second tensor"


def _grouped(layer: Layer, given: Sequence[Shape]) -> str | None:
    groups = layer.number(0, 1)
    return UNFIT_OPTIONS if groups < 1 or layer.number(1) % groups else _channels(1)(layer, given)


def _instances(layer: Layer, given: Sequence[Shape]) -> str | None:
    shape, channels = given[0], layer.number(0)
    found = shape[0] if len(shape) > 2 else 1
    fits = not layer.number(2, 1) or found == channels
    return None if fits else f"its weights are those of {channels} channels"


def _slopes(layer: Layer, given: Sequence[Shape]) -> str | None:
    return None if layer.number(0) == 1 else _channels(0)(layer, given)


def _normalised(layer: Layer, given: Sequence[Shape]) -> str | None:
    size, shape = layer.number(0), given[0]
    inner = 1
    for one in reversed(shape[-2:] if len(shape) > 2 else shape[-1:]):
        inner *= one
        if inner == size:
            return None
    return f"its weights are those of {size} numbers"


def _unit_length(layer: Layer, given: Sequence[Shape]) -> str | None:
    factors = 1 if layer.number(1) or len(given[0]) < 3 else given[0][0]
    fits = layer.number(3) == factors and len(given[0]) in (1, 3)
    return None if fits else f"its weights are those of {layer.number(3)} channels"


def _known(layer: Layer, _given: Sequence[Shape]) -> str | None:
    """MemoryData: weights that are a tensor."""
    sizes = tuple(layer.number(key) for key in (0, 1, 2, 11))
    if layer.number(21, 1) not in (0, 1):
        return "it holds other numbers than FP32, which is all that this backend has"
    return UNFIT_OPTIONS if min(sizes) < 0 or not sizes[0] else too_many(tuple(max(1, size) for size in sizes))


def _declared(_layer: Layer, _given: Sequence[Shape]) -> str | None:
    return None


def _indices(_layer: Layer, _given: Sequence[Shape]) -> str | None:
    return "it takes whole numbers, and this backend has FP32 alone"


_OF_EACH_NUMBER = (
    *("AbsVal", "BNLL", "CELU", "Clip", "Dropout", "ELU", "Erf", "Exp", "GELU", "HardSigmoid", "HardSwish", "Log"),
    *("Mish", "Power", "ReLU", "SELU", "Shrink", "Sigmoid", "Softplus", "Swish", "TanH", "Threshold", "UnaryOp"),
    *("Split", "DeepCopy", "Flatten"),
)
_RULES: dict[str, Rule] = {
    "Input": _declared,
    "MemoryData": _known,
    "Noop": copied,
    **dict.fromkeys(_OF_EACH_NUMBER, any_shapes),
    **dict.fromkeys(("Convolution1D", "ConvolutionDepthWise1D"), convolution(1)),
    **dict.fromkeys(("Convolution", "ConvolutionDepthWise"), convolution(2)),
    **dict.fromkeys(("Convolution3D", "ConvolutionDepthWise3D"), convolution(3)),
    **dict.fromkeys(("Deconvolution1D", "DeconvolutionDepthWise1D"), deconvolution(1)),
    **dict.fromkeys(("Deconvolution", "DeconvolutionDepthWise"), deconvolution(2)),
    **dict.fromkeys(("Deconvolution3D", "DeconvolutionDepthWise3D"), deconvolution(3)),
    "DeformableConv2D": deformable,
    "Pooling1D": pooling(1),
    "Pooling": pooling(2),
    "Pooling3D": pooling(3),
    "Padding": padding,
    "Interp": enlargement,
    "Crop": cut,
    "PixelShuffle": pixels_of_channels,
    "Reorg": channels_of_pixels,
    "ShuffleChannel": shuffled,
    "LRN": neighbours,
    "InnerProduct": dense,
    "LSTM": recurrent(4),
    "GRU": recurrent(3),
    "RNN": recurrent(1),
    **dict.fromkeys(("BatchNorm", "Bias"), _channels(0)),
    "Scale": _scaled,
    "InstanceNorm": _instances,
    "GroupNorm": _grouped,
    "PReLU": _slopes,
    **dict.fromkeys(("LayerNorm", "RMSNorm"), _normalised),
    "Normalize": _unit_length,
    "MultiHeadAttention": attention,
    "MatMul": product,
    "Gemm": general_product,
    "BinaryOp": pairwise,
    "Eltwise": equal,
    "Concat": joined,
    "Slice": parted,
    "Reshape": reshaped,
    "Permute": permuted,
    "Squeeze": squeezed,
    "ExpandDims": expanded,
    "Tile": repeated,
    "Flip": flipped,
    "Reduction": reduced,
    **dict.fromkeys(("Softmax", "CumulativeSum"), along(0)),
    "GLU": gated,
    "Embed": _indices,
}

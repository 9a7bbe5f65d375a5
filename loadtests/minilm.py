"""A sentence encoder of MiniLM-L6's size as an ONNX graph, with random weights."""

import numpy as np
import onnx

from loadtests.graph import FLOAT, INT64, Graph

HIDDEN = 384
_HEADS = 12
_FEED_FORWARD = 1536
_LAYERS = 6
_POSITIONS = 512
# The real one has 30,522 rows. Looking a row up costs the same in a short table, and the file is 34 MB smaller.
VOCABULARY = 8192


def build_minilm() -> onnx.ModelProto:
    """``input_ids`` and ``attention_mask`` INT64 [batch, seq] to ``embedding`` FP32 [batch, 384], mean pooled."""
    graph = Graph("minilm")
    value = _embed(graph)
    mask = graph.add("Cast", "attention_mask", to=FLOAT)
    bias = graph.add("Unsqueeze", mask, graph.constant([1, 2], np.int64))
    bias = graph.add("Mul", graph.add("Sub", graph.constant(1.0), bias), graph.constant(-10_000.0))
    for _ in range(_LAYERS):
        value = _normalize(graph, graph.add("Add", value, _attend(graph, value, bias)))
        value = _normalize(graph, graph.add("Add", value, _feed_forward(graph, value)))
    _pool(graph, value, mask)
    return graph.model(
        [("input_ids", INT64, ("batch", "seq")), ("attention_mask", INT64, ("batch", "seq"))],
        [("embedding", FLOAT, ("batch", HIDDEN))],
    )


def _embed(graph: Graph) -> str:
    words = graph.add("Gather", graph.weight(VOCABULARY, HIDDEN, scale=0.5), "input_ids")
    length = graph.add("Gather", graph.add("Shape", "input_ids"), graph.constant([1], np.int64))
    positions = graph.add(
        "Slice",
        graph.weight(_POSITIONS, HIDDEN, scale=0.5),
        graph.constant([0], np.int64),
        length,
        graph.constant([0], np.int64),
    )
    return _normalize(graph, graph.add("Add", words, positions))


def _attend(graph: Graph, value: str, bias: str) -> str:
    head = HIDDEN // _HEADS
    split = graph.constant([0, 0, _HEADS, head], np.int64)

    def heads(order: list[int]) -> str:
        return graph.add("Transpose", graph.add("Reshape", graph.linear(value, HIDDEN, HIDDEN), split), perm=order)

    scores = graph.add("MatMul", heads([0, 2, 1, 3]), heads([0, 2, 3, 1]))
    scores = graph.add("Add", graph.add("Div", scores, graph.constant(head**0.5)), bias)
    mixed = graph.add("MatMul", graph.add("Softmax", scores, axis=-1), heads([0, 2, 1, 3]))
    joined = graph.add("Transpose", mixed, perm=[0, 2, 1, 3])
    joined = graph.add("Reshape", joined, graph.constant([0, 0, HIDDEN], np.int64))
    return graph.linear(joined, HIDDEN, HIDDEN)


def _feed_forward(graph: Graph, value: str) -> str:
    """Two layers with GELU between them, spelled with Erf as exporters do."""
    inner = graph.linear(value, HIDDEN, _FEED_FORWARD)
    error = graph.add("Erf", graph.add("Div", inner, graph.constant(2**0.5)))
    gate = graph.add("Add", error, graph.constant(1.0))
    gelu = graph.add("Mul", graph.add("Mul", inner, gate), graph.constant(0.5))
    return graph.linear(gelu, _FEED_FORWARD, HIDDEN)


def _normalize(graph: Graph, value: str) -> str:
    scale, shift = graph.constant(np.ones(HIDDEN)), graph.constant(np.zeros(HIDDEN))
    return graph.add("LayerNormalization", value, scale, shift, axis=-1, epsilon=1e-12)


def _pool(graph: Graph, value: str, mask: str) -> str:
    """The mean over the tokens that the mask leaves; zeros where it leaves none."""
    weights = graph.add("Unsqueeze", mask, graph.constant([2], np.int64))
    axis = graph.constant([1], np.int64)
    total = graph.add("ReduceSum", graph.add("Mul", value, weights), axis, keepdims=0)
    count = graph.add("Max", graph.add("ReduceSum", weights, axis, keepdims=0), graph.constant(1.0))
    return graph.add("Div", total, count, output="embedding")

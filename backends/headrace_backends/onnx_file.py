"""What an ONNX file says that ONNX Runtime does not tell: a walk through its protobuf, past the weights."""

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

# Field numbers of the ONNX specification (onnx.proto).
_MODEL_GRAPH, _MODEL_FUNCTIONS = 7, 25
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT = 1, 5, 11, 12
_FUNCTION_NODE = 7
_NODE_OP_TYPE = 4
_VALUE_NAME, _VALUE_TYPE = 1, 2
_TYPE_TENSOR, _TENSOR_SHAPE = 1, 2
_TENSOR_EXTERNAL, _ENTRY_KEY, _ENTRY_VALUE = 13, 1, 2
# In the names of operators that read or write where an input says, or that hold graphs of which nothing is seen.
_INDEXING = ("Gather", "Scatter", "Embed", "OneHot", "Attention", "Search", "Sequence", "Roi", "If", "Loop", "Scan")


def declared_shapes(path: Path) -> frozenset[str]:
    """The names of the graph's inputs and outputs whose shape the file declares."""
    names: set[str] = set()
    with _opened(path) as data:
        for graph in _fields(data, (0, len(data)), _MODEL_GRAPH):
            for value in chain(_fields(data, graph, _GRAPH_INPUT), _fields(data, graph, _GRAPH_OUTPUT)):
                if any(True for _ in _fields(data, value, _VALUE_TYPE, _TYPE_TENSOR, _TENSOR_SHAPE)):
                    names.update(_texts(data, value, _VALUE_NAME))
    return frozenset(names)


def operators(path: Path) -> frozenset[str]:
    """The operators of the graph and of the file's own functions; not of the graphs inside If, Loop and Scan."""
    with _opened(path) as data:
        model = (0, len(data))
        return frozenset(
            chain(
                _texts(data, model, _MODEL_GRAPH, _GRAPH_NODE, _NODE_OP_TYPE),
                _texts(data, model, _MODEL_FUNCTIONS, _FUNCTION_NODE, _NODE_OP_TYPE),
            )
        )


def indexes(path: Path) -> bool:
    """Whether one of the file's operators may take an input's numbers for places in another tensor."""
    return any(word in name for name in operators(path) for word in _INDEXING)


def external_files(path: Path) -> frozenset[str]:
    """The names of the files in which the graph's weights lie, if not in its own; none where this is no ONNX file."""
    names: set[str] = set()
    try:
        with _opened(path) as data:
            model = (0, len(data))
            for entry in _fields(data, model, _MODEL_GRAPH, _GRAPH_INITIALIZER, _TENSOR_EXTERNAL):
                if "location" in _texts(data, entry, _ENTRY_KEY):
                    names.update(_texts(data, entry, _ENTRY_VALUE))
    except (IndexError, ValueError):  # empty, cut off, or something else
        return frozenset()
    return frozenset(names)


@contextmanager
def _opened(path: Path) -> Iterator[mmap.mmap]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data


def _texts(data: mmap.mmap, message: tuple[int, int], *numbers: int) -> Iterator[str]:
    return (data[start:end].decode() for start, end in _fields(data, message, *numbers))


def _fields(data: mmap.mmap, message: tuple[int, int], number: int, *below: int) -> Iterator[tuple[int, int]]:
    """Where the message's fields ``number`` begin and end; or, with ``below``, the fields so numbered in those."""
    for field in _own_fields(data, *message, number):
        if below:
            yield from _fields(data, field, *below)
        else:
            yield field


def _own_fields(data: mmap.mmap, position: int, end: int, wanted: int) -> Iterator[tuple[int, int]]:
    """Where each length-delimited field of number ``wanted`` begins and ends, in a protobuf message."""
    while position < end:
        key, position = _varint(data, position)
        match key & 7:
            case 0:
                _, position = _varint(data, position)
            case 1:
                position += 8
            case 2:
                length, position = _varint(data, position)
                if key >> 3 == wanted:
                    yield position, position + length
                position += length
            case _:  # 5; the file was parsed before, so there are no others
                position += 4


def _varint(data: mmap.mmap, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7

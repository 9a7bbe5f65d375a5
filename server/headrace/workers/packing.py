"""Requests into one batch, and a batch's outputs back to its requests. Pure functions over buffers."""

from collections.abc import Callable, Iterator, Sequence
from math import prod

from headrace.core.errors import InternalError
from headrace.core.model import Signature
from headrace.core.tensor import DATATYPE_BY_NAME, ITEM_BYTES, Buffer, DataType, Tensor, bytes_offsets
from headrace.core.validation import ModelInputs
from headrace.workers.arena import HEADER_BYTES, aligned
from headrace.workers.frames import Piece, TensorFrame

Extract = Callable[[memoryview], Buffer]


def copy(view: memoryview) -> Buffer:
    """A copy of an output: the worker will write this memory again."""
    return bytes(view)


def view(lent: memoryview) -> Buffer:
    """An output where it is, in lent memory: valid for as long as something refers to it."""
    return lent


def input_frames(batch: Sequence[ModelInputs], batches: bool) -> tuple[tuple[TensorFrame | None, ...], int]:
    """Where each input of the joint batch will lie, and how many bytes that takes.

    The batch dimension is the leading one and data is row-major, so joining is laying end to end.
    """
    first = batch[0]
    rows = sum(inputs.rows for inputs in batch)
    frames: list[TensorFrame | None] = []
    offset = HEADER_BYTES
    for index, tensor in enumerate(first.tensors):
        if tensor is None:
            frames.append(None)
            continue
        if len(batch) == 1:
            nbytes = len(tensor.data)
            shape = tensor.shape
        else:
            assert batches, "only a model that batches is given several requests at once"
            nbytes = 0
            for inputs in batch:
                member = inputs.tensors[index]
                assert member is not None, "requests of one batch have the same inputs"
                nbytes += len(member.data)
            shape = (rows, *tensor.shape[1:])
        frames.append(TensorFrame(offset, nbytes, shape))
        offset += aligned(nbytes)
    return tuple(frames), offset


Refer = Callable[[Buffer], tuple[int, int] | None]


def fill(segment: memoryview, frames: Sequence[TensorFrame | None], batch: Sequence[ModelInputs]) -> None:
    """Copy every request's data into its place in the batch: the only copy on the way to the model."""
    for offset, data in _places(frames, batch):
        segment[offset : offset + len(data)] = data


def fill_or_refer(
    segment: memoryview, frames: Sequence[TensorFrame | None], batch: Sequence[ModelInputs], refer: Refer
) -> tuple[Piece, ...]:
    """As ``fill``, except that data for which ``refer`` finds a place in another worker's segment is not copied.

    Returns a piece for each such place.
    """
    pieces = []
    for offset, data in _places(frames, batch):
        place = refer(data)
        if place is None:
            segment[offset : offset + len(data)] = data
        else:
            pieces.append(Piece(offset, *place, len(data)))
    return tuple(pieces)


def _places(frames: Sequence[TensorFrame | None], batch: Sequence[ModelInputs]) -> Iterator[tuple[int, Buffer]]:
    """Where in the segment each request's data belongs."""
    for index, frame in enumerate(frames):
        if frame is None:
            continue
        offset = frame.offset
        for inputs in batch:
            tensor = inputs.tensors[index]
            assert tensor is not None, "requests of one batch have the same inputs"
            yield offset, tensor.data
            offset += len(tensor.data)


def whole_outputs(
    signature: Signature, frames: Sequence[TensorFrame], segment: memoryview, rows: int, extract: Extract = copy
) -> tuple[Tensor, ...]:
    """The outputs of a batch of one request.

    Raises:
        InternalError: the model batches, and an output's leading dimension is not the number of rows that went in.
    """
    if signature.max_batch_size:
        _check_rows(signature, frames, rows)
    return answer_outputs(signature, frames, segment, extract)


def answer_outputs(
    signature: Signature, frames: Sequence[TensorFrame | None], segment: memoryview, extract: Extract = copy
) -> tuple[Tensor, ...]:
    """One request's own outputs, those that it has."""
    return tuple(
        Tensor(
            spec.name,
            DATATYPE_BY_NAME[frame.datatype],
            frame.shape,
            extract(segment[frame.offset : frame.offset + frame.nbytes]),
        )
        for spec, frame in zip(signature.outputs, frames, strict=True)
        if frame is not None
    )


def split_outputs(
    signature: Signature,
    frames: Sequence[TensorFrame],
    segment: memoryview,
    rows: Sequence[int],
    extract: Extract = copy,
) -> list[tuple[Tensor, ...]]:
    """The outputs of a joint batch, for each request its own rows.

    Raises:
        InternalError: an output's leading dimension is not the number of rows that went in.
    """
    total = sum(rows)
    _check_rows(signature, frames, total)
    columns = [
        _split(spec.name, frame, segment, rows, extract) for spec, frame in zip(signature.outputs, frames, strict=True)
    ]
    return list(zip(*columns, strict=True))


def _check_rows(signature: Signature, frames: Sequence[TensorFrame], rows: int) -> None:
    for spec, frame in zip(signature.outputs, frames, strict=True):
        if frame.shape[:1] != (rows,):
            raise InternalError(
                f"output '{spec.name}' came back with shape {list(frame.shape)} for a batch of {rows} rows; if rows "
                "of this model depend on each other, set max_batch_size: 0 in its config.yaml"
            )


def _split(name: str, frame: TensorFrame, segment: memoryview, rows: Sequence[int], extract: Extract) -> list[Tensor]:
    total = sum(rows)
    datatype = DATATYPE_BY_NAME[frame.datatype]
    tail = frame.shape[1:]
    if ITEM_BYTES[datatype]:
        row_bytes = frame.nbytes // total if total else 0
        start = frame.offset
        parts = []
        for count in rows:
            end = start + count * row_bytes
            parts.append(Tensor(name, datatype, (count, *tail), extract(segment[start:end])))
            start = end
        return parts
    data = segment[frame.offset : frame.offset + frame.nbytes]
    per_row = prod(tail)
    offsets = bytes_offsets(data, total * per_row)
    parts = []
    row = 0
    for count in rows:
        start, end = offsets[row * per_row], offsets[(row + count) * per_row]
        parts.append(Tensor(name, DataType.BYTES, (count, *tail), extract(data[start:end])))
        row += count
    return parts

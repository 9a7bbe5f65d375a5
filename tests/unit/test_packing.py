"""Requests into one batch and outputs back to their requests, byte for byte."""

from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.core.errors import InternalError
from headrace.core.model import Signature, TensorSpec
from headrace.core.rows import join_rows, slice_rows
from headrace.core.tensor import ITEM_BYTES, DataType, Tensor, from_wire, pack_bytes, to_wire
from headrace.core.validation import ModelInputs
from headrace.workers.arena import ALIGNMENT, HEADER_BYTES
from headrace.workers.frames import TensorFrame
from headrace.workers.packing import fill, input_frames, split_outputs, whole_outputs

datatypes = st.sampled_from(list(DataType))
tails = st.lists(st.integers(0, 3), max_size=2).map(tuple)


@st.composite
def rows_of(draw, name, datatype, tail, rows):
    """A tensor of so many rows with random content."""
    shape = (rows, *tail)
    if datatype is DataType.BYTES:
        count = prod(shape)
        return Tensor(
            name, datatype, shape, pack_bytes(draw(st.lists(st.binary(max_size=5), min_size=count, max_size=count)))
        )
    nbytes = prod(shape) * ITEM_BYTES[datatype]
    return Tensor(name, datatype, shape, draw(st.binary(min_size=nbytes, max_size=nbytes)))


@st.composite
def requests(draw, min_size=1):
    """Requests that may share a batch: some rows each of the same one to three inputs."""
    counts = draw(st.lists(st.integers(1, 4), min_size=min_size, max_size=5))
    kinds = draw(st.lists(st.tuples(datatypes, tails, st.booleans()), min_size=1, max_size=3))
    if all(missing for *_, missing in kinds):
        kinds = [(*kinds[0][:2], False), *kinds[1:]]
    return [
        ModelInputs(
            tuple(
                None if missing else draw(rows_of(f"x{index}", datatype, tail, rows))
                for index, (datatype, tail, missing) in enumerate(kinds)
            ),
            rows,
            None,
        )
        for rows in counts
    ]


def plain(tensors):
    return [one and (one.name, one.datatype, one.shape, bytes(one.data)) for one in tensors]


def signature_of(tensors):
    return Signature((), tuple(TensorSpec(one.name, one.datatype, None) for one in tensors), 8)


def echo(batch):
    """What a worker would answer whose outputs are its inputs: frames and the segment."""
    frames, needed = input_frames(batch, batches=True)
    segment = memoryview(bytearray(b"\xee" * (needed + 7)))
    fill(segment, frames, batch)
    given_tensors = [one for one in batch[0].tensors if one is not None]
    answered = [
        TensorFrame(frame.offset, frame.nbytes, frame.shape, str(tensor.datatype))
        for frame, tensor in zip((one for one in frames if one is not None), given_tensors, strict=True)
    ]
    return signature_of(given_tensors), answered, segment


@given(requests())
def test_what_is_joined_and_split_is_what_came(batch):
    signature, frames, segment = echo(batch)
    answers = split_outputs(signature, frames, segment, [one.rows for one in batch])
    assert [plain(answer) for answer in answers] == [
        plain(one for one in inputs.tensors if one is not None) for inputs in batch
    ]


@given(requests())
def test_answers_do_not_change_when_the_segment_is_used_again(batch):
    signature, frames, segment = echo(batch)
    rows = [one.rows for one in batch]
    answers = [*split_outputs(signature, frames, segment, rows), whole_outputs(signature, frames, segment, sum(rows))]
    before = [plain(answer) for answer in answers]
    segment[:] = b"\x55" * len(segment)
    assert [plain(answer) for answer in answers] == before


@given(requests())
def test_inputs_lie_aligned_one_after_the_other_and_inside_the_segment(batch):
    frames, needed = input_frames(batch, batches=True)
    end = 0
    for index, frame in enumerate(frames):
        tensors = [one.tensors[index] for one in batch]
        assert (frame is None) == (tensors[0] is None)
        if frame is None:
            continue
        assert frame.offset % ALIGNMENT == 0
        assert frame.offset >= end
        end = frame.offset + frame.nbytes
        assert frame.nbytes == sum(len(one.data) for one in tensors)
        assert frame.shape == (sum(one.rows for one in batch), *tensors[0].shape[1:])
    assert end <= needed


@given(requests(), st.integers(1, 5))
def test_a_request_cut_into_batches_and_joined_again_is_the_same(batch, size):
    whole = batch[0]
    parts = slice_rows(whole, size)
    assert sum(part.rows for part in parts) == whole.rows
    assert all(1 <= part.rows <= size for part in parts)
    assert all(part.key == whole.key for part in parts)
    for part in parts:
        for tensor in part.tensors:
            assert tensor is None or tensor.shape[0] == part.rows
    given_inputs = [tuple(one for one in part.tensors if one is not None) for part in parts]
    joined = join_rows(given_inputs, [part.rows for part in parts])
    assert plain(joined) == plain(one for one in whole.tensors if one is not None)
    for index, tensor in enumerate(whole.tensors):
        assert (tensor is None) == (parts[0].tensors[index] is None)


def test_the_worker_sees_one_array_of_all_rows():
    rows = [np.arange(6, dtype="<f4").reshape(2, 3), np.arange(10, 13, dtype="<f4").reshape(1, 3)]
    batch = [ModelInputs((Tensor("x", DataType.FP32, one.shape, to_wire(one)),), len(one), None) for one in rows]
    (frame,), needed = input_frames(batch, batches=True)
    segment = memoryview(bytearray(needed))
    fill(segment, [frame], batch)
    array = from_wire(segment[frame.offset : frame.offset + frame.nbytes], DataType.FP32, frame.shape)
    assert array.tolist() == [[0, 1, 2], [3, 4, 5], [10, 11, 12]]


def test_a_model_that_does_not_batch_keeps_its_shapes():
    inputs = ModelInputs((Tensor("s", DataType.INT64, (), bytes(8)), Tensor("e", DataType.INT8, (0, 3), b"")), 1, None)
    frames, needed = input_frames([inputs], batches=False)
    assert [(frame.shape, frame.nbytes) for frame in frames] == [((), 8), ((0, 3), 0)]
    assert needed == HEADER_BYTES + ALIGNMENT
    fill(memoryview(bytearray(needed)), frames, [inputs])


def test_inputs_of_no_bytes_need_no_more_than_the_header():
    inputs = ModelInputs((Tensor("e", DataType.FP32, (1, 0), b""),), 1, None)
    assert input_frames([inputs], batches=True)[1] == HEADER_BYTES
    assert input_frames([ModelInputs((), 1, None)], batches=False) == ((), HEADER_BYTES)


@pytest.mark.parametrize("shape", [(), (3,), (1, 3), (6,)])
def test_an_output_without_a_row_for_each_row_cannot_be_shared_out(shape):
    signature = Signature((), (TensorSpec("y", DataType.UINT8, None),), 8)
    frames = [TensorFrame(0, prod(shape), shape, "UINT8")]
    with pytest.raises(
        InternalError, match=r"output 'y' came back with shape .* for a batch of 5 rows.*max_batch_size"
    ):
        split_outputs(signature, frames, memoryview(bytes(64)), [2, 3])


def test_a_batching_model_owes_a_row_for_each_row_of_a_single_request_too():
    signature = Signature((), (TensorSpec("y", DataType.UINT8, None),), 8)
    with pytest.raises(InternalError, match=r"output 'y' came back with shape \[2\] for a batch of 1 rows"):
        whole_outputs(signature, [TensorFrame(0, 2, (2,), "UINT8")], memoryview(bytes(64)), 1)


def test_a_model_that_does_not_batch_gives_whatever_shape_it_likes():
    signature = Signature((), (TensorSpec("y", DataType.UINT8, None), TensorSpec("s", DataType.BYTES, None)), 0)
    frames = [TensorFrame(0, 3, (3, 1), "UINT8"), TensorFrame(64, 5, (), "BYTES")]
    segment = memoryview(b"abc".ljust(64) + b"\x01\0\0\0z".ljust(64))
    assert plain(whole_outputs(signature, frames, segment, 1)) == [
        ("y", DataType.UINT8, (3, 1), b"abc"),
        ("s", DataType.BYTES, (), b"\x01\0\0\0z"),
    ]


def test_slicing_copies_nothing():
    data = bytearray(range(12))
    parts = slice_rows(ModelInputs((Tensor("x", DataType.UINT8, (4, 3), data),), 4, None), 3)
    data[9] = 200
    assert bytes(parts[1].tensors[0].data) == bytes([200, 10, 11])


@pytest.mark.parametrize(
    "shapes",
    [[(2, 3), (2, 4)], [(), ()], [(2,), (2, 1)]],
    ids=["other sizes behind the rows", "no rows", "other dimensions"],
)
def test_parts_whose_outputs_do_not_fit_together_are_not_joined_into_nonsense(shapes):
    """The parts of a large request run by themselves, so a model whose rows depend on each other may say anything."""
    parts = [(Tensor("y", DataType.UINT8, shape, bytes(prod(shape))),) for shape in shapes]
    with pytest.raises(InternalError, match="'y'"):
        join_rows(parts, [2, 2])

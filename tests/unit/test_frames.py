"""Control messages as they travel between the front process and a worker."""

import msgspec
import pytest

from headrace.core.errors import Kind
from headrace.core.model import Signature, TensorSpec
from headrace.core.tensor import DataType
from headrace.workers.frames import (
    Done,
    Failed,
    Load,
    Loaded,
    LoadFailed,
    RequestFrame,
    Run,
    Stop,
    TensorFrame,
    Unload,
    decode_from_worker,
    decode_to_worker,
    encode,
)

SIGNATURE = Signature(
    (TensorSpec("x", DataType.FP32, (-1, 784)), TensorSpec("s", DataType.BYTES, None, optional=True)),
    (TensorSpec("y", DataType.BF16, ()),),
    32,
)
LOAD = Load(
    instance=3,
    backend="onnxruntime",
    name="digits ä",
    version="12",
    path="/models/digits/12/model.onnx",
    device="gpu:0",
    threads=4,
    signature=Signature((), ()),
    max_batch_size=None,
    parameters={"threads": 2, "fast": True, "ratio": 0.5, "names": ["a", None], "nested": {"b": [1]}},
    warmup=True,
)
RUN = Run(
    instance=3,
    sequence=2**40,
    slot=1,
    segment_bytes=2**33,
    inputs=(TensorFrame(0, 2**33, (2**20, 2048)), None, TensorFrame(2**33, 0, ())),
    requests=(RequestFrame(3, "id", {"priority": 1, "on": True, "f": 1.0, "text": "ö"}), RequestFrame(1, "", {})),
)
DONE = Done(2**40, (TensorFrame(64, 12, (3, 1), "FP32"), TensorFrame(128, 0, (0,), "BYTES")), 65536, 1, 2, 2**62)


@pytest.mark.parametrize(
    "frame", [LOAD, msgspec.structs.replace(LOAD, max_batch_size=0, signature=SIGNATURE), RUN, Unload(3), Stop()]
)
def test_to_the_worker(frame):
    assert decode_to_worker(encode(frame)) == frame


@pytest.mark.parametrize(
    "frame",
    [
        Loaded(3, SIGNATURE, True, 4, ("threads: 2", "warm"), 1.25),
        LoadFailed(3, "model.onnx: not a model"),
        DONE,
        Failed(9, Kind.INVALID.value, "no"),
    ],
)
def test_from_the_worker(frame):
    assert decode_from_worker(encode(frame)) == frame


def test_types_survive_that_msgpack_could_confuse():
    (frame,) = decode_to_worker(encode(RUN)).requests[:1]
    assert [type(value) for value in frame.parameters.values()] == [int, bool, float, str]
    loaded = decode_from_worker(encode(Loaded(1, SIGNATURE, False, 0, (), 0.5)))
    assert loaded.signature.inputs[0].datatype is DataType.FP32
    assert type(loaded.signature.inputs[0].shape) is tuple


def test_neither_side_takes_the_others_messages():
    with pytest.raises(msgspec.ValidationError):
        decode_to_worker(encode(DONE))
    with pytest.raises(msgspec.ValidationError):
        decode_from_worker(encode(RUN))


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x93\x03", encode(RUN)[:-1], encode([99, 1, 2]), encode("text")])
def test_what_is_no_message_is_an_error_and_nothing_else(data):
    with pytest.raises(msgspec.DecodeError):
        decode_to_worker(data)


def test_a_message_never_starts_like_one_that_was_too_large_for_its_packet():
    frames = [
        LOAD,
        RUN,
        Unload(1),
        Stop(),
        DONE,
        Failed(1, "invalid", ""),
        LoadFailed(1, ""),
        Loaded(1, SIGNATURE, False, 0, (), 0),
    ]
    assert all(encode(frame)[:1] != b"\xc1" for frame in frames)


def test_a_usual_message_is_small():
    usual = Run(1, 1000, 0, 0, (TensorFrame(0, 100_352, (32, 784)),), ())
    assert len(encode(usual)) < 64

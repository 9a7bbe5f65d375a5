"""Control messages as they travel between the front process and a worker."""

import msgspec
import pytest

from headrace.core.custom_metric import CustomMetric
from headrace.core.errors import Kind
from headrace.core.model import Signature, TensorSpec
from headrace.core.tensor import DataType
from headrace.log import LogLevels
from headrace.workers.frames import (
    AnswerFrame,
    Ask,
    Begun,
    Call,
    CallAnswer,
    CallCredit,
    CallEnd,
    Cancel,
    Credit,
    CustomMetrics,
    Done,
    Ended,
    Failed,
    Load,
    Loaded,
    LoadFailed,
    Logging,
    NamedTensor,
    Part,
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
ANSWER = CallAnswer(
    2**40, False, (("y", TensorFrame(0, 2**33, (2**31,), "FP32")),), {"k": 1.0, "on": True}, 2**33, "invalid", "no"
)
CALL = Call(
    7, 3, 2**40, "ö", "2", (("x", TensorFrame(0, 8, (2,), "FP32")),), ("y",), "id", {"k": 2**64 - 1}, 5, True, 64
)
PART = Part(2**40, (NamedTensor("y", "BYTES", (1,), b"\1\0\0\0\xff"),), {"k": -(2**63)}, 2**62, "internal", "ö")
ASK = Ask(8, "load", "ö", "1", '{"a": 1}', {"1/model.py": b"\xff"}, True)
METRICS = CustomMetrics(3, (CustomMetric("size", "ö", "histogram", (("k", "v"),), 1.5, ((0.5, 2), (1.0, 3)), 4),))
DONE = Done(2**40, (TensorFrame(64, 12, (3, 1), "FP32"), TensorFrame(128, 0, (0,), "BYTES")), 65536, 1, 2, 2**62)


@pytest.mark.parametrize(
    "frame",
    [
        LOAD,
        msgspec.structs.replace(LOAD, max_batch_size=0, signature=SIGNATURE),
        RUN,
        Unload(3),
        Stop(),
        Credit(2**40, 16),
        Cancel(2**40),
        ANSWER,
        CallAnswer(1, True),
        Logging(LogLevels()),
    ],
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
        Done(9, (), 0, 1, 2, 3, (AnswerFrame((None, TensorFrame(0, 4, (1,), "FP32")), {"k": True}),)),
        Done(9, (), 0, 1, 2, 3, (AnswerFrame((), {}, "invalid", "no"),)),
        Begun(2**40, 2**62),
        PART,
        Part(1, (), {}),
        Ended(2**40),
        Ended(2**40, "internal", "ö"),
        CALL,
        CallEnd(7),
        CallCredit(7, 8),
        ASK,
        METRICS,
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
        *(
            Credit(1, 1),
            Cancel(1),
            ANSWER,
            Begun(1, 1),
            PART,
            Ended(1),
            CALL,
            CallEnd(1),
            CallCredit(1, 1),
            ASK,
            METRICS,
        ),
    ]
    assert all(encode(frame)[:1] != b"\xc1" for frame in frames)


def test_what_a_worker_can_write_and_nobody_read_is_an_error_here():
    """Nothing on the way out looks at the kinds of values, so who fills frames with what a model gave must."""
    for frame in (
        Part(1, (), {"k": None}),
        Done(1, (), 0, 0, 0, 0, (AnswerFrame((), {"k": [1]}),)),
        Call(1, 0, 0, "m", "", (), (), "", {"k": b""}, 0, False, 0),
        Ask(1, "sing", "m"),
    ):
        data = encode(frame)
        with pytest.raises(msgspec.ValidationError):
            decode_from_worker(data)


def test_a_response_of_one_token_is_small():
    token = NamedTensor("text", "BYTES", (1,), b"\4\0\0\0word")
    assert len(encode(Part(1000, (token,), {}, 1_000_000))) < 64


def test_a_usual_message_is_small():
    usual = Run(1, 1000, 0, 0, (TensorFrame(0, 100_352, (32, 784)),), ())
    assert len(encode(usual)) < 64

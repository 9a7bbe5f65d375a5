"""The worker's view of a batch's place in shared memory: arrays in, arrays out."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from headrace.core.errors import HeadraceError, Kind
from headrace.core.model import Signature, TensorSpec
from headrace.core.plain_text import plain
from headrace.core.request import Parameters
from headrace.core.tensor import Array, Buffer, DataType, datatype_of, from_wire, to_wire
from headrace.workers.arena import Segment, SegmentSize, aligned
from headrace.workers.channel import close_all
from headrace.workers.frames import AnswerFrame, TensorFrame, encode
from headrace_backends.base import Answer

NOWHERE: Mapping[int, memoryview] = MappingProxyType({})


class SlotMemory:
    """Inputs in the front's segment, outputs in the worker's own."""

    __slots__ = ("inputs", "outputs", "size")

    def __init__(self) -> None:
        self.inputs = memoryview(b"")
        self.outputs: Segment | None = None
        self.size = SegmentSize()

    def write(self, buffers: Sequence[Buffer]) -> list[int]:
        """Lay the buffers one behind the other, aligned; a descriptor comes back when the segment is a new one."""
        needed = sum(aligned(len(buffer)) for buffer in buffers)
        descriptors: list[int] = []
        segment_bytes = self.size.fit(max(needed, 1))
        try:
            if segment_bytes:
                self.outputs, descriptor = Segment.create(segment_bytes)
                descriptors.append(descriptor)
            assert self.outputs is not None, "the first batch made a segment"
            lay_out(self.outputs.view, buffers)
        except BaseException:
            close_all(descriptors)
            self.forget_outputs()
            raise
        return descriptors

    def forget_outputs(self) -> None:
        """The front was not told of the segment: the next batch must bring another."""
        self.outputs, self.size = None, SegmentSize()


def lay_out(view: memoryview, buffers: Sequence[Buffer]) -> None:
    """Copy the buffers into ``view``, each at the next aligned offset."""
    offset = 0
    for buffer in buffers:
        view[offset : offset + len(buffer)] = buffer
        offset += aligned(len(buffer))


def read_inputs(
    signature: Signature,
    tensors: Sequence[TensorFrame | None],
    segment: memoryview,
    elsewhere: Mapping[int, memoryview] = NOWHERE,
) -> dict[str, Array]:
    """The batch's inputs as arrays over the segment; BYTES are made into objects.

    Inputs that are not in the segment are ``elsewhere``, by the offset that they would have in it.
    """
    inputs: dict[str, Array] = {}
    for spec, tensor in zip(signature.inputs, tensors, strict=True):
        if tensor is not None:
            data = elsewhere.get(tensor.offset)
            if data is None:
                data = segment[tensor.offset : tensor.offset + tensor.nbytes]
            inputs[spec.name] = from_wire(data, spec.datatype, tensor.shape)
    return inputs


def joint_frames(signature: Signature, outputs: Mapping[str, Array]) -> tuple[list[TensorFrame], list[Buffer]]:
    """Where a whole batch's outputs will lie, in the signature's order, and their bytes.

    Raises:
        TypeError: an output has a datatype that is not the declared one.
    """
    writer = _Layout()
    return [writer.add(spec, outputs[spec.name]) for spec in signature.outputs], writer.buffers


def answer_frames(
    signature: Signature, answers: Sequence[Answer], requests: int
) -> tuple[list[AnswerFrame], list[Buffer]]:
    """As ``joint_frames``, for a batch of which each request has its own answer.

    An answer that breaks the signature becomes that request's error.
    """
    if len(answers) != requests:
        raise RuntimeError(f"it gave {len(answers)} answers to {requests} requests")
    writer = _Layout()
    return [_answer_frame(signature, answer, writer) for answer in answers], writer.buffers


class _Layout:
    """Buffers one behind the other."""

    __slots__ = ("buffers", "offset")

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.offset = 0

    def add(self, spec: TensorSpec, array: Array) -> TensorFrame:
        data, datatype = wire_form(spec, array)
        frame = TensorFrame(self.offset, len(data), tuple(array.shape), str(datatype))
        self.buffers.append(data)
        self.offset += aligned(len(data))
        return frame


def _answer_frame(signature: Signature, answer: Answer, writer: _Layout) -> AnswerFrame:
    unknown = sorted(answer.outputs.keys() - {spec.name for spec in signature.outputs})
    if unknown and answer.error is None:
        return AnswerFrame((), {}, Kind.INTERNAL.value, f"it gave the output '{unknown[0]}', which is not declared")
    try:
        parameters = checked_parameters(answer.parameters)
        if answer.error is not None:
            return AnswerFrame((), parameters, *described(answer.error))
        placed = tuple(
            writer.add(spec, answer.outputs[spec.name]) if spec.name in answer.outputs else None
            for spec in signature.outputs
        )
    except TypeError as error:
        return AnswerFrame((), {}, Kind.INTERNAL.value, str(error))
    return AnswerFrame(placed, parameters)


def checked_parameters(parameters: Mapping[str, object]) -> Parameters:
    """A model's parameters as a frame can carry them, plain values for numpy's.

    Raises:
        TypeError: one of them is of no kind that the protocol has, or cannot be written.
    """
    if not parameters:
        return {}
    checked: Parameters = {}
    for name, given in parameters.items():
        value = given.item() if isinstance(given, np.generic) else given
        if not isinstance(name, str) or not isinstance(value, bool | int | float | str):
            raise TypeError(f"parameter {name!r} is {given!r}, expected a name and a bool, a number or a string")
        if type(value) is int and not -(1 << 63) <= value < 1 << 64:
            raise TypeError(f"parameter {name!r} is an integer of more than 64 bits")
        checked[name] = value
    try:
        encode(checked)
    except UnicodeEncodeError:
        raise TypeError("a parameter has half of a surrogate pair, expected valid Unicode") from None
    return checked


def wire_form(spec: TensorSpec, array: Array) -> tuple[Buffer, DataType]:
    """An output's bytes and datatype.

    Raises:
        TypeError: the datatype is not the declared one, or an element of BYTES is no text.
    """
    datatype = datatype_of(array)
    if datatype is None:
        raise TypeError(f"output '{spec.name}' has numpy dtype {array.dtype}, which the protocol does not have")
    if datatype is not spec.datatype:
        raise TypeError(f"output '{spec.name}' has datatype {datatype}, expected {spec.datatype}")
    try:
        return to_wire(array), datatype
    except (TypeError, UnicodeEncodeError) as error:
        raise TypeError(f"output '{spec.name}' {error}") from error


def described(error: BaseException) -> tuple[str, str]:
    """An error's kind and message, as a frame carries them."""
    if isinstance(error, HeadraceError):
        return error.kind.value, plain_text(error)
    return Kind.INTERNAL.value, f"{type(error).__name__}: {plain_text(error)}"


def plain_text(error: BaseException) -> str:
    """An error's message. A model's own may have one that cannot be written, or fail to give any."""
    try:
        return plain(str(error))
    except Exception:  # noqa: BLE001 - the text is made by the model's own code
        return "(without a text)"

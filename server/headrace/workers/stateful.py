"""A model with sequences: its batches are given control inputs and states, and the new states are kept."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import msgspec
import numpy as np

from headrace.core.sequence import ControlSpec, SequenceSpec, StateSpec
from headrace.core.tensor import NUMPY_DTYPES, Array, DataType, datatype_of, from_wire, to_wire
from headrace.workers.stateful_checks import agree, initial_shape, misfits
from headrace.workers.wrapped import Wrapped
from headrace_backends.base import (
    Answer,
    Backend,
    InputError,
    LoadError,
    RequestInfo,
    ResponseStream,
)

_NOBODY = RequestInfo(1, "", {})  # what a row without a request is, to a backend that is told of requests


class _Kept:
    """The states of one sequence. Its next request has them as inputs."""

    __slots__ = ("id", "states")

    def __init__(self, identity: int | str, states: tuple[Array, ...]) -> None:
        self.id = identity
        self.states = states


class _Turn:
    """One request of a sequence while it runs; ``states`` are the new ones, None where it brought none."""

    __slots__ = ("end", "kept", "request", "start", "states", "succeeded")

    def __init__(self, request: RequestInfo, kept: _Kept, *, start: bool, end: bool) -> None:
        self.request = request
        self.kept = kept
        self.start = start
        self.end = end
        self.states: tuple[Array, ...] | None = None
        self.succeeded = True


class Stateful(Wrapped):
    """Another backend, with what a ``SequenceSpec`` asks for added to what goes in and hidden of what comes out.

    The states of a sequence are kept under its place (``RequestInfo.slot``), which the front process gives to no
    other sequence before this one has ended; a request with ``sequence_start`` finds the initial ones. They change
    when a run has succeeded, so a batch that failed may run again. ``close`` closes the other backend.

    Each request has one row, the inputs' rows are the requests' in their order. With the ``direct`` strategy the
    model sees a batch in which row n is that of place n, zeros where there is no request.
    """

    wants_requests = True

    def __init__(self, backend: Backend, spec: SequenceSpec) -> None:
        signature = backend.signature
        problems = misfits(signature, spec)
        if problems:
            raise LoadError("; ".join(problems))
        seen = msgspec.structs.replace(
            signature,
            inputs=tuple(one for one in signature.inputs if one.name not in spec.hidden_inputs),
            outputs=tuple(one for one in signature.outputs if one.name not in spec.hidden_outputs),
        )
        super().__init__(backend, seen)
        self._spec = spec
        self._batches = signature.max_batch_size > 0
        self._places_are_rows = self._batches and spec.strategy == "direct"
        self._hidden_outputs = tuple(state.output for state in spec.states)
        self._dimensions = {one.name: None if one.shape is None else len(one.shape) for one in signature.inputs}
        self._initial = tuple(_initial(state) for state in spec.states)
        self._kept: dict[int, _Kept] = {}  # by place

    def execute(
        self, inputs: Mapping[str, Array], requests: Sequence[RequestInfo]
    ) -> Mapping[str, Array] | Sequence[Answer]:
        """Run one batch, each request of it of another sequence.

        Raises:
            InputError: nothing is known of a sequence.
        """
        turns = [self._turn(request) for request in requests]
        groups = _by_state_shapes(turns)
        result = self._run(inputs, turns) if len(groups) == 1 else self._run_apart(inputs, turns, groups)
        for turn in turns:
            self._keep(turn)
        return result

    def begin(self, inputs: Mapping[str, Array], stream: ResponseStream) -> Iterator[Answer] | None:
        """Begin to answer one request of a decoupled model; every response may bring new states."""
        turn = self._turn(stream.request)
        given = self._completed(inputs, [turn], [0], 1)
        watched = _StatefulStream(
            stream, self._asked(turn), lambda answer: self._take_states(turn, answer), lambda: self._keep(turn)
        )
        answers = self._backend.begin(given, watched)
        return None if answers is None else self._watched(answers, turn)

    def close(self) -> None:
        """Forget every state and close the other backend."""
        self._kept.clear()
        super().close()

    # -- sequences ----------------------------------------------------------------------------------------

    def _turn(self, request: RequestInfo) -> _Turn:
        identity = request.parameters.get("sequence_id", 0)
        if not identity or isinstance(identity, bool | float):
            # Nobody's: a made-up row to warm the model up.
            return _Turn(request, _Kept(0, self._initial), start=True, end=True)
        start = request.parameters.get("sequence_start") is True
        kept = self._kept.get(request.slot)
        if start or not self._spec.states:
            kept = _Kept(identity, self._initial)
            if self._spec.states:
                self._kept[request.slot] = kept
        elif kept is None or kept.id != identity:
            raise InputError(f"nothing is known of sequence {identity}; begin it anew with sequence_start")
        return _Turn(request, kept, start=start, end=request.parameters.get("sequence_end") is True)

    def _keep(self, turn: _Turn) -> None:
        """Take note of what a request has left behind."""
        if turn.states is not None:
            turn.kept.states = turn.states
        if turn.end and turn.succeeded and self._kept.get(turn.request.slot) is turn.kept:
            del self._kept[turn.request.slot]

    # -- batches ------------------------------------------------------------------------------------------

    def _run(self, inputs: Mapping[str, Array], turns: Sequence[_Turn]) -> Mapping[str, Array] | Sequence[Answer]:
        """Run requests whose states have equal shapes. Their turns are told of the new states."""
        rows = list(range(len(turns)))
        if self._places_are_rows and all(turn.request.slot >= 0 for turn in turns):
            rows = [turn.request.slot for turn in turns]
        size = max(rows) + 1
        given = self._completed(inputs, turns, rows, size)
        requests: list[RequestInfo] = []
        if self._backend.wants_requests:
            requests = [_NOBODY] * size
            for row, turn in zip(rows, turns, strict=True):
                requests[row] = self._asked(turn)
        result = self._backend.execute(given, requests)
        if isinstance(result, Mapping):
            return self._joint(result, turns, rows, size)
        if len(result) != size:
            raise RuntimeError(f"it gave {len(result)} answers to {size} requests")
        return [self._apart(result[row], turn) for row, turn in zip(rows, turns, strict=True)]

    def _run_apart(
        self, inputs: Mapping[str, Array], turns: Sequence[_Turn], groups: Sequence[list[int]]
    ) -> list[Answer]:
        """Run requests whose states differ in shape, and so cannot be rows of one tensor: one group at a time."""
        answers: dict[int, Answer] = {}
        for group in groups:
            result = self._run({name: array[group] for name, array in inputs.items()}, [turns[at] for at in group])
            if isinstance(result, Mapping):
                # Copies: the next run may use the same memory for its outputs.
                result = [
                    Answer({name: array[row : row + 1].copy() for name, array in result.items()})
                    for row in range(len(group))
                ]
            answers.update(zip(group, result, strict=True))
        return [answers[at] for at in range(len(turns))]

    def _completed(
        self, inputs: Mapping[str, Array], turns: Sequence[_Turn], rows: list[int], size: int
    ) -> dict[str, Array]:
        """A batch of ``size`` rows, with the requests in those ``rows`` and with controls and states."""
        given = dict(inputs)
        if rows != list(range(size)):
            for name, array in inputs.items():
                given[name] = _blank((size, *array.shape[1:]), array.dtype)
                given[name][rows] = array
        for control in self._spec.controls:
            values = _control_values(control, turns, rows, size)
            dimensions = self._dimensions[control.input]
            if dimensions is None:
                dimensions = 2 if self._batches else 1
            lead = (size,) if self._batches else ()
            given[control.input] = values.reshape((*lead, *(1,) * (dimensions - len(lead))))
        for index, state in enumerate(self._spec.states):
            if not self._batches:
                given[state.input] = turns[0].kept.states[index].copy()
                continue
            shape = turns[0].kept.states[index].shape
            array = given[state.input] = _blank((size, *shape), NUMPY_DTYPES[state.datatype])
            for row, turn in zip(rows, turns, strict=True):
                array[row] = turn.kept.states[index]
        return given

    def _asked(self, turn: _Turn) -> RequestInfo:
        """The request as the other backend is to see it: where outputs are chosen, the states are wanted too."""
        request = turn.request
        if not request.outputs or not self._hidden_outputs:
            return request
        return replace(request, outputs=(*request.outputs, *self._hidden_outputs))

    # -- results ------------------------------------------------------------------------------------------

    def _joint(
        self, outputs: Mapping[str, Array], turns: Sequence[_Turn], rows: list[int], size: int
    ) -> dict[str, Array]:
        """The requests' rows of what clients get, checked here because nothing may fail once states are kept."""
        given = {}
        whole = rows == list(range(size))
        for spec in self._signature.outputs:
            array = _output(outputs, spec.name, spec.datatype)
            if self._batches:
                _check_rows(spec.name, array, size)
            given[spec.name] = array if whole else array[rows]
        for row, turn in zip(rows, turns, strict=True):
            turn.states = tuple(self._state(state, outputs, row, size) for state in self._spec.states)
        return given

    def _apart(self, answer: Answer, turn: _Turn) -> Answer:
        """One request's own answer, as its client gets it."""
        turn.succeeded = answer.error is None
        if not turn.succeeded:
            return answer
        try:
            if not turn.end:
                turn.states = tuple(self._state(state, answer.outputs, 0, 1) for state in self._spec.states)
        except (RuntimeError, TypeError) as error:
            return Answer(error=error)
        return self._visible(answer)

    def _take_states(self, turn: _Turn, answer: Answer) -> Answer:
        """Keep the states that a decoupled model's response brings, and give what its client gets of it."""
        if answer.error is None:
            turn.kept.states = tuple(
                self._state(state, answer.outputs, 0, 1) if state.output in answer.outputs else kept
                for state, kept in zip(self._spec.states, turn.kept.states, strict=True)
            )
        return self._visible(answer)

    def _watched(self, answers: Iterator[Answer], turn: _Turn) -> Iterator[Answer]:
        try:
            for answer in answers:
                yield self._take_states(turn, answer)
            self._keep(turn)
        finally:
            close = getattr(answers, "close", None)
            if close is not None:
                close()

    def _visible(self, answer: Answer) -> Answer:
        if not any(name in answer.outputs for name in self._hidden_outputs):
            return answer
        hidden = self._hidden_outputs
        return replace(answer, outputs={name: it for name, it in answer.outputs.items() if name not in hidden})

    def _state(self, state: StateSpec, outputs: Mapping[str, Array], row: int, rows: int) -> Array:
        """A copy of one row's new state."""
        array = _output(outputs, state.output, state.datatype)
        if self._batches:
            _check_rows(state.output, array, rows)
            array = np.asarray(array[row])
        if not agree(array.shape, state.shape):
            raise RuntimeError(f"state '{state.output}' has shape {list(array.shape)}, expected {list(state.shape)}")
        if state.datatype is DataType.BYTES:  # texts become the bytes that an input has
            return from_wire(to_wire(array), DataType.BYTES, array.shape)
        return np.array(array, dtype=NUMPY_DTYPES[state.datatype])


class _StatefulStream:
    """A decoupled request's stream, as a model sees it that keeps states: a ``ResponseStream``."""

    def __init__(
        self,
        stream: ResponseStream,
        request: RequestInfo,
        take_states: Callable[[Answer], Answer],
        keep: Callable[[], None],
    ) -> None:
        self._stream = stream
        self._request = request
        self._take_states = take_states
        self._keep = keep

    @property
    def request(self) -> RequestInfo:
        """What is being answered."""
        return self._request

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for responses any more."""
        return self._stream.cancelled

    def send(self, answer: Answer) -> None:
        """Give one response, without the states that it brings."""
        self._stream.send(self._take_states(answer))

    def end(self, error: Exception | None = None) -> None:
        """There will be no more responses. States stay as the ones before have left them, with an error too."""
        if error is None:
            self._keep()
        self._stream.end(error)


def _initial(state: StateSpec) -> Array:
    shape = initial_shape(state)
    if not state.initial:
        return _blank(shape, NUMPY_DTYPES[state.datatype])
    return from_wire(state.initial, state.datatype, shape)


def _blank(shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> Array:
    """Zeros, or BYTES elements of no length."""
    if dtype.kind == "O":
        return np.full(shape, b"", dtype=np.object_)
    return np.zeros(shape, dtype=dtype)


def _by_state_shapes(turns: Sequence[_Turn]) -> list[list[int]]:
    """The requests, as indices, whose states have equal shapes."""
    groups: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for index, turn in enumerate(turns):
        groups.setdefault(tuple(state.shape for state in turn.kept.states), []).append(index)
    return list(groups.values())


def _control_values(control: ControlSpec, turns: Sequence[_Turn], rows: list[int], size: int) -> Array:
    """The control's value for each row of the batch."""
    dtype = NUMPY_DTYPES[control.datatype]
    if control.kind == "correlation_id":
        values = _blank((size,), dtype)
        for row, turn in zip(rows, turns, strict=True):
            # Numbers for numbers and texts for texts, as the front process sees to; nobody's is 0 or empty.
            identity = turn.kept.id
            values[row] = str(identity or "").encode() if control.datatype is DataType.BYTES else identity
        return values
    false, true = control.values or (0.0, 1.0)
    values = np.full(size, false, dtype=dtype)
    for row, turn in zip(rows, turns, strict=True):
        flag = control.kind == "ready" or (turn.start if control.kind == "start" else turn.end)
        values[row] = true if flag else false
    return values


def _output(outputs: Mapping[str, Array], name: str, datatype: DataType) -> Array:
    array = outputs.get(name)
    if array is None:
        raise RuntimeError(f"it did not give the output '{name}'")
    if datatype_of(array) is not datatype:
        raise TypeError(f"output '{name}' has datatype {datatype_of(array) or array.dtype}, expected {datatype}")
    return array


def _check_rows(name: str, array: Array, rows: int) -> None:
    if array.shape[:1] != (rows,):
        raise RuntimeError(f"output '{name}' came back with shape {list(array.shape)} for a batch of {rows} rows")

"""Traces of single requests: which are sampled, and what is noted of them."""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import NamedTuple

import msgspec

from headrace.core.errors import InvalidRequest, Unsupported
from headrace.core.tensor import ITEM_BYTES, DataType, Tensor, from_wire
from headrace.trace_file import TraceWriter

OFF = ("OFF",)
MAX_RATE = 2**32 - 1
MAX_COUNT = 2**31 - 1
MAX_TENSOR_BYTES = 64 * 1024  # of a tensor's data in a trace; there is only the beginning of a larger one
CLOSE_TIMEOUT_S = 5.0

_LEVELS = ("TIMESTAMPS", "TENSORS")
_BOUNDS = {"trace_rate": (1, MAX_RATE), "trace_count": (-1, MAX_COUNT), "log_frequency": (0, MAX_RATE)}
_CHANGEABLE = ("trace_level", *_BOUNDS)
_KEYS = (*_CHANGEABLE, "trace_file", "trace_mode")
_MODE = "triton"
_WHOLE = re.compile(r"-?[0-9]{1,10}")

SettingValue = int | tuple[str, ...]


class TraceSettings(msgspec.Struct, frozen=True):
    """What is traced. The fields have the protocol's names.

    Every ``trace_rate``-th request of a model is, while ``trace_count`` is not 0; it counts down unless it is -1.
    With a ``log_frequency`` the traces go to ``trace_file``.0, .1 and so on, that many to each.
    """

    trace_level: tuple[str, ...] = OFF
    trace_rate: int = 1000
    trace_count: int = -1
    log_frequency: int = 0
    trace_file: str = ""

    @property
    def on(self) -> bool:
        """Whether any request is traced."""
        return self.trace_level != OFF and self.trace_count != 0

    def values(self) -> dict[str, str | list[str]]:
        """Every setting in the protocol's form."""
        return {
            "trace_level": list(self.trace_level),
            "trace_rate": str(self.trace_rate),
            "trace_count": str(self.trace_count),
            "log_frequency": str(self.log_frequency),
            "trace_file": self.trace_file,
            "trace_mode": _MODE,
        }


def settings_at_start(trace_file: str, levels: Sequence[str], trace_rate: int, trace_count: int) -> TraceSettings:
    """The settings that the command line gives.

    Raises:
        ValueError: they do not fit together, or the file's folder cannot be written to. It names the flag.
    """
    try:
        level = _level(levels) if levels else OFF
    except InvalidRequest as error:
        raise ValueError(f"--trace-level: {error}") from None
    if level != OFF and not trace_file:
        raise ValueError(f"--trace-level {level[0]} needs --trace-file, the file to write traces to")
    if trace_file:
        folder = Path(trace_file).absolute().parent
        if Path(trace_file).is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise ValueError(f"--trace-file {trace_file}: expected a file in a folder that can be written to")
    return TraceSettings(level, trace_rate, trace_count, 0, trace_file)


def parse_setting(key: str, values: Sequence[str]) -> SettingValue:
    """A setting as a request gives it: one text, or for the level one or more.

    Raises:
        InvalidRequest: there is no such setting, or this is no value of it.
        Unsupported: the setting cannot be changed by request.
    """
    if key == "trace_file":
        raise Unsupported("trace setting 'trace_file' cannot be changed by request; it is given by --trace-file")
    if key == "trace_mode":
        raise Unsupported(f"trace setting 'trace_mode' cannot be changed by request; this server has '{_MODE}' only")
    if key == "trace_level":
        return _level(values)
    if key not in _BOUNDS:
        raise InvalidRequest(f"there is no trace setting '{key[:100]}', expected one of {', '.join(_KEYS)}")
    if len(values) != 1:
        raise InvalidRequest(f"trace setting '{key}' has {len(values)} values, expected one")
    low, high = _BOUNDS[key]
    text = values[0]
    if not _WHOLE.fullmatch(text) or not low <= int(text) <= high:
        raise InvalidRequest(f"trace setting '{key}' is {text[:100]!r}, expected a whole number from {low} to {high}")
    return int(text)


def _level(values: Sequence[str]) -> tuple[str, ...]:
    if not values or not {*values} <= {*_LEVELS, *OFF}:
        wrong = next((value for value in values if value not in (*_LEVELS, *OFF)), "nothing")
        raise InvalidRequest(f"trace setting 'trace_level' has {wrong[:100]!r}, expected OFF, TIMESTAMPS or TENSORS")
    if "OFF" in values:
        if len({*values}) > 1:
            raise InvalidRequest("trace setting 'trace_level' has OFF beside other levels, expected OFF alone")
        return OFF
    return tuple(level for level in _LEVELS if level in values)


class _TracedTensor(NamedTuple):
    """A tensor as it was at one point of its request; ``data`` may be only the beginning of it."""

    activity: str
    name: str
    datatype: DataType
    shape: tuple[int, ...]
    data: bytes
    whole: bool


class Trace:
    """What is noted of one request. Belongs to the event loop until it is ended, and to nobody afterwards."""

    __slots__ = ("_events", "_head", "_tensors", "_timestamps", "_writer", "log_frequency", "nbytes")

    def __init__(self, head: dict[str, object], settings: TraceSettings, writer: TraceWriter) -> None:
        self._head = head
        self._timestamps = "TIMESTAMPS" in settings.trace_level
        self._tensors = "TENSORS" in settings.trace_level
        self._writer: TraceWriter | None = writer
        self._events: list[tuple[str, int] | _TracedTensor] = []
        self.log_frequency = settings.log_frequency
        self.nbytes = 0

    def mark(self, name: str, ns: int) -> None:
        """Note that the request came to the point ``name`` (REQUEST_START, ...) at a time of the monotonic clock."""
        if self._timestamps and self._writer is not None:
            self._events.append((name, ns))

    def tensors(self, activity: str, tensors: Iterable[Tensor]) -> None:
        """Note tensors as they are now, for instance at TENSOR_QUEUE_INPUT or TENSOR_BACKEND_OUTPUT.

        Their beginnings are copied where they could change: the buffers need not outlive this call.
        """
        if not self._tensors or self._writer is None:
            return
        for tensor in tensors:
            whole = len(tensor.data) <= MAX_TENSOR_BYTES
            data = bytes(tensor.data if whole else memoryview(tensor.data)[:MAX_TENSOR_BYTES])
            self._events.append(_TracedTensor(activity, tensor.name, tensor.datatype, tuple(tensor.shape), data, whole))
            self.nbytes += len(data)

    def end(self) -> None:
        """The request is answered, one way or another: have the trace written. Later calls change nothing."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.put(self)

    def render(self) -> bytes:
        """The trace's objects in JSON, between commas, in the layout that Triton's tools read."""
        objects = [self._head]
        for event in self._events:
            if isinstance(event, _TracedTensor):
                objects.append({"id": self._head["id"], "activity": event.activity, "tensor": _tensor_fields(event)})
            else:
                objects.append({"id": self._head["id"], "timestamps": [{"name": event[0], "ns": event[1]}]})
        return b",\n".join(map(msgspec.json.encode, objects))


def _tensor_fields(tensor: _TracedTensor) -> dict[str, str]:
    elements = _elements(tensor.datatype, tensor.data)
    fields = {"name": tensor.name, "data": ",".join(elements), "shape": _comma(tensor.shape), "dtype": tensor.datatype}
    if not tensor.whole:
        # Tools shape the data, so the shape has to be that of what is there.
        fields |= {"shape": str(len(elements)), "cut_from": _comma(tensor.shape)}
    return fields


def _comma(shape: tuple[int, ...]) -> str:
    return ",".join(map(str, shape))


def _elements(datatype: DataType, data: bytes) -> list[str]:
    """The whole elements in ``data``, each as text: numbers, 0 or 1 for BOOL, JSON strings for BYTES."""
    if datatype is DataType.BYTES:
        texts = []
        start = 0
        while start + 4 <= len(data):
            end = start + 4 + int.from_bytes(data[start : start + 4], "little")
            if end > len(data):
                break
            texts.append(json.dumps(data[start + 4 : end].decode("utf-8", "backslashreplace"), ensure_ascii=False))
            start = end
        return texts
    array = from_wire(data, datatype, (len(data) // ITEM_BYTES[datatype],))
    return [str(int(value)) for value in array] if datatype is DataType.BOOL else [str(value) for value in array]


class Tracer:
    """Says which requests are traced. Belongs to the event loop; the files are written by a thread of its own.

    ``active`` is false while no request of any model can be sampled: callers look at it before anything else.
    A model's own settings stand before the server's. A count that it does not have of its own is the server's,
    shared with all that do not.
    """

    __slots__ = ("_closed", "_ids", "_in_force", "_own", "_seen", "_start", "_writer", "active")

    def __init__(self, settings: TraceSettings) -> None:
        self._start = settings
        self._own: dict[str, dict[str, SettingValue]] = {}  # by model; the server's, as far as changed, under ""
        self._in_force: dict[str, TraceSettings] = {}
        self._seen: dict[str, int] = {}  # requests of a model since its last trace
        self._ids = count(1)
        self._writer = TraceWriter(settings.trace_file)
        self._closed = False
        self.active = settings.on

    @property
    def dropped(self) -> int:
        """Traces that were not written: too many were waiting, or the file could not be written to."""
        return self._writer.dropped

    def sample(self, model: str, version: str, request_id: str) -> Trace | None:
        """A trace for an accepted request when it is its turn to be traced, else None."""
        if not self.active:
            return None
        settings = self._in_force.get(model) or self.settings(model)
        if not settings.on:
            return None
        seen = self._seen.get(model, 0) + 1
        if seen < settings.trace_rate:
            self._seen[model] = seen
            return None
        self._seen[model] = 0
        self._count_down(model, settings)
        head: dict[str, object] = {
            "id": next(self._ids),
            "model_name": model,
            "model_version": int(version) if version.isdecimal() else -1,
        }
        if request_id:
            head["request_id"] = request_id
        return Trace(head, settings, self._writer)

    def settings(self, model: str = "") -> TraceSettings:
        """What holds for a model now; without one, for those that have no settings of their own."""
        found = self._in_force.get(model)
        if found is None:
            changed = {**self._own.get("", {}), **self._own.get(model, {})}
            found = self._in_force[model] = msgspec.structs.replace(self._start, **changed)
        return found

    def change(self, given: Mapping[str, Sequence[str] | None], model: str = "") -> None:
        """Change a model's own settings, or without one the server's: all that are given, or none if one is wrong.

        None takes a setting back: a model's to the server's, the server's to what it was started with.

        Raises:
            InvalidRequest: there is no such setting, or the value is not one of its values.
            Unsupported: the setting cannot be changed by request.
        """
        own = dict(self._own.get(model, {}))
        for key, values in given.items():
            if key == "trace_mode" and (values is None or list(values) == [_MODE]):
                continue
            if values is None and key in _CHANGEABLE:
                own.pop(key, None)
            else:
                own[key] = parse_setting(key, values or ())
        if own.get("trace_level", OFF) != OFF and not self._start.trace_file:
            raise InvalidRequest("trace setting 'trace_level' needs a trace file: the server was started without one")
        self._own[model] = own
        if not own:
            del self._own[model]
        if model:
            self._seen.pop(model, None)
        else:
            self._seen.clear()
        self._refresh()

    def close(self) -> None:
        """Trace no more and write what was ended. Waits for the disk, a few seconds at most; not on the loop."""
        self._closed = True
        self.active = False
        self._writer.close(CLOSE_TIMEOUT_S)

    def _count_down(self, model: str, settings: TraceSettings) -> None:
        if settings.trace_count < 0:
            return
        owner = model if "trace_count" in self._own.get(model, {}) else ""
        self._own.setdefault(owner, {})["trace_count"] = settings.trace_count - 1
        self._refresh()

    def _refresh(self) -> None:
        self._in_force.clear()
        self.active = not self._closed and any(self.settings(model).on for model in ("", *self._own))

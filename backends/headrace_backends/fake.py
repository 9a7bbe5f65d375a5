"""A model that echoes its inputs, and is slow, fails, crashes or hangs when it is told to: for users' own tests.

What it does to every batch stands in the configuration's ``parameters``, what it does to one in those of a request:

    fake_delay_ms       wait so long before answering
    fake_row_delay_ms   wait so long more for each row of the batch
    fake_fail           fail as a broken model does, with this message
    fake_input_error    refuse the input, with this message
    fake_device_lost    fail as when the GPU is lost, with this message: the worker fails the batch and ends itself
    fake_crash          end the process: segfault, exit, kill or abort
    fake_hang           stop answering for so many seconds, or for ever (true)
    fake_bad_rows       give outputs of so many rows, or of one too many (true)
    fake_memory_mb      hold so much memory: while loaded if configured, for its batch if requested

and, in the configuration only: fake_load_delay_ms, fake_load_fail (message), fake_load_crash, and fake_cpu_threads: say
that a batch keeps so many CPU threads busy, and so take turns with other models that do.
"""

import ctypes
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from headrace.core.model import Signature, TensorSpec
from headrace.core.tensor import DataType
from headrace_backends.base import (
    DEFAULT_MAX_BATCH_SIZE,
    Array,
    Backend,
    DeviceLost,
    InputError,
    LoadError,
    ModelSource,
    RequestInfo,
)
from headrace_backends.parameters import refuse_unknown

_PREFIX = "fake_"
_LOAD_FAULTS = frozenset({"fake_load_delay_ms", "fake_load_fail", "fake_load_crash"})
_FAULTS = frozenset(
    {
        "fake_delay_ms",
        "fake_row_delay_ms",
        "fake_fail",
        "fake_input_error",
        "fake_device_lost",
        "fake_crash",
        "fake_hang",
        "fake_bad_rows",
        "fake_memory_mb",
    }
)
_LOAD_TRAITS = frozenset({"fake_cpu_threads"})
_EXIT_STATUS = 70


class FakeBackend(Backend):
    """Output i is input i. The same inputs and parameters always do the same."""

    wants_requests = True

    def __init__(self, source: ModelSource, signature: Signature) -> None:
        self._signature = signature
        self._faults = {key: value for key, value in source.parameters.items() if key in _FAULTS}
        self._names = [
            (given.name, made.name) for given, made in zip(signature.inputs, signature.outputs, strict=False)
        ]
        self._ballast = _ballast(self._faults.pop("fake_memory_mb", 0))
        self.cpu_threads = int(_number(source.parameters, "fake_cpu_threads"))

    @classmethod
    def load(cls, source: ModelSource) -> "FakeBackend":
        """Check the parameters, and do to the load what they ask for."""
        refuse_unknown("fake", source.parameters, sorted(_FAULTS | _LOAD_FAULTS | _LOAD_TRAITS))
        try:
            _check_values(source.parameters)
        except ValueError as error:
            raise LoadError(str(error)) from None
        signature = _signature(source)
        time.sleep(_number(source.parameters, "fake_load_delay_ms") / 1000)
        if source.parameters.get("fake_load_crash"):
            crash(str(source.parameters["fake_load_crash"]))
        if source.parameters.get("fake_load_fail"):
            raise LoadError(str(source.parameters["fake_load_fail"]))
        return cls(source, signature)

    @property
    def signature(self) -> Signature:
        """The configured tensors, or x FP32[-1, -1] to y."""
        return self._signature

    def execute(self, inputs: Mapping[str, Array], requests: Sequence[RequestInfo]) -> Mapping[str, Array]:
        """Echo, after what the configuration and the batch's requests ask for; one request's fault is the batch's."""
        faults = dict(self._faults)
        for request in requests:
            faults.update(self._faults_of(request))
        ballast = _ballast(faults.get("fake_memory_mb", 0))
        rows = max((len(array) for array in inputs.values() if array.ndim), default=0)
        time.sleep((_number(faults, "fake_delay_ms") + rows * _number(faults, "fake_row_delay_ms")) / 1000)
        self._misbehave(faults)
        outputs = {made: inputs[given] for given, made in self._names if given in inputs}
        del ballast
        wanted = faults.get("fake_bad_rows", False)
        if _is_false(wanted):
            return outputs
        return {
            name: np.resize(array, (len(array) + 1 if _is_true(wanted) else int(wanted), *array.shape[1:]))
            for name, array in outputs.items()
        }

    def close(self) -> None:
        """Give the ballast back."""
        self._ballast = None

    def _faults_of(self, request: RequestInfo) -> dict[str, Any]:
        asked = {key: value for key, value in request.parameters.items() if key.startswith(_PREFIX)}
        unknown = sorted(set(asked) - _FAULTS)
        if unknown:
            raise InputError(f"a request cannot ask for {', '.join(unknown)}, only for {', '.join(sorted(_FAULTS))}")
        try:
            _check_values(asked)
        except ValueError as error:
            raise InputError(str(error)) from None
        return asked

    def _misbehave(self, faults: Mapping[str, Any]) -> None:
        hang = faults.get("fake_hang", False)
        if _is_true(hang):
            while True:
                time.sleep(3600)
        if not _is_false(hang):
            time.sleep(float(hang))
        if faults.get("fake_crash"):
            crash(str(faults["fake_crash"]))
        if faults.get("fake_device_lost"):
            raise DeviceLost(str(faults["fake_device_lost"]))
        if faults.get("fake_input_error"):
            raise InputError(str(faults["fake_input_error"]))
        if faults.get("fake_fail"):
            raise RuntimeError(str(faults["fake_fail"]))


def _segfault() -> None:
    ctypes.string_at(0)


def _exit() -> None:
    os._exit(_EXIT_STATUS)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


_CRASHES: dict[str, Callable[[], None]] = {"segfault": _segfault, "exit": _exit, "kill": _kill, "abort": os.abort}


def crash(kind: str) -> NoReturn:
    """End this process the way ``kind`` says; nothing is cleaned up."""
    _CRASHES[kind]()
    raise AssertionError(f"the process outlived its {kind}")


def _ballast(megabytes: Any) -> Array | None:
    """Memory that is really there: every page is written."""
    size = int(float(megabytes) * (1 << 20))
    return np.ones(size, dtype=np.uint8) if size else None


def _number(faults: Mapping[str, Any], key: str) -> float:
    return float(faults.get(key, 0))


def _check_values(faults: Mapping[str, Any]) -> None:
    """Raise ValueError for the first value that its parameter cannot have. Numbers may come as text."""
    for key, value in faults.items():
        if key.endswith("crash"):
            if value not in _CRASHES:
                raise ValueError(f"{key} is {value!r}, expected one of {', '.join(_CRASHES)}")
        elif key.endswith(("_fail", "_error", "_lost")):
            if not isinstance(value, str):
                raise ValueError(f"{key} is {value!r}, expected the message")
        elif key in {"fake_hang", "fake_bad_rows"} and (_is_true(value) or _is_false(value)):
            continue
        elif not _is_amount(value, whole=key in {"fake_bad_rows", "fake_cpu_threads"}):
            raise ValueError(f"{key} is {value!r}, expected a number from 0")


def _is_true(value: Any) -> bool:
    return value is True or value == "true"  # the number 1 is an amount, though it equals True


def _is_false(value: Any) -> bool:
    return value is False or value == "false"


def _is_amount(value: Any, *, whole: bool) -> bool:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, bool) and 0 <= number < float("inf") and (not whole or number == int(number))


def _signature(source: ModelSource) -> Signature:
    inputs = source.inputs or (TensorSpec("x", DataType.FP32, (-1, -1)),)
    outputs = source.outputs or (TensorSpec("y", DataType.FP32, (-1, -1)),)
    if len(outputs) > len(inputs):
        raise LoadError(f"{len(outputs)} outputs are configured, expected no more than its {len(inputs)} inputs")
    for given, made in zip(inputs, outputs, strict=False):
        if given.datatype is not made.datatype:
            raise LoadError(f"output {made.describe()} cannot echo input {given.describe()}")
    size = source.max_batch_size
    if size is None:
        merges = all(spec.shape is not None and spec.shape[:1] == (-1,) for spec in (*inputs, *outputs))
        size = DEFAULT_MAX_BATCH_SIZE if merges else 0
    return Signature(inputs, outputs, size)

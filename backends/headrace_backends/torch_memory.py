"""What a PyTorch module keeps from one request to the next: seen in what it holds when it was asked made-up requests.

A module may write to what it holds, as long as a request finds no trace there of those before it. A counter that no
answer depends on is none; neither is a table that holds the same after every request, whatever was asked first.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import permutations
from operator import attrgetter
from typing import Any

import numpy as np
import torch

from headrace_backends.base import Array, DeviceLost
from headrace_backends.row_trial import same
from headrace_backends.torch_flow import BufferFlow
from headrace_backends.torchscript_attributes import changing

Inputs = Mapping[str, Array]
Run = Callable[[dict[str, Array]], Mapping[str, Array]]

_TOLERANCE = 1e-5  # of the largest value, between two answers to one request
_SMALL_BYTES = 1 << 20  # of a tensor that is copied to be compared


def kept(
    module: torch.nn.Module,
    run: Run,
    requests: Sequence[Inputs],
    fresh: Callable[[], Any],
    flow: Callable[[], BufferFlow] | None,
) -> list[str]:
    """The names of what the module keeps, as far as these requests show it: each of another size.

    ``run`` asks the module, which is left as it was. ``fresh`` reads it again, ``flow`` tells what its code says of
    what it writes to; neither is called where nothing is written.
    """
    holding = _Holding(module)
    marks = holding.marks()
    if not any(_takes(run, one) for one in requests) or not holding.written_since(marks):
        return []
    asked = [one for one in requests if _takes(run, _with_other_values(one)) and _takes(run, one)]
    unasked = _Holding(fresh())
    names = sorted({*holding.written_since(marks), *holding.unlike(unasked)})
    try:
        known = flow() if flow is not None else BufferFlow()
    except Exception:  # noqa: BLE001 - of what torch cannot follow nothing is known to be harmless
        known = BufferFlow()
    names = [name for name in names if name not in known.unread]
    fed = [] if known.unfed is None else [name for name in names if name not in known.unfed]
    if fed or not names or not asked:
        return fed or names
    start = unasked.contents(names)
    found = _traces(holding, start, run, asked)
    holding.put(start)
    return [name for name in names if name in found]


def answers_by_history(run: Run, requests: Sequence[Inputs], renew: Callable[[], None]) -> bool:
    """Whether a module that cannot be looked into answers a request by those before it, as far as these show it.

    ``renew`` has ``run`` ask one that was just read. Where answers differ and two such ones agree, it is not chance.
    """
    request = next((one for one in requests if _takes(run, one)), None)
    if request is None:
        return False
    first, again = (_copy(run(_copy(request))) for _ in range(2))
    _takes(run, _with_other_values(request))
    after = _copy(run(_copy(request)))
    if _all_alike(first, again) and _all_alike(first, after):
        return False
    begun = []
    for _ in range(2):
        renew()
        begun.append(_copy(run(_copy(request))))
    return _all_alike(*begun)


class _Holding:
    """The tensors and other attributes that a module could write to, by their names."""

    def __init__(self, module: torch.nn.Module) -> None:
        tensors = [name for name, _ in (*module.named_buffers(), *module.named_parameters())]
        scripted = changing(module) if isinstance(module, torch.jit.ScriptModule) else set()
        self._rebinds = isinstance(module, torch.jit.ScriptModule)
        self._places = {}
        for name in dict.fromkeys([*tensors, *sorted(scripted)]):
            path, _, attribute = name.rpartition(".")
            with suppress(AttributeError, RuntimeError):  # Python does not see all that TorchScript does
                owner = attrgetter(path)(module) if path else module
                getattr(owner, attribute)
                self._places[name] = (owner, attribute)

    def value(self, name: str) -> Any:
        """What is held by this name, itself."""
        return getattr(*self._places[name])

    def marks(self) -> dict[str, "_Mark"]:
        """What shows later whether something was written."""
        return {name: _Mark(self.value(name)) for name in self._places}

    def written_since(self, marks: Mapping[str, "_Mark"]) -> list[str]:
        """The names of what was written or replaced since then."""
        return [name for name in self._places if marks[name].differs(self.value(name))]

    def unlike(self, other: "_Holding") -> list[str]:
        """The names of what another of the same module holds otherwise."""
        return [name for name in self._places if not _equal(self.value(name), other.value(name))]

    def contents(self, names: Iterable[str]) -> dict[str, Any]:
        """Copies of what is held by these names."""
        return {name: _copied(self.value(name)) for name in names}

    def put(self, contents: Mapping[str, Any]) -> None:
        """Have the module hold copies of this."""
        for name, value in contents.items():
            owner, attribute = self._places[name]
            if self._rebinds:  # what it holds may be a view of what it was asked
                setattr(owner, attribute, _copied(value))
            else:
                with torch.inference_mode():
                    getattr(owner, attribute).copy_(value)


def _traces(holding: _Holding, start: Mapping[str, Any], run: Run, requests: Sequence[Inputs]) -> set[str]:
    """The names of what differs by what was asked, or by what was asked first; all of them where answers do."""

    def after(*history: Inputs) -> tuple[dict[str, Any], dict[str, Array]]:
        holding.put(start)
        answers: dict[str, Array] = {}
        for one in history:
            answers = _copy(run(_copy(one)))
        return holding.contents(start), answers

    found: set[str] = set()
    answered = []
    try:
        for one in requests:
            other = _with_other_values(one)
            left, answers = after(one)
            answered.append((one, answers))
            for history in ((other,), (one, other), (one, one)):
                found |= _differing(left, after(*history)[0])
        for (one, answers), (before, _) in permutations(answered, 2):
            if not _all_alike(answers, after(before, one)[1]):
                found |= set(start)
    except DeviceLost:
        raise
    except Exception:  # noqa: BLE001 - it took each of them before: what makes it refuse one is what it keeps
        found |= set(start)
    return found


def _all_alike(ones: Mapping[str, Array], others: Mapping[str, Array]) -> bool:
    pairs = [(one, others[name]) for name, one in ones.items()]
    return all(one.shape == other.shape and same(one, other, _TOLERANCE) for one, other in pairs)


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> set[str]:
    return {name for name, value in one.items() if not _equal(value, other[name])}


def _takes(run: Run, request: Inputs) -> bool:
    try:
        run(_copy(request))
    except DeviceLost:
        raise
    except Exception:  # noqa: BLE001 - a module may raise anything; real inputs decide where it does
        return False
    return True


def _copy(arrays: Inputs) -> dict[str, Array]:
    return {name: np.array(array) for name, array in arrays.items()}


def _with_other_values(request: Inputs) -> dict[str, Array]:
    """A request of the same sizes in which no number is the same. Those that are whole stay 0 and 1."""
    return {
        name: (1 - array.astype(np.int64) if array.dtype.kind in "biu" else 1.5 - 3 * array.astype(np.float32)).astype(
            array.dtype
        )
        for name, array in request.items()
    }


class _Mark:
    """What a value was. Tensors say how often they were written to, but not every operator counts (batch norm)."""

    def __init__(self, value: Any) -> None:
        tensor = isinstance(value, torch.Tensor)
        small = not tensor or (value.nbytes <= _SMALL_BYTES and not isinstance(value, torch.nn.Parameter))
        self._copy = _copied(value) if small else None
        self._tensor = value if tensor else None  # kept, so that no other gets its memory
        self._version = _version(value) if tensor else 0

    def differs(self, value: Any) -> bool:
        """Whether this is another value, or was written to."""
        if self._tensor is not None and isinstance(value, torch.Tensor):
            moved = value.data_ptr() != self._tensor.data_ptr() or value.shape != self._tensor.shape
            if moved or _version(value) != self._version:
                return True
            return self._copy is not None and not _equal(value, self._copy)
        return not _equal(value, self._copy)


def _version(tensor: torch.Tensor) -> int:
    """How often the tensor was written to; one that was made in inference mode does not tell."""
    return 0 if tensor.is_inference() else tensor._version  # noqa: SLF001 - no other way


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_copied, value))
    return value


def _equal(one: Any, other: Any) -> bool:
    """Whether two attributes hold the same, to the bit of numbers."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        if one.shape != other.shape or one.dtype is not other.dtype:
            return False
        return torch.equal(one, other) or bool(((one == other) | ((one != one) & (other != other))).all())  # noqa: PLR0124 - which is so of NaN
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)

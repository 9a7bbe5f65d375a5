"""How much of each GPU's memory models may have, and who holds what of it: a load is admitted or refused. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass

_MIB = 1 << 20


class NoGpuRoom(Exception):
    """There is not enough of a GPU's memory; the message says which, what was needed and what is free.

    ``soon``: there will be, once those have gone that are leaving.
    """

    def __init__(self, message: str, *, soon: bool) -> None:
        super().__init__(message)
        self.soon = soon


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU, or a part of one that is one for itself. One that has several names has one ``uuid``."""

    uuid: str
    name: str
    total_bytes: int


@dataclass(frozen=True, slots=True)
class GpuLimits:
    """What all models together may have of each GPU; 0 for no bound of that kind. The smaller one counts."""

    nbytes: int = 0
    fraction: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.nbytes or self.fraction)

    def of(self, gpu: Gpu) -> int:
        """The bytes of this one."""
        asked = [self.nbytes] if self.nbytes else []
        asked += [int(self.fraction * gpu.total_bytes)] if self.fraction else []
        return min([*asked, gpu.total_bytes])


@dataclass(frozen=True, slots=True)
class _Holding:
    model: str
    gpu: Gpu
    device: str
    nbytes: int


class GpuBudget:
    """Who holds what, by the instance's number. Sums never pass the limit, but by what ``settle`` refuses."""

    def __init__(self, limits: GpuLimits) -> None:
        self._limits = limits
        self._holdings: dict[int, _Holding] = {}
        self._leaving: set[int] = set()

    def admit(self, number: int, model: str, device: str, gpu: Gpu, needed_bytes: int) -> None:
        """Hold memory for an instance that is about to be loaded, until ``release``.

        ``device`` is what its configuration calls the GPU.

        Raises:
            NoGpuRoom: others hold too much, or it is more than all may have; nothing is held then.
        """
        holding = _Holding(model, gpu, device, needed_bytes)
        self._check(number, holding, "needs about")
        self._holdings[number] = holding

    def settle(self, number: int, measured_bytes: int) -> None:
        """It is loaded, and takes this much: what it holds from now on.

        Raises:
            NoGpuRoom: more than there is room for; it holds what it did.
        """
        held = self._holdings[number]
        measured = _Holding(held.model, held.gpu, held.device, measured_bytes)
        self._check(number, measured, "takes")
        self._holdings[number] = measured

    def leaves(self, number: int) -> None:
        """It is on its way off its GPU, if it is there."""
        if number in self._holdings:
            self._leaving.add(number)

    def release(self, number: int) -> None:
        """It is not on its GPU any more, if it ever was."""
        self._holdings.pop(number, None)
        self._leaving.discard(number)

    def held_bytes(self, uuid: str) -> int:
        """What all instances hold of a GPU."""
        return sum(one.nbytes for one in self._holdings.values() if one.gpu.uuid == uuid)

    def _check(self, number: int, wanted: _Holding, verb: str) -> None:
        gpu = wanted.gpu
        limit_bytes = self._limits.of(gpu)
        others: dict[str, int] = {}
        leaving_bytes = 0
        for key, one in self._holdings.items():
            if key != number and one.gpu.uuid == gpu.uuid:
                others[one.model] = others.get(one.model, 0) + one.nbytes
                leaving_bytes += one.nbytes if key in self._leaving else 0
        free_bytes = limit_bytes - sum(others.values())
        if wanted.nbytes > free_bytes:
            raise NoGpuRoom(
                f"model '{wanted.model}' {verb} {_mib(wanted.nbytes)} of the memory of {wanted.device} ({gpu.name}), "
                f"and {_mib(max(0, free_bytes))} are free: models may have {_mib(limit_bytes)} of its "
                f"{_mib(gpu.total_bytes)} (--gpu-memory-bytes, --gpu-memory-fraction), {_told(others)}",
                soon=wanted.nbytes <= free_bytes + leaving_bytes,
            )


def _told(others: Mapping[str, int]) -> str:
    """Who has the rest: the largest first, and of many only some."""
    largest = sorted(others.items(), key=lambda one: (-one[1], one[0]))
    if not largest:
        return "and nobody else has any"
    shown = ", ".join(f"'{model}' has {_mib(nbytes)}" for model, nbytes in largest[:3])
    return shown + (f", {len(largest) - 3} more the rest" if len(largest) > 3 else "")


def _mib(nbytes: int) -> str:
    return f"{-(-nbytes // _MIB)} MiB"

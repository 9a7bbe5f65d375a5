"""Which worker process an instance goes to: a pure function."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from headrace.core.device import CPU
from headrace.workers.resources import Resource


@dataclass(frozen=True, slots=True)
class Hosting:
    """A worker process as placement sees it."""

    name: str
    shared: bool
    instances: int
    device: str = CPU  # of all its instances
    active: bool = False  # whether a model of it was used just now, or is being loaded
    used_at_ns: int = 0  # when one was used last


@dataclass(frozen=True, slots=True)
class Needs:
    """What placement has to know of an instance. One that ``pages`` comes and goes with its requests.

    ``again``: it was loaded before, and a request waits for it to come in. ``resources`` are what it needs for as long
    as it runs a batch, ``priority`` is its own among those that need the same.
    """

    file_bytes: int
    shareable: bool
    device: str = CPU
    gpu_bytes: int = 0  # that it is expected to take of the device's memory, if that is a GPU
    pages: bool = False
    again: bool = False
    resources: Mapping[Resource, int] = field(default_factory=dict)
    priority: int = 1


@dataclass(frozen=True, slots=True)
class PlacementLimits:
    """How many processes of either sort there may be before instances have to share."""

    own: int  # instances with a process of their own; further ones that can share, do
    shared: int  # processes that are shared
    shareable_bytes: int = 64 * 1024 * 1024  # a model file above this is worth a process


@dataclass(frozen=True, slots=True)
class NewProcess:
    """Start another worker process for it."""

    shared: bool


def place(needs: Needs, processes: Sequence[Hosting], limits: PlacementLimits) -> str | NewProcess:
    """The name of the process to use, or the wish for a new one.

    While they are few, every instance has a process to itself: a crash or a hang touches nobody else. Past
    the cap small models that can share do, in as many processes as the limits say, the emptiest first.

    Small models that come and go share from the first: a process of its own takes more memory than one of them, and
    longer to start. Loading holds up the neighbours, so what comes in goes where nobody is at work.

    Only models of one device share: a GPU that is lost takes nobody with it who does not use it, and a process may see
    no other GPU than its own.
    """
    own = sum(1 for process in processes if not process.shared)
    if not needs.shareable or needs.file_bytes > limits.shareable_bytes or (own < limits.own and not needs.pages):
        return NewProcess(shared=False)
    shared = [process for process in processes if process.shared and process.device == needs.device]
    if needs.again:
        quiet = [process for process in shared if not process.active]
        if quiet:
            return min(quiet, key=lambda process: (process.instances, process.name)).name
        if len(shared) >= limits.shared:
            return min(shared, key=lambda process: (process.used_at_ns, process.name)).name
    if len(shared) < limits.shared:
        return NewProcess(shared=True)
    return min(shared, key=lambda process: (process.instances, process.name)).name

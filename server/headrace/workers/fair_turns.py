"""Which heavy batch runs next: that of the model which has used the CPUs least. Pure: times are handed in."""

from headrace.workers.virtual_time import VirtualTime


class Turn:
    """A wish for CPU threads of one of a model's instances, and then the threads themselves."""

    __slots__ = ("granted", "granted_ns", "model", "threads", "weight")

    def __init__(self, model: str, threads: int, weight: float = 1.0) -> None:
        self.model = model
        self.threads = threads
        self.weight = weight
        self.granted = 0  # threads; fewer than it wants where there are no more
        self.granted_ns = -1  # not yet


class FairTurns:
    """Lends out ``cpus`` threads. ``grants`` says whose turn has come, after each ``ask``, ``withdraw`` and ``end``.

    Models are served in the order of the thread time that they have used, divided by their weights: one with long
    batches or many instances gets no more than one with short ones and a single instance. Within a model it is first
    come first served. Whoever is next and needs more threads than are free keeps those that are; one that wants more
    than there are is given all.
    """

    def __init__(self, cpus: int) -> None:
        self._cpus = cpus
        self._free = cpus
        self._waiting: dict[Turn, None] = {}  # in the order in which they came
        self._used = VirtualTime()

    @property
    def free(self) -> int:
        """Threads that nobody has; less than none while more are lent out than there are now."""
        return self._free

    def resize(self, cpus: int) -> None:
        """There are so many now; what was granted stays granted."""
        self._free += cpus - self._cpus
        self._cpus = cpus

    def ask(self, turn: Turn) -> None:
        """Somebody wants a turn."""
        self._used.join(turn.model)
        self._waiting[turn] = None

    def withdraw(self, turn: Turn) -> None:
        """A turn that was not granted is not wanted any more."""
        del self._waiting[turn]
        self._used.leave(turn.model)

    def end(self, turn: Turn, now_ns: int) -> None:
        """A turn that was granted is over."""
        self._free += turn.granted
        self._used.charge(turn.model, turn.granted * (now_ns - turn.granted_ns) / turn.weight)
        self._used.leave(turn.model)

    def grants(self, now_ns: int) -> list[Turn]:
        """Those whose turn has come now."""
        granted = []
        while self._waiting:
            turn = min(self._waiting, key=lambda one: self._used.had(one.model))
            threads = min(turn.threads, self._cpus)
            if threads > self._free:
                break
            del self._waiting[turn]
            turn.granted = threads
            self._free -= threads
            turn.granted_ns = now_ns
            granted.append(turn)
        return granted

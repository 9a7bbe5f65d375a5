"""What a worker was asked and has not answered: what it is at, what lies behind that, and since when."""

from collections.abc import Callable, Iterable
from time import monotonic

from headrace.workers.instance import Batch, Instance
from headrace.workers.loads import Loading


class Unanswered:
    """Batches and loads of one worker, oldest first, until it is dead.

    It answers them strictly in that order, so the oldest is what it is at. Batches are known by their numbers, from 1,
    loads by ``load_key``. ``begun`` are decoupled requests that are being answered part by part, by their numbers.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self.begun: dict[int, Batch] = {}
        self.heard_at = 0.0  # when the worker said anything last
        self._asked: dict[int, Batch | Loading] = {}
        self._head_since = 0.0
        self._clock = clock

    @property
    def head(self) -> Batch | Loading | None:
        """What the worker is at: the oldest thing that it was asked and has not answered."""
        return next(iter(self._asked.values()), None)

    def add(self, key: int, what: Batch | Loading) -> None:
        """The worker was asked this."""
        if not self._asked:
            self._head_since = self._clock()
        self._asked[key] = what

    def answered(self, key: int) -> Batch | Loading:
        """It has answered that, and is at the next."""
        self._head_since = self._clock()
        return self._asked.pop(key)

    def clear(self) -> list[Batch | Loading]:
        """The worker is dead: what it was asked, oldest first. What was begun its instances know."""
        unanswered = list(self._asked.values())
        self._asked.clear()
        self.begun.clear()
        return unanswered

    def batches_of(self, instance: int, sequence: int) -> list[Batch]:
        """The batch or stream of that number that the worker is at; with 0, all of the instance's."""
        if sequence:
            found = [self._asked.get(sequence) or self.begun.get(sequence)]
        else:
            found = [*self._asked.values(), *self.begun.values()]
        batches = [one for one in found if isinstance(one, Batch)]
        return batches if sequence else [one for one in batches if one.instance.load.instance == instance]

    def overdue(self, now: float, load_timeout_s: float) -> str:
        """What takes longer than it may, in words; empty where nothing does."""
        head = self.head
        if head is None:
            return ""
        is_batch = isinstance(head, Batch)
        limit_s = head.instance.execution_timeout_s if is_batch else load_timeout_s
        if not limit_s or now - self._head_since <= limit_s:
            return ""
        what = "a batch of" if is_batch else "loading"
        return f"{what} model '{head.instance.load.name}' took longer than {limit_s:g} s"

    def silent(self, now: float, hosted: Iterable[Instance]) -> str:
        """Which of these models owes a response and gives none, in words; empty where none does."""
        for instance in hosted:
            limit_s = instance.execution_timeout_s
            since = max(self.heard_at, instance.streams.awaited_since)
            if limit_s and instance.streams.awaited and now - since > limit_s:
                return f"model '{instance.load.name}' gave no response for {limit_s:g} s"
        return ""


def load_key(instance: int) -> int:
    """By what the load of an instance is known, beside the numbers of batches."""
    return -1 - instance

"""The loads that a worker process owes, over all its lives: who waits for each, and when it is tried no more."""

import asyncio
from collections.abc import Iterable, Iterator

from headrace.workers.instance import Instance

LOAD_ATTEMPTS = 3  # a load during which the process died is tried again: somebody else may have killed it
GIVE_UP_AFTER_S = 15.0  # for so long starts must fail, three times at least, before waiting requests are told
_GIVE_UP_FAILURES = 3


class LoadRefused(Exception):
    """The model could not be loaded; the message is for the model's owner."""


class Loading:
    """A Load that was sent, or will be when the process is there, and who waits for its answer."""

    __slots__ = ("deaths", "future", "instance")

    def __init__(self, instance: Instance, future: asyncio.Future[None] | None) -> None:
        self.instance = instance
        self.future = future  # None when an instance that was up before is loaded again
        self.deaths = 0

    def succeed(self) -> None:
        """Tell whoever waits that the instance is up."""
        if self.future is not None and not self.future.done():
            self.future.set_result(None)

    def refuse(self, reason: str) -> None:
        """Tell whoever waits for a first load that there will be none; what was up before goes on waiting."""
        if self.future is not None and not self.future.done():
            self.future.set_exception(LoadRefused(reason))


class Loads:
    """Those that are not answered yet, in the order in which they are sent. Times are handed in.

    ``failures`` are starts of the process in a row that never got ready.
    """

    def __init__(self) -> None:
        self.failures = 0
        self._failing_since = 0.0
        self._loading: dict[int, Loading] = {}  # by instance; sent or still to be sent

    def __len__(self) -> int:
        return len(self._loading)

    def __iter__(self) -> Iterator[Loading]:
        return iter(list(self._loading.values()))

    def __contains__(self, instance: Instance) -> bool:
        return instance.load.instance in self._loading

    def add(self, instance: Instance, future: asyncio.Future[None] | None = None) -> Loading:
        """One more; ``future`` is resolved by its answer."""
        loading = self._loading[instance.load.instance] = Loading(instance, future)
        return loading

    def drop(self, instance: Instance) -> None:
        """It is wanted no more."""
        self._loading.pop(instance.load.instance, None)

    def answered(self, number: int) -> Loading | None:
        """The process has answered for that instance, so it got ready; None where nobody wants it any more."""
        self.failures = 0
        return self._loading.pop(number, None)

    def refuse_all(self, reason: str) -> None:
        """There is no process: whoever waits for a first load is told, everybody else goes on waiting."""
        for loading in self:
            loading.refuse(reason)

    def start_failed(self, now: float) -> None:
        """The process was not there at all, or ended before it was ready."""
        if not self.failures:
            self._failing_since = now
        self.failures += 1

    def died(self, loading: Loading, cause: str, now: float, *, timed_out: bool) -> str:
        """The process died, of ``cause``, at this load; with ``timed_out`` because that took too long.

        Returns why requests for what it hosts are to wait no longer, empty while they may.
        """
        self.start_failed(now)
        reason = f"the worker died while it loaded the model: {cause}"
        loading.deaths += 1
        if loading.future is not None:
            # A load that takes too long will do so again; one that was killed may have been in the way of another.
            if (loading.deaths >= LOAD_ATTEMPTS or timed_out) and not loading.future.done():
                loading.refuse(reason)
                self.drop(loading.instance)
        elif self.failures >= _GIVE_UP_FAILURES and now - self._failing_since > GIVE_UP_AFTER_S:
            return f"{reason}, {self.failures} times in a row; it goes on trying"
        return ""

    def bring_back(self, hosted: Iterable[Instance]) -> None:
        """The process is to be started again: load all that it hosted, what is waited for most first."""
        for instance in hosted:
            if instance not in self:
                self.add(instance)
        self._loading = dict(sorted(self._loading.items(), key=lambda item: -item[1].instance.waiting))

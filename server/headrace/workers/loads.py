"""The loads that a worker process owes, over all its lives: who waits for each, and when it is tried no more."""

import asyncio
from collections.abc import Iterable, Iterator

from headrace.workers.instance import Instance

LOAD_ATTEMPTS = 3  # a load during which the process died is tried again: somebody else may have killed it
GIVE_UP_AFTER_S = 15.0  # for so long starts must fail, three times at least, before waiting requests are told
_GIVE_UP_FAILURES = 3
PUT_OFF_S = 30.0  # a load that keeps killing the process lets the others be so long; each further time twice as long
LONGEST_PUT_OFF_S = 600.0


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
        self._put_off: set[int] = set()  # instances that are not brought back with the others
        self._pauses_s: dict[int, float] = {}  # how long each of those that were put off is the next time

    def __len__(self) -> int:
        return len(self._loading)

    def __iter__(self) -> Iterator[Loading]:
        return iter(list(self._loading.values()))

    def __contains__(self, instance: Instance) -> bool:
        return instance.load.instance in self._loading

    def add(self, instance: Instance, future: asyncio.Future[None] | None = None) -> Loading:
        """One more; ``future`` is resolved by its answer."""
        number = instance.load.instance
        loading = self._loading[number] = Loading(instance, future)
        if number in self._pauses_s:  # its chances are used up
            loading.deaths = LOAD_ATTEMPTS - 1
        self._put_off.discard(number)
        return loading

    def drop(self, instance: Instance) -> None:
        """It is wanted no more."""
        self._loading.pop(instance.load.instance, None)
        self._pauses_s.pop(instance.load.instance, None)
        self._put_off.discard(instance.load.instance)

    def leave_out(self, instance: Instance) -> None:
        """It is not to come back with the others, but when it is added again."""
        self._put_off.add(instance.load.instance)

    def answered(self, number: int) -> Loading | None:
        """The process has answered for that instance, so it got ready; None where nobody wants it any more."""
        self.failures = 0
        self._pauses_s.pop(number, None)
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

    def is_hopeless(self, now: float) -> bool:
        """Whether starts have failed so often and for so long that nobody is to wait for the next."""
        return self.failures >= _GIVE_UP_FAILURES and now - self._failing_since > GIVE_UP_AFTER_S

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
        elif self.is_hopeless(now):
            return f"{reason}, {self.failures} times in a row; it goes on trying"
        return ""

    def put_off(self, loading: Loading, *, timed_out: bool) -> float:
        """What was up before and has been the death of the process again and again lets the others be for a while.

        Returns for how many seconds it is to be left out then, 0 where it is tried again together with them.
        """
        number = loading.instance.load.instance
        wanted = self._loading.get(number) is loading
        if not wanted or loading.future is not None or not (loading.deaths >= LOAD_ATTEMPTS or timed_out):
            return 0.0
        pause_s = self._pauses_s.get(number, PUT_OFF_S)
        self._pauses_s[number] = min(2 * pause_s, LONGEST_PUT_OFF_S)
        self._put_off.add(number)
        del self._loading[number]
        return pause_s

    def bring_back(self, hosted: Iterable[Instance]) -> None:
        """The process is to be started again: load all that it hosted, what is waited for most first.

        What it has died of goes behind all others, which it would keep from coming back otherwise.
        """
        for instance in hosted:
            if instance not in self and instance.load.instance not in self._put_off:
                self.add(instance)
        self._loading = dict(sorted(self._loading.items(), key=lambda it: (it[1].deaths, -it[1].instance.waiting)))

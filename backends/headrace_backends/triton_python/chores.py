"""A thread for what cannot be done where it is found to be due: in a destructor, or on an event loop."""

import logging
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread

log = logging.getLogger("headrace.worker")

_CLOSE_TIMEOUT_S = 5.0


class Chores:
    """Small things to do soon, one after the other."""

    def __init__(self) -> None:
        # A SimpleQueue, because its put() may be called from a destructor in the middle of another put().
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = Thread(target=self._run, name="model chores", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def add(self, chore: Callable[[], None]) -> None:
        """Have something done. Never waits, and takes no lock."""
        self._queue.put(chore)

    def close(self) -> None:
        """End when what was added is done; a chore that takes seconds is left to the process."""
        self._queue.put(None)
        self._thread.join(_CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        while (chore := self._queue.get()) is not None:
            try:
                chore()
            except Exception:
                log.exception("a model's chore failed")

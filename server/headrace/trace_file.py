"""The files of traces: a thread of its own writes them, and each is a whole JSON array at any time."""

import logging
import os
import threading
from collections import deque
from contextlib import suppress
from itertools import count
from time import monotonic
from typing import Protocol

log = logging.getLogger(__name__)

MAX_WAITING_TRACES = 1024
MAX_WAITING_BYTES = 64 * 1024 * 1024
TELL_EVERY_S = 10.0  # of traces that could not be kept


class Written(Protocol):
    """What the writer needs of a trace that has ended."""

    log_frequency: int  # how many traces go to each numbered file; 0 for the one file without a number
    nbytes: int  # of memory that it holds while it waits

    def render(self) -> bytes:
        """Its objects in JSON, between commas. Called once, by the thread that writes."""


class TraceWriter:
    """One thread that writes traces, started with the first of them. Nobody ever waits for it but ``close``."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._changed = threading.Condition()
        self._waiting: deque[Written] = deque()
        self._waiting_bytes = 0
        self._closing = False
        self._thread: threading.Thread | None = None
        self._plain: ArrayFile | None = None
        self._numbered: ArrayFile | None = None
        self._number = count()
        self._trouble = ""
        self.dropped = 0

    def put(self, trace: Written) -> None:
        """Take a trace to be written; it is dropped when too much is waiting already."""
        with self._changed:
            full = len(self._waiting) >= MAX_WAITING_TRACES or self._waiting_bytes + trace.nbytes > MAX_WAITING_BYTES
            if full or self._closing:
                self.dropped += 1
                return
            self._waiting.append(trace)
            self._waiting_bytes += trace.nbytes
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="traces", daemon=True)
                self._thread.start()
            self._changed.notify()

    def close(self, timeout_s: float) -> None:
        """Write what waits and end the thread."""
        with self._changed:
            self._closing = True
            thread = self._thread
            self._changed.notify()
        if thread is not None:
            thread.join(timeout_s)
            if thread.is_alive():
                log.error("traces: %s could not be finished within %s s", self._path, timeout_s)

    def _run(self) -> None:
        told, told_at = 0, -TELL_EVERY_S
        closing = False
        while not closing:
            with self._changed:
                if not self._waiting and not self._closing:
                    self._changed.wait(TELL_EVERY_S if self.dropped > told else None)
                traces = list(self._waiting)
                self._waiting.clear()
                self._waiting_bytes = 0
                closing = self._closing and not traces
            for trace in traces:
                self._write(trace)
            if self.dropped > told and (closing or monotonic() - told_at >= TELL_EVERY_S):
                why = self._trouble or "they came faster than they could be written"
                log.warning("traces: %d of %s were dropped: %s", self.dropped - told, self._path, why)
                told, told_at, self._trouble = self.dropped, monotonic(), ""
        for file in (self._plain, self._numbered):
            if file is not None:
                file.close()

    def _write(self, trace: Written) -> None:
        try:
            self._file(trace.log_frequency).append(trace.render())
        except Exception as error:
            self._trouble = str(error)
            with self._changed:
                self.dropped += 1
            if not isinstance(error, OSError):
                log.exception("traces: one could not be written")  # a bug, but no reason to lose the others too
        if self._numbered is not None and 0 < trace.log_frequency <= self._numbered.traces:
            self._numbered.close()
            self._numbered = None

    def _file(self, log_frequency: int) -> "ArrayFile":
        if not log_frequency:
            self._plain = self._plain or ArrayFile(self._path)
            return self._plain
        if self._numbered is None:
            self._numbered = ArrayFile(f"{self._path}.{next(self._number)}")
        return self._numbered


class ArrayFile:
    """A file that holds a JSON array, whole after each ``append``: the bracket at its end is written over."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        self._end = 0  # where the closing bracket is
        self.traces = 0

    def append(self, objects: bytes) -> None:
        """Add objects. When that fails, the file is left as it was.

        Raises:
            OSError: it cannot be written to.
        """
        data = (b",\n" if self.traces else b"[") + objects
        try:
            _write_at(self._descriptor, data + b"]\n", self._end)
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._descriptor, self._end)
                _write_at(self._descriptor, b"]\n" if self.traces else b"[]\n", self._end)
            raise
        self._end += len(data)
        self.traces += 1

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._descriptor)


def _write_at(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view = view[written:]
        offset += written

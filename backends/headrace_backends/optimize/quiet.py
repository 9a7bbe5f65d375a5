"""What libraries print while they work: caught, so that a report is not drowned in it."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout


@contextmanager
def hushed() -> Iterator[list[str]]:
    """Nothing that Python code prints, logs or warns of gets out; the list has the warnings once it is over.

    For processes of one thread, as those are in which steps are taken: output is the whole process's.
    """
    told: list[str] = []
    handler = _Listener(told)
    root = logging.getLogger()
    before, root.handlers = root.handlers, [handler]
    nothing = io.StringIO()
    try:
        with warnings.catch_warnings(record=True) as caught, redirect_stdout(nothing), redirect_stderr(nothing):
            warnings.simplefilter("always")
            yield told
        told += [" ".join(str(one.message).split()) for one in caught]
    finally:
        root.handlers = before


class _Listener(logging.Handler):
    def __init__(self, told: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._told = told

    def emit(self, record: logging.LogRecord) -> None:
        self._told.append(" ".join(record.getMessage().split()))

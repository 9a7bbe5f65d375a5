"""Who is told how a search goes on."""

from typing import Protocol

from headrace_backends.optimize.accuracy import Budget
from headrace_backends.optimize.findings import Row
from headrace_backends.optimize.form import Form


class Listener(Protocol):
    """Told of everything in order, by the thread that searches. May raise nothing.

    The reference's row and progress about it come before ``begin``, and a row need not have been announced by
    ``trying``; a later row of the same form takes the place of the one before.
    """

    def about(self, model: str, budget: Budget | None, time_limit_s: float | None) -> None:
        """What the search is for; if at all, it is told before everything else."""

    def begin(self, total: int | None) -> None:
        """The search begins; so many candidates are known now, and more may come."""

    def trying(self, form: Form, position: int, total: int) -> None:
        """This candidate is next."""

    def progress(self, text: str, share: float | None = None) -> None:
        """What is being done, and how much of it is over."""

    def row(self, row: Row) -> None:
        """A candidate is finished."""

    def chosen(self, form: Form, why: str) -> None:
        """The search has decided."""

    def end(self) -> None:
        """It is over, also when it failed."""


class SilentListener:
    """Tells nobody."""

    def about(self, model: str, budget: Budget | None, time_limit_s: float | None) -> None:
        """Nothing."""

    def begin(self, total: int | None) -> None:
        """Nothing."""

    def trying(self, form: Form, position: int, total: int) -> None:
        """Nothing."""

    def progress(self, text: str, share: float | None = None) -> None:
        """Nothing."""

    def row(self, row: Row) -> None:
        """Nothing."""

    def chosen(self, form: Form, why: str) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""

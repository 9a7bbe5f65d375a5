"""The live table of ``headrace optimize`` on a terminal: the best rows, the present candidate, the time left."""

from collections.abc import Callable
from time import monotonic
from typing import Literal, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from headrace_backends.optimize import figures, reading
from headrace_backends.optimize.accuracy import Budget
from headrace_backends.optimize.board import Board
from headrace_backends.optimize.findings import Fate, Row
from headrace_backends.optimize.form import Form
from headrace_backends.optimize.listener import Listener
from headrace_backends.optimize.plain_lines import PlainLines

_STYLES = {
    Fate.CHOSEN: "bold green",
    Fate.KEPT: "green",
    Fate.REFUSED: "red",
    Fate.SLOWER: "dim",
    Fate.FAILED: "yellow",
    Fate.SKIPPED: "dim",
}
_MOST_ROWS = 16
_FEWEST_ROWS = 3
_OTHER_LINES = 9  # of the picture, besides the rows
_COLUMNS = ((110, 9), (72, 7), (0, 4))  # from a terminal of so many characters on, so many columns of the table
_BAR_WIDTH = 40


class LiveTable:
    """A listener that keeps one picture on the terminal up to date until ``end``, and leaves the last one there.

    A thread of rich's refreshes it four times a second, from the first call on.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = monotonic) -> None:
        self._console = console
        self._clock = clock
        self._board = Board()
        self._live = Live(console=console, get_renderable=self.picture, refresh_per_second=4, transient=False)

    def about(self, model: str, budget: Budget | None, time_limit_s: float | None) -> None:
        """The picture's head."""
        self._board.model, self._board.budget, self._board.limit_s = model, budget, time_limit_s
        self._hear()

    def begin(self, total: int | None) -> None:
        """How many candidates there are."""
        self._board.total = total
        self._hear()

    def trying(self, form: Form, position: int, total: int) -> None:
        """The line of the present candidate changes."""
        self._board.trying(form, position, total, self._clock())
        self._hear()

    def progress(self, text: str, share: float | None = None) -> None:
        """The bar moves at the next refresh."""
        self._board.progress(text, share, self._clock())
        self._hear()

    def row(self, row: Row) -> None:
        """The table has a row more."""
        self._board.row(row)
        self._hear()

    def chosen(self, form: Form, why: str) -> None:
        """The picture ends with the choice."""
        self._board.choose(form, why)
        self._hear()

    def end(self) -> None:
        """The picture stays as it is, and the terminal is the caller's again."""
        self._board.present, self._board.text = None, ""
        self._live.stop()

    def _hear(self) -> None:
        self._board.hear(self._clock())
        if not self._live.is_started:
            self._live.start()

    def picture(self) -> RenderableType:
        """What the terminal shows now. Called by the thread that refreshes it too."""
        now_s = self._clock()
        parts: list[RenderableType] = [self._head(now_s), self._table()]
        present = self._present(now_s)
        if present is not None:
            parts.append(present)
        if self._board.why:
            parts.append(Text(self._board.why, style="green"))
        return Group(*parts)

    def _head(self, now_s: float) -> Text:
        board = self._board
        left_s = board.left_s(now_s)
        left = "" if left_s is None else f", {figures.duration(left_s)} left of {figures.duration(board.limit_s)}"
        told = [(board.model, "bold")] if board.model else []
        told += [(str(board.budget), "")] if board.budget is not None else []
        told.append((f"{figures.duration(board.elapsed_s(now_s))}{left}", "cyan"))
        return Text("  ", no_wrap=True, overflow="ellipsis", end="").join(Text(*one) for one in told)

    def _table(self) -> Table:
        budget = self._board.budget
        columns: dict[str, Callable[[int, Row], str]] = {
            "": _number,
            "form": lambda _, row: reading.title(row.form),
            "fate": _fate,
            "speed-up": lambda _, row: figures.times(row.speedup),
            "p50 ms": _latency,
            "rows/s": _throughput,
            "max_rel" if budget is None else budget.metric: lambda _, row: figures.error(
                reading.decided_by(row, budget)
            ),
            "size": lambda _, row: figures.size(row.file_bytes),
            "reason": lambda _, row: " ".join(row.reason.split()),
        }
        shown = list(columns.items())[: next(count for width, count in _COLUMNS if self._console.width >= width)]
        table = Table(box=SIMPLE_HEAD, expand=True, pad_edge=False)
        for name, _ in shown:
            ratio = {"form": 3, "reason": 2}.get(name)
            justify: Literal["left", "right"] = "left" if ratio or name == "fate" else "right"
            most = None if ratio else 14
            table.add_column(
                Text(name), justify=justify, ratio=ratio, max_width=most, no_wrap=True, overflow="ellipsis"
            )
        room = max(_FEWEST_ROWS, min(_MOST_ROWS, self._console.height - _OTHER_LINES))
        for number, row in self._board.best(room):
            # Texts, never markup: names may hold brackets.
            table.add_row(*(Text(tell(number, row)) for _, tell in shown), style=_STYLES[row.fate])
        hidden = len(self._board.rows) - room
        if hidden > 0:
            table.caption = f"and {hidden} more"
        return table

    def _present(self, now_s: float) -> RenderableType | None:
        """What is being done now; None where nothing was told."""
        board = self._board
        if board.present is None and not board.text:
            return None
        parts: list[RenderableType] = []
        if board.present is not None:
            of = f" of {board.total}" if board.total is not None else ""
            what = (f"candidate {board.position}{of}  ", "bold")
            parts.append(Text.assemble(what, reading.title(board.present), no_wrap=True, overflow="ellipsis"))
        pulses = board.share is None
        since = figures.duration(max(0.0, now_s - board.present_began_s))
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            ProgressBar(1.0, board.share or 0.0, width=_BAR_WIDTH, pulse=pulses, animation_time=now_s),
            Text("" if pulses else f"{board.share:.0%}"),
            Text(f"{board.text or 'making and measuring it'}, {since}", no_wrap=True, overflow="ellipsis"),
        )
        return Group(*parts, bar)


def _number(number: int, _: Row) -> str:
    return str(number)


def _fate(number: int, row: Row) -> str:
    return "reference" if not number and row.fate is not Fate.CHOSEN else str(row.fate)


def _latency(_: int, row: Row) -> str:
    point = reading.smallest(row)
    return figures.number(point.p50_ms if point else None)


def _throughput(_: int, row: Row) -> str:
    point = reading.fullest(row)
    return figures.number(point.rows_per_s if point else None)


def listener_for(stream: TextIO, *, background: bool = False) -> Listener:
    """The live table where ``stream`` is a terminal that can show one, else plain lines; in the background always."""
    console = Console(file=stream)
    if console.is_terminal and not console.is_dumb_terminal and not background:
        return LiveTable(console)
    return PlainLines(lambda text: print(text, file=stream, flush=True))

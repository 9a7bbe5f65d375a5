import io

import msgspec
import pytest
from rich.console import Console
from unit.made_findings import BUDGET, HOSTILE, INT8, REFERENCE, findings, hostile, many_rows, row

from headrace_backends.optimize.board import Board
from headrace_backends.optimize.findings import Fate
from headrace_backends.optimize.form import Form
from headrace_backends.optimize.listener import SilentListener
from headrace_backends.optimize.live import LiveTable, listener_for
from headrace_backends.optimize.plain_lines import PlainLines

TORCH = Form("torch")


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def told_everything(listener, rows, budget=BUDGET):
    """What a search tells, in its order: the reference comes before ``begin``, and not every row is announced."""
    found = findings(0)
    listener.about(found.model, budget, 600.0)
    listener.progress("loading the model as it was dropped in")
    listener.row(found.reference)
    listener.begin(len(rows))
    for position, one in enumerate(rows, 1):
        if position % 3:
            listener.trying(one.form, position, len(rows))
            listener.progress("calibrating", position / (len(rows) + 1))
        listener.row(one)
    listener.progress("judging on the held-back examples")
    listener.chosen(INT8, "4.31 times as fast")
    listener.end()


def shown(table, console):
    """The picture alone, and not what the refreshing thread draws besides."""
    paper = io.StringIO()
    Console(file=paper, width=console.width, height=console.height, color_system=None).print(table.picture())
    return paper.getvalue()


def live(width=140, height=40):
    console = Console(file=Terminal(), width=width, height=height, color_system=None, force_terminal=True)
    clock = Clock()
    return LiveTable(console, clock), console, clock


def test_a_board_keeps_the_last_row_of_a_form_and_ranks_what_may_be_served_first():
    board = Board()
    board.row(row(REFERENCE, Fate.KEPT, 1.0, 1.0))
    board.row(row(TORCH, Fate.REFUSED, 9.0, 0.5))
    board.row(row(INT8, Fate.KEPT, 3.0, 0.99))
    board.row(row(Form("openvino"), Fate.SLOWER, 0.5))
    assert [number for number, _ in board.best(9)] == [2, 0, 1, 3]
    board.row(row(TORCH, Fate.KEPT, 4.0, 0.99))
    assert [(number, one.fate) for number, one in board.best(2)] == [(1, Fate.KEPT), (2, Fate.KEPT)]
    assert len(board.rows) == 4


def test_a_board_finds_the_chosen_form_in_another_layout():
    board = Board()
    board.row(row(REFERENCE, Fate.KEPT, 1.0, 1.0))
    board.row(row(INT8, Fate.KEPT, 3.0, 0.99))
    board.choose(msgspec.structs.replace(INT8, threads=1), "it is the fastest")
    assert [one.fate for one in board.rows] == [Fate.KEPT, Fate.CHOSEN]
    board.choose(Form("tensorrt"), "nobody told of it")
    assert board.why == "nobody told of it"


def test_a_boards_time_runs_from_the_first_that_it_hears():
    board = Board(limit_s=60.0)
    assert board.elapsed_s(500.0) == 0.0
    board.hear(500.0)
    board.hear(520.0)
    assert board.elapsed_s(525.0) == 25.0
    assert board.left_s(525.0) == 35.0
    assert board.left_s(9e9) == 0.0


@pytest.mark.parametrize(("told", "kept"), [(0.25, 0.25), (-1.0, 0.0), (7.0, 1.0), (float("nan"), None), (None, None)])
def test_a_board_brings_shares_into_range(told, kept):
    board = Board()
    board.progress("x", told, 0.0)
    assert board.share == kept


def test_what_was_done_about_a_candidate_is_over_with_its_row():
    board = Board()
    board.trying(TORCH, 1, 2, 10.0)
    board.progress("compiling", 0.5, 11.0)
    board.row(row(TORCH, Fate.FAILED))
    assert (board.present, board.text, board.share) == (None, "", None)


def test_what_is_done_between_candidates_has_a_time_of_its_own():
    board = Board()
    board.trying(TORCH, 1, 2, 10.0)
    board.progress("compiling", None, 12.0)
    assert board.present_began_s == 10.0
    board.row(row(TORCH, Fate.FAILED))
    board.progress("measuring layers", 0.1, 20.0)
    board.progress("measuring layers", 0.2, 25.0)
    assert board.present_began_s == 20.0


def test_the_picture_has_the_budget_the_time_left_the_present_candidate_and_the_best_rows():
    table, console, clock = live()
    found = findings(6)
    table.about(found.model, BUDGET, 600.0)
    table.row(found.reference)
    table.begin(6)
    for one in found.rows:
        table.row(one)
    table.trying(TORCH, 5, 6)
    clock.now += 75.0
    table.progress("compiling", 0.4)
    text = shown(table, console)
    table.end()
    assert "efficientnet_lite0" in text
    assert "top1_agreement >= 0.97" in text
    assert "1 min 15 s, 8 min 45 s left of 10 min" in text
    assert "candidate 5 of 6" in text
    assert "40%" in text
    assert "compiling" in text
    lines = [line for line in text.splitlines() if line.strip()]
    places = {name: next(place for place, line in enumerate(lines) if name in line) for name in ("chosen", "refused")}
    assert "4.31 x" in lines[places["chosen"]]
    assert "0.981" in lines[places["chosen"]]
    assert places["chosen"] < places["refused"]
    assert any("reference" in line and "1.00 x" in line for line in lines)


@pytest.mark.parametrize(("width", "height"), [(200, 60), (80, 24), (40, 10)])
def test_the_picture_fits_the_terminal_however_many_rows_there_are(width, height):
    table, console, _ = live(width, height)
    table.row(findings(0).reference)
    for one in many_rows(60):
        table.row(one)
    table.trying(INT8, 60, 60)
    text = shown(table, console)
    table.end()
    assert all(len(line) <= width for line in text.splitlines())
    assert len(text.splitlines()) <= max(height, 14)
    assert "more" in text


def test_names_are_never_markup():
    table, console, _ = live(300)
    table.about(HOSTILE, None, None)
    for one in hostile().rows:
        table.row(one)
    table.trying(Form(HOSTILE), 1, 2)
    text = shown(table, console)
    table.end()
    assert "[red]" in text
    assert "\\frac" in text


def test_on_a_terminal_the_last_picture_stays():
    terminal = Terminal()
    listener = LiveTable(Console(file=terminal, force_terminal=True, width=140, height=40), Clock())
    told_everything(listener, many_rows(6))
    text = terminal.getvalue()
    assert "4.31 times as fast" in text
    assert text.endswith("\x1b[?25h")  # the cursor is back


def test_a_search_that_fails_at_once_leaves_the_terminal_in_order():
    terminal = Terminal()
    listener = LiveTable(Console(file=terminal, force_terminal=True), Clock())
    listener.end()
    assert terminal.getvalue() == ""


def test_plain_lines_are_one_for_each_row():
    lines = []
    told_everything(PlainLines(lines.append), many_rows(6))
    assert len(lines) == 2 + 1 + 6 + 1
    assert lines[0] == (
        "looking for the fastest form of efficientnet_lite0 with top1_agreement >= 0.97, for 10 min at most"
    )
    assert lines[1].split()[:4] == ["0", "reference", "1.00", "x"]
    assert lines[2] == "6 candidates to try"
    chosen = next(line for line in lines if line.split()[1] == "chosen")
    assert "4.31 x" in chosen
    assert "top-1 agreement 0.981" in chosen
    failed = next(line for line in lines if line.split()[1] == "failed")
    assert failed.endswith("crashed: its process was ended by SIGSEGV")
    assert not any("\n" in line for line in lines)


def test_plain_lines_without_a_reader_do_not_end_the_search():
    def broken(text):
        raise BrokenPipeError(text)

    told_everything(PlainLines(broken), many_rows(3))


def test_the_listener_is_a_table_on_terminals_only(monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(listener_for(Terminal()), LiveTable)
    assert isinstance(listener_for(Terminal(), background=True), PlainLines)
    pipe = io.StringIO()
    listener = listener_for(pipe)
    assert isinstance(listener, PlainLines)
    listener.row(findings(0).reference)
    assert pipe.getvalue().startswith("  0  reference")
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(listener_for(Terminal()), PlainLines)


def test_a_silent_listener_takes_everything():
    told_everything(SilentListener(), many_rows(6))

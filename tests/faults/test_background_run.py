"""The optimiser's process beside a server: it takes only what nobody wants, and whatever it does, it is ended."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from headrace.background.run import Lines, run_command
from headrace.background.schedule import Result

FAKE = Path(__file__).parents[1] / "fake_optimizer.py"
LIMIT_S = 300  # of what nobody else wants there may be very little


@pytest.fixture
def notes(tmp_path):
    return tmp_path / "notes"


def command(notes, behaviour):
    return [sys.executable, str(FAKE), str(notes), behaviour, "m"]


def noted(notes):
    return [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []


async def first_note(notes):
    while not noted(notes):
        await asyncio.sleep(0.02)
    return noted(notes)[0]


def alive(pid):
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def wait_gone(*pids):
    deadline = time.monotonic() + 60
    while any(map(alive, pids)):
        assert time.monotonic() < deadline, "it lives on"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("behaviour", "result", "reason"),
    [
        ("succeed", Result.PLANNED, ""),
        ("nothing_better", Result.NOTHING_BETTER, ""),
        ("crash", Result.FAILED, "it ended with exit status 1: headrace: the moon is full"),
        ("abort", Result.FAILED, "it was killed by signal 6"),
    ],
)
async def test_how_it_ends_is_told(notes, behaviour, result, reason):
    progress = []
    ended = await run_command(command(notes, behaviour), LIMIT_S, progress.append)
    assert ended.result is result
    assert ended.reason == reason
    assert progress == [{"done": 1, "of": 3}]


async def test_it_takes_only_what_nobody_else_wants(notes):
    await run_command(command(notes, "succeed"), LIMIT_S)
    [note] = noted(notes)
    assert note["policy"] == os.SCHED_IDLE
    assert note["nice"] == 19
    assert note["oom"] == 1000
    assert 1 <= int(note["threads"]) <= os.cpu_count()
    assert note["group"] == note["pid"]
    assert note["session"] == os.getsid(0)  # the kernel shares CPUs between sessions evenly, whatever their policies


async def test_one_that_hangs_is_killed_with_all_that_it_has_started(notes):
    for limit_s in (1, 10, 100):  # it is to have started another process by then
        ended = await run_command(command(notes, "hang"), float(limit_s))
        assert ended.result is Result.TIMED_OUT
        assert ended.reason == f"it took longer than {limit_s} s"
        if noted(notes):
            break
    [note] = noted(notes)
    wait_gone(note["pid"], note["child"])


async def test_what_it_leaves_behind_is_killed(notes):
    ended = await run_command(command(notes, "slow"), LIMIT_S)
    assert ended.result is Result.PLANNED
    wait_gone(noted(notes)[0]["child"])


async def test_it_is_killed_when_it_is_not_wanted_any_more(notes):
    run = asyncio.create_task(run_command(command(notes, "hang"), LIMIT_S))
    note = await asyncio.wait_for(first_note(notes), LIMIT_S)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    wait_gone(note["pid"], note["child"])


async def test_garbage_is_no_matter(notes):
    progress = []
    ended = await run_command(command(notes, "garbage"), LIMIT_S, progress.append)
    assert ended.result is Result.FAILED
    assert ended.reason.startswith("it ended with exit status 7")
    assert len(ended.reason) < 600
    assert progress == [{"done": 1, "of": 3}]


async def test_a_program_that_is_not_there_is_a_failure():
    ended = await run_command(["/no/such/program"], 60)
    assert ended.result is Result.FAILED
    assert "No such file" in ended.reason


def test_it_dies_with_its_server(notes):
    """Also where the server is killed and cannot see to it."""
    run = f"asyncio.run(run_command({command(notes, 'hang')!r}, {LIMIT_S}))"
    code = f"import asyncio\nfrom headrace.background.run import run_command\n{run}"
    server = psutil.Popen([sys.executable, "-c", code])
    try:
        deadline = time.monotonic() + LIMIT_S
        while not noted(notes):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        server.send_signal(signal.SIGKILL)
        wait_gone(noted(notes)[0]["pid"])
    finally:
        server.kill()
        server.wait()
        for note in noted(notes):
            with contextlib.suppress(ProcessLookupError):
                os.kill(note["child"], signal.SIGKILL)


def test_lines_are_cut_however_they_come():
    found = []
    lines = Lines(found.append)
    for chunk in (b"a", b"b\nc\n", b"\n", b"x" * 70000, b"y\nlast"):
        lines.feed(chunk)
    lines.end()
    assert found == [b"ab", b"c", b"", b"last"]
    found.clear()
    lines.feed(b"z" * 70000 + b"\nshort\n")
    assert found == [b"short"]


async def test_where_there_is_no_idle_scheduling_nothing_runs(notes, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(
        "import os\ndef no(*_): raise PermissionError(1, 'Operation not permitted')\nos.sched_setscheduler = no\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    ended = await run_command(command(notes, "succeed"), 60)
    assert ended.result is Result.FAILED
    assert "no idle scheduling" in ended.reason
    assert noted(notes) == []

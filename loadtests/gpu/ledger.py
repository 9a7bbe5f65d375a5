"""What was to be shown and what came of it: rows for a table, and raw results for a file."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SHOWN, FAILED, NOT_SHOWN = "shown", "FAILED", "not shown"
OVER = "the time of the run was over"

# What no run on one GPU of today can show; it is printed beside what the run shows.
BEYOND = {
    "several GPUs: placement over them": "this machine has one",
    "MIG: an instance on a part of a GPU": "its mode is the machine's, and not changed for a test",
    "models over several GPUs": "is not built",
    "Torch-TensorRT as a form that is served": "is not offered: docs/gpu.md says why",
    "int8 and fp8 with calibration": "a calibrated model belongs to it; that quantised engines are built is tested",
}


class NotShown(Exception):
    """Something cannot be shown here; the message says why."""


@dataclass(slots=True)
class Entry:
    """One thing to show. ``values`` are what was measured."""

    what: str
    outcome: str
    text: str
    seconds: float
    values: dict[str, Any] = field(default_factory=dict)


class Ledger:
    """The entries of one run, in order. When the time is over nothing new is begun. Threads may share it.

    ``keep`` is the file that has the raw results after each of them, for a run that is cut off.
    """

    def __init__(
        self,
        ends_at: float,
        say: Callable[[str], None],
        now: Callable[[], float] = time.monotonic,
        keep: Path | None = None,
    ) -> None:
        self.entries: list[Entry] = []
        self.machine: dict[str, Any] = {}
        self._now = now
        self._ends_at = ends_at
        self._say = say
        self._keep = keep
        self._adding = threading.Lock()

    @property
    def left_s(self) -> float:
        """How much time is left of the run's."""
        return max(0.0, self._ends_at - self._now())

    @contextmanager
    def showing(self, what: str) -> Iterator["Showing"]:
        """Try to show something. Whatever is raised inside becomes its outcome; use ``Showing.due`` to begin."""
        showing, started = Showing(self.left_s > 0), self._now()
        outcome, text = SHOWN, ""
        try:
            yield showing
        except NotShown as error:
            outcome, text = NOT_SHOWN, str(error)
        except Exception as error:  # noqa: BLE001 - one thing that breaks must not hide what comes after it
            outcome, text = FAILED, f"{type(error).__name__}: {error}"
        self.add(Entry(what, outcome, text or showing.text, self._now() - started, showing.values))

    def add(self, entry: Entry) -> None:
        """Keep and tell it."""
        with self._adding:
            self.entries.append(entry)
            self._say(f"[{entry.outcome}] {entry.what}: {entry.text} ({entry.seconds:.0f} s)")
            if self._keep is not None:
                self.write(self._keep)

    def outcome(self, what: str) -> str:
        """What came of it; empty where it was not tried."""
        return next((one.outcome for one in reversed(self.entries) if one.what == what), "")

    def table(self) -> str:
        """Everything, one line each, failures where they happened."""
        rows = [(one.outcome, one.what, one.text) for one in self.entries]
        rows += [(NOT_SHOWN, what, why) for what, why in BEYOND.items()]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        return "\n".join(f"{outcome:<{widths[0]}}  {what:<{widths[1]}}  {text[:160]}" for outcome, what, text in rows)

    @property
    def failed(self) -> int:
        """How many things that should have been shown were not."""
        return sum(one.outcome == FAILED for one in self.entries)

    def write(self, path: Path) -> None:
        """Keep the raw results; a file of them is whole at any time."""
        path.parent.mkdir(parents=True, exist_ok=True)
        found = {"machine": self.machine, "entries": [asdict(one) for one in self.entries], "not_shown": BEYOND}
        new = path.with_name(f".{path.name}")
        new.write_text(json.dumps(found, indent=1) + "\n")
        new.replace(path)


class Showing:
    """What a check fills in while it runs."""

    def __init__(self, in_time: bool) -> None:
        self._in_time = in_time
        self.text = ""
        self.values: dict[str, Any] = {}

    def due(self) -> None:
        """Raise NotShown where the run's time is over."""
        if not self._in_time:
            raise NotShown(OVER)

"""Where the files of candidates are made: each chain of steps once, in a process of its own, kept for a later run."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import msgspec

from headrace.core.model import Signature
from headrace_backends.optimize.deadline import Deadline
from headrace_backends.optimize.examples import Examples
from headrace_backends.optimize.form import Step, steps_key
from headrace_backends.optimize.subject import Subject
from headrace_backends.optimize.trial import Trial, TrialFailed

_DONE = "done.json"
_MOST_EXAMPLES = 256  # to calibrate with: more take longer and change nothing


class Made(msgspec.Struct, frozen=True):
    """A file that steps have made. ``path`` is relative to the chain's folder."""

    path: str
    notes: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Artifact:
    """A model file, and what its making had to tell."""

    path: Path
    notes: tuple[str, ...]
    seconds: float

    @property
    def file_bytes(self) -> int:
        """Of the file and what lies beside it, such as weights."""
        folder = self.path.parent
        return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and file.name != _DONE)


class Workshop:
    """Makes files below ``folder``. Nothing is waited for beyond ``deadline``."""

    def __init__(self, folder: Path, subject: Subject, cpus: int) -> None:
        self.folder = folder
        self.deadline = Deadline()
        self._subject = subject
        self._cpus = cpus
        (folder / "steps").mkdir(parents=True, exist_ok=True)

    @property
    def log(self) -> Path:
        """What the processes of candidates print."""
        return self.folder / "trials.log"

    def make(self, steps: Sequence[Step], signature: Signature, examples: Examples, timeout_s: float) -> Artifact:
        """The file that these steps make of the model as dropped in.

        Raises:
            TrialFailed: one of them failed, crashed or hung.
            OutOfTime: the deadline is over.
        """
        artifact = Artifact(self._subject.path, (), 0.0)
        for count in range(1, len(steps) + 1):
            artifact = self._take(tuple(steps[:count]), artifact, signature, examples, timeout_s)
        return artifact

    def _take(
        self, steps: tuple[Step, ...], before: Artifact, signature: Signature, examples: Examples, timeout_s: float
    ) -> Artifact:
        folder = self.folder / "steps" / steps_key(steps)
        done = folder / _DONE
        made = _made(done)
        if made is not None and (folder / made.path).is_file():
            return Artifact(folder / made.path, (*before.notes, *made.notes), before.seconds + made.seconds)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        step = steps[-1]
        started = monotonic()
        task = {
            "source": before.path,
            "folder": folder,
            "signature": signature,
            "examples": examples.first(_MOST_EXAMPLES),
            "options": step.options,
            "training": str(self._subject.training or ""),
            "threads": self._cpus,
            "device": self._subject.device,
        }
        with Trial(self.log, self._cpus, self.deadline, self._subject.device) as trial:
            path, notes = trial.call(
                "headrace_backends.optimize.trial_process:take_step", timeout_s, kind=step.kind, task=task
            )
        if not path.is_file() or folder not in path.parents:
            raise TrialFailed(f"the step {step.kind} made no file")
        seconds = monotonic() - started
        made = Made(str(path.relative_to(folder)), tuple(notes), seconds)
        new = folder / f".{_DONE}.new"
        new.write_bytes(msgspec.json.encode(made))
        new.replace(done)
        return Artifact(path, (*before.notes, *notes), before.seconds + seconds)


def _made(done: Path) -> Made | None:
    """What an earlier run has made, None where it did not come to an end: as where the disk was full."""
    try:
        return msgspec.json.decode(done.read_bytes(), type=Made)
    except (OSError, msgspec.DecodeError):
        return None

"""Which models' requests are being recorded, and what becomes of the recordings."""

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import SystemRandom
from time import monotonic

import msgspec

from headrace.core.errors import InvalidRequest, NotFound, Overloaded, Restricted
from headrace.core.validation import ModelInputs
from headrace.recording.examples import Recorded, examples_in
from headrace.recording.file import recorded_file, write_examples
from headrace.recording.reservoir import Reservoir
from headrace.repository.repository import Repository, Served

log = logging.getLogger(__name__)

MOST_AT_ONCE = 4
MOST_EXAMPLES = 65536
MOST_SECONDS = 24 * 3600.0


class RecordingStatus(msgspec.Struct, frozen=True):
    """What a client is told of a recording. ``state`` is recording, written, nothing or failed."""

    model: str
    version: str
    state: str
    requests_seen: int
    examples_seen: int
    examples_kept: int
    examples_left_out: int
    bytes_kept: int
    most_examples: int
    most_bytes: int
    seconds: float
    seconds_left: float
    file: str
    reason: str


@dataclass(slots=True)
class Recording:
    """One model version's. ``reservoir`` is None once it has been written."""

    model: str
    version: str
    merges: bool
    most_examples: int
    most_bytes: int
    seconds: float
    ends_at: float
    file: Path
    reservoir: Reservoir[Recorded] | None
    state: str = "recording"
    reason: str = ""
    requests_seen: int = 0
    examples_seen: int = 0
    examples_kept: int = 0
    bytes_kept: int = 0
    left_out: int = 0
    timer: asyncio.TimerHandle | None = None
    writing: asyncio.Task[None] | None = None

    def status(self, now: float) -> RecordingStatus:
        """How it stands."""
        reservoir = self.reservoir
        return RecordingStatus(
            self.model,
            self.version,
            self.state,
            self.requests_seen,
            self.examples_seen,
            self.examples_kept if reservoir is None else len(reservoir),
            self.left_out if reservoir is None else reservoir.too_large,
            self.bytes_kept if reservoir is None else reservoir.nbytes,
            self.most_examples,
            self.most_bytes,
            self.seconds,
            round(max(0.0, self.ends_at - now), 3) if self.state == "recording" else 0.0,
            str(self.file) if self.state == "written" else "",
            self.reason,
        )


class Recorder:
    """Keeps a sample of the inputs of models that somebody has asked to record. Belongs to the event loop.

    ``active`` is false while no model is being recorded: callers look at it before anything else. Without a folder
    nothing can be recorded, and every method but ``take`` and ``close`` raises Restricted.
    """

    __slots__ = ("_clock", "_folder", "_most_bytes", "_random", "_recordings", "_repository", "_running", "active")

    def __init__(
        self, repository: Repository, folder: Path | None, most_bytes: int, clock: Callable[[], float] = monotonic
    ) -> None:
        self.active = False
        self._repository = repository
        self._folder = folder
        self._most_bytes = most_bytes
        self._clock = clock
        self._random = SystemRandom()
        self._recordings: dict[str, Recording] = {}  # the last of each model
        self._running: dict[str, Recording] = {}

    def take(self, served: Served, inputs: ModelInputs) -> None:
        """A request was accepted: perhaps copy its inputs. They need not outlive this call."""
        recording = self._running.get(served.folder.name)
        if recording is None or recording.version != served.version or recording.reservoir is None:
            return
        recording.requests_seen += 1
        for nbytes, copy in examples_in(
            inputs, merges=recording.merges, most=recording.most_examples, random=self._random
        ):
            recording.examples_seen += 1
            recording.reservoir.offer(nbytes, copy)

    def start(self, model: str, version: str, most_examples: int, seconds: float) -> RecordingStatus:
        """Begin to record a version, the newest that serves unless named, for so many seconds.

        Raises:
            Restricted: recording is not allowed.
            NotFound, NotReady: there is no such model or version, or it does not serve.
            InvalidRequest: a bound makes no sense, or the model is being recorded already.
            Overloaded: as many models as may be are being recorded.
        """
        folder = self._allowed()
        if not 1 <= most_examples <= MOST_EXAMPLES:
            raise InvalidRequest(f"'requests' is {most_examples}, expected a whole number from 1 to {MOST_EXAMPLES}")
        if not 0 < seconds <= MOST_SECONDS:
            raise InvalidRequest(f"'seconds' is {seconds:g}, expected more than 0 and at most {MOST_SECONDS:g}")
        served = self._repository.lookup(model, version)
        running = self._running.get(model)
        if running is not None:
            raise InvalidRequest(
                f"model '{model}' version {running.version} is being recorded already, for "
                f"{max(0.0, running.ends_at - self._clock()):.0f} s more; stop that first"
            )
        if len(self._running) >= MOST_AT_ONCE:
            raise Overloaded(
                f"{len(self._running)} models are being recorded ({', '.join(sorted(self._running))}), "
                f"expected at most {MOST_AT_ONCE} at a time",
                "recordings",
            )
        recording = Recording(
            model,
            served.version,
            served.max_batch_size > 0,
            most_examples,
            self._most_bytes,
            seconds,
            self._clock() + seconds,
            recorded_file(folder, model),
            Reservoir(most_examples, self._most_bytes, self._random),
        )
        recording.timer = asyncio.get_running_loop().call_later(seconds, self._end, recording)
        self._recordings[model] = self._running[model] = recording
        self.active = True
        log.info("model %s version %s: inputs are recorded for %g s", model, served.version, seconds)
        return recording.status(self._clock())

    def status(self, model: str, version: str) -> RecordingStatus:
        """How the last recording of a model stands.

        Raises:
            Restricted: recording is not allowed.
            NotFound: there was none since the server started.
        """
        self._allowed()
        recording = self._recordings.get(model)
        if recording is None or version not in ("", recording.version):
            which = f"model '{model}'" + (f" version {version}" if version else "")
            raise NotFound(f"{which} was not recorded since this server started")
        return recording.status(self._clock())

    async def stop(self, model: str, version: str) -> RecordingStatus:
        """End a recording before its time; what it has is written. One that has ended stays as it is.

        Raises:
            Restricted, NotFound: as ``status``.
        """
        self.status(model, version)
        recording = self._recordings[model]
        self._end(recording)
        if recording.writing is not None:
            await asyncio.shield(recording.writing)
        return recording.status(self._clock())

    async def discard(self, model: str) -> None:
        """End a model's recording without writing it, and remove the file of an earlier one.

        Raises:
            Restricted: recording is not allowed.
            NotFound: there is neither.
        """
        file = recorded_file(self._allowed(), model)
        recording = self._recordings.pop(model, None)
        if recording is not None:
            if recording.writing is None:
                self._leave(recording)
                recording.reservoir = None
            else:
                await asyncio.shield(recording.writing)
        try:
            await asyncio.to_thread(file.unlink)
            log.info("model %s: recorded inputs are removed", model)
        except FileNotFoundError:
            if recording is None:
                raise NotFound(f"nothing is recorded of model '{model}'") from None

    def file(self, model: str) -> Path:
        """The file with a model's recorded examples, perhaps from before this server started.

        Raises:
            Restricted: recording is not allowed.
            NotFound: there is none.
        """
        path = recorded_file(self._allowed(), model)
        if not path.is_file():
            raise NotFound(f"nothing is recorded of model '{model}'")
        return path

    async def close(self) -> None:
        """End every recording; what they have is written."""
        for recording in list(self._running.values()):
            self._end(recording)
        writing = [one.writing for one in self._recordings.values() if one.writing is not None]
        if writing:
            await asyncio.wait(writing)

    def _allowed(self) -> Path:
        if self._folder is None:
            raise Restricted("recording of inputs is off; start the server with --allow-recording")
        return self._folder

    def _end(self, recording: Recording) -> None:
        """Its time is up, or somebody has stopped it."""
        if recording.writing is None:
            self._leave(recording)
            recording.state = "writing"
            recording.writing = asyncio.get_running_loop().create_task(self._write(recording))

    def _leave(self, recording: Recording) -> None:
        if recording.timer is not None:
            recording.timer.cancel()
        if self._running.get(recording.model) is recording:
            del self._running[recording.model]
        self.active = bool(self._running)

    async def _write(self, recording: Recording) -> None:
        reservoir = recording.reservoir
        assert reservoir is not None, "it was not written before"
        kept = reservoir.items()
        written = 0
        try:
            written = await asyncio.to_thread(write_examples, recording.file, kept, merges=recording.merges)
        except OSError as error:
            recording.state, recording.reason = "failed", f"{recording.file} cannot be written: {error}"
            log.error("model %s: recorded inputs: %s", recording.model, recording.reason)  # noqa: TRY400
        else:
            recording.state = "written" if written else "nothing"
            recording.reason = "" if written else _why_nothing(recording, len(kept))
            log.info(
                "model %s: %d example(s) of %d request(s) recorded%s",
                recording.model,
                written,
                recording.requests_seen,
                f" in {recording.file}" if written else "",
            )
        finally:
            if recording.state == "writing":
                recording.state, recording.reason = "failed", "the examples could not be made arrays of"
            recording.examples_kept = written
            recording.bytes_kept = reservoir.nbytes
            recording.left_out = reservoir.too_large + len(kept) - written
            recording.reservoir = None


def _why_nothing(recording: Recording, kept: int) -> str:
    if not recording.requests_seen:
        return "no request came; an answer from the response cache is none"
    if kept:
        return "every example has texts that end in a byte of zero, which the file cannot hold"
    return f"every example is larger than {recording.most_bytes} bytes (--recording-bytes)"


def allowed_folder(plan_cache: Path, *, allowed: bool) -> Path | None:
    """Where recordings go; None where there are to be none.

    Raises:
        ValueError: the folder cannot be written to.
    """
    if not allowed:
        return None
    at = plan_cache
    while not at.exists() and at != at.parent:
        at = at.parent
    if not at.is_dir() or not os.access(at, os.W_OK | os.X_OK):
        raise ValueError(f"--allow-recording: recordings go to {plan_cache} (--plan-cache), which cannot be written to")
    return plan_cache.absolute()

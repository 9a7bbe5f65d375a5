"""Has the optimiser run beside the server, one model after the other, and its plans served."""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from time import monotonic

from headrace.background.run import Ended, Progress, run_command
from headrace.background.schedule import Result, Room, Schedule, Start, Stop, Subject

log = logging.getLogger(__name__)

LOOK_S = 2.0  # between two looks at what is served and what is free


class BackgroundOptimizer:
    """The shell round ``Schedule``: it looks, starts and stops runs, and has the server take what they made.

    ``subjects`` and ``room`` are asked at every look, ``command`` makes a run's command line, and ``take`` has the
    server look for a model's plan. Belongs to the event loop.
    """

    def __init__(
        self,
        subjects: Callable[[], Iterable[Subject]],
        room: Callable[[], Room],
        command: Callable[[Subject], Sequence[str]],
        take: Callable[[str], Awaitable[object]],
        time_limit_s: float,
        look_s: float = LOOK_S,
    ) -> None:
        self.results: Counter[Result] = Counter()  # of the runs that have ended
        self.progress: Progress = {}  # of the one that is under way, as the command tells it
        self._subjects = subjects
        self._room = room
        self._command = command
        self._take = take
        self._time_limit_s = time_limit_s
        self._look_s = look_s
        self._schedule = Schedule()
        self._run: asyncio.Task[Ended] | None = None
        self._stop_reason = ""
        self._told: dict[tuple[str, str], str] = {}
        self._wake = asyncio.Event()

    @property
    def running(self) -> Subject | None:
        """What is being optimised now."""
        return self._schedule.running

    def on_refused(self, model: str, version: str, reason: str) -> None:
        """A plan was found to be wrong: have another made."""
        running = self._schedule.running
        if running is not None and (running.model, running.version) == (model, version):
            return  # it has just been made, and ends as a failure
        wait_s = self._schedule.refused(model, version, monotonic())
        if wait_s is None:
            log.error("model %s version %s: no other plan is made, as several went wrong: %s", model, version, reason)
        else:
            log.info("model %s version %s: another plan is made in %.0f s: %s", model, version, wait_s, reason)
        self._wake.set()

    async def run(self) -> None:
        """Look, decide and act, until cancelled; a run that is under way ends with it."""
        try:
            while True:
                self._wake.clear()
                decision = self._schedule.observe(list(self._subjects()), self._room(), monotonic())
                self._tell_obstacles()
                if isinstance(decision, Start):
                    self._start(decision.subject)
                elif isinstance(decision, Stop) and not self._stop_reason:
                    self._stop_reason = decision.reason
                    assert self._run is not None, "only what runs is stopped"
                    self._run.cancel()
                await self._wait()
                if self._run is not None and self._run.done():
                    await self._finish(self._run)
        finally:
            if self._run is not None:
                self._run.cancel()
                await asyncio.gather(self._run, return_exceptions=True)

    def _start(self, subject: Subject) -> None:
        self._schedule.started(subject)
        self.progress, self._stop_reason = {}, ""
        log.info("%s is being optimised in the background", subject.label)
        self._run = asyncio.get_running_loop().create_task(
            run_command(self._command(subject), self._time_limit_s, self._note_progress)
        )
        self._run.add_done_callback(lambda _: self._wake.set())

    async def _wait(self) -> None:
        try:
            async with asyncio.timeout(self._look_s):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def _finish(self, run: asyncio.Task[Ended]) -> None:
        """A run has ended: have its plan taken, or say what went wrong and when it is tried again."""
        subject = self._schedule.running
        assert subject is not None, "it runs until it is finished here"
        self._run = None
        if run.cancelled():
            ended = Ended(Result.STOPPED, self._stop_reason)
        elif (error := run.exception()) is not None:
            log.error("the optimiser of %s cannot be watched", subject.label, exc_info=error)
            ended = Ended(Result.FAILED, str(error))
        else:
            ended = run.result()
        if ended.result in (Result.PLANNED, Result.NOTHING_BETTER):
            ended = await self._taken(subject, ended)
        self.progress = {}
        self.results[ended.result] += 1
        wait_s = self._schedule.ended(ended.result, monotonic())
        if ended.result is Result.STOPPED:
            log.info("optimising %s is interrupted: %s", subject.label, ended.reason)
        elif ended.reason:
            then = f"it goes on in {wait_s:.0f} s" if wait_s is not None else "it is not tried again until it changes"
            log.warning("%s could not be optimised: %s; %s", subject.label, ended.reason, then)
        else:
            what = (
                "a plan was made" if ended.result is Result.PLANNED else "nothing is better than as it was dropped in"
            )
            log.info("%s is optimised: %s", subject.label, what)

    async def _taken(self, subject: Subject, ended: Ended) -> Ended:
        """The same, or a failure where the server does not use what was made."""
        try:
            await self._take(subject.model)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this model's matter, and the others go on
            return Ended(Result.FAILED, f"its plan could not be taken: {error}")
        found = [one for one in self._subjects() if (one.model, one.version) == (subject.model, subject.version)]
        if found and found[0].basis == subject.basis and not found[0].planned:
            return Ended(Result.FAILED, f"the plan that was made is not used: {found[0].why_not or 'there is none'}")
        return ended

    def _note_progress(self, progress: Progress) -> None:
        self.progress = progress

    def _tell_obstacles(self) -> None:
        """Say once what keeps a version from being optimised."""
        for (model, version), obstacle in self._schedule.obstacles.items():
            if (model, version) not in self._told:
                log.warning("model %s version %s is not optimised for now: %s", model, version, obstacle)
        self._told = dict(self._schedule.obstacles)

"""When a worker, or one model of it, is started again after it has died. Pure: times are handed in."""

from dataclasses import dataclass

LONGEST_S = 5.0  # that anything is left alone; whatever was up for so long has come up well
LONGEST_USED_S = 1.0  # where it has answered something meanwhile: those whom it would answer wait too
AT_ONCE = 2  # deaths in a row after which no pause is made: a request that a worker dies of is tried twice
HOPELESS_DEATHS = 5  # in a row, before anything was answered, before waiting requests are told: two had both chances
HOPELESS_AFTER_S = 15.0  # and that it has gone on for so long


@dataclass(frozen=True, slots=True)
class Pause:
    """How long what has died is left alone from now on, and why; no time at all where that is not needed.

    Where it is ``hopeless`` nobody is to wait for it meanwhile.
    """

    seconds: float = 0.0
    reason: str = ""
    hopeless: bool = False


class Restarts:
    """Of one worker process, and of each of its models by its instance's number; None stands for the process.

    What dies soon after it has come up, again and again, comes up in ever longer intervals. A pause is what is missing
    to such an interval: what lives for a while by itself is not held up.
    """

    def __init__(self) -> None:
        self._records: dict[int | None, _Record] = {}

    def died(self, who: int | None, cause: str, up_at: float, now: float, *, used: bool) -> Pause:
        """It died of ``cause`` and had been up since ``up_at``; ``used`` tells whether it has answered anything."""
        record = self._records.setdefault(who, _Record())
        life_s = now - up_at
        if life_s >= LONGEST_S:
            record.deaths = record.unused = 0
        record.deaths += 1
        if used:
            record.unused = 0
        elif not record.unused:
            record.unused_since = now
        record.unused += 0 if used else 1
        interval_s = min(backoff_s(record.deaths - AT_ONCE), LONGEST_USED_S if used else LONGEST_S)
        seconds = interval_s - life_s
        if seconds <= 0.0:
            return Pause()
        return Pause(
            seconds,
            f"its worker died {record.deaths} times in a row soon after it was up ({cause}); it is started again in "
            f"{seconds:.1f} s",
            hopeless=record.unused >= HOPELESS_DEATHS and now - record.unused_since > HOPELESS_AFTER_S,
        )

    def forget(self, who: int) -> None:
        """It is gone for good."""
        self._records.pop(who, None)


@dataclass(slots=True)
class _Record:
    """Deaths in a row, and those of them at the end before which nothing was answered."""

    deaths: int = 0
    unused: int = 0
    unused_since: float = 0.0


def backoff_s(failures: int) -> float:
    """How long to wait before starting something again that has failed so many times in a row."""
    return 0.0 if failures <= 0 else min(LONGEST_S, 0.1 * 2.0 ** min(failures - 1, 10))

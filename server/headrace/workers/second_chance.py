"""Which requests of a dead worker are run again, and which have used up their chances."""

from collections.abc import Iterable
from time import monotonic_ns

from headrace.batching.pending import Pending
from headrace.core.errors import InternalError

KILLED = "signal SIGKILL"
SAME_STROKE_NS = 250_000_000
MAX_DEATHS = 2  # a request that was running when so many workers died is not tried again


def survivors(
    pending: Iterable[Pending], model: str, cause: str, up_at_ns: int, *, elsewhere: bool = False
) -> list[Pending]:
    """The requests of the batch in execution that run again, each alone; the others are answered with the reason.

    The worker died of ``cause`` and had been up since ``up_at_ns``. With ``elsewhere`` all of them run again: the model
    has another form, which may not die of them.
    """
    alive = living(pending)
    for one in alive:
        _count(one, cause, up_at_ns)
    return alive if elsewhere else [one for one in alive if _has_a_chance(one, model, cause)]


def living(pending: Iterable[Pending]) -> list[Pending]:
    """Those that somebody waits for; the others are forgotten."""
    alive = []
    for one in pending:
        if one.dead:
            one.bury()
        else:
            alive.append(one)
    return alive


def _count(one: Pending, cause: str, up_at_ns: int) -> None:
    # Somebody who kills several workers at once may hit a request twice: at first, and when another worker, that
    # was up already, has just taken it over. That is one stroke. A worker that has come back since is another.
    now_ns = monotonic_ns()
    outside = cause == KILLED and up_at_ns < one.died_at_ns and now_ns - one.died_at_ns < SAME_STROKE_NS
    one.deaths += 0 if outside else 1
    one.died_at_ns = now_ns
    one.alone = True


def _has_a_chance(one: Pending, model: str, cause: str) -> bool:
    if one.deaths < MAX_DEATHS:
        return True
    one.fail(
        InternalError(
            f"model '{model}': the worker died ({cause}) while it ran this request, {one.deaths} times "
            "in a row; the request is not tried again"
        )
    )
    return False

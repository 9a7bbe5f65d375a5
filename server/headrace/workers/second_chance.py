"""Which requests of a dead worker are run again, and which have used up their chances."""

from collections.abc import Iterable
from time import monotonic_ns

from headrace.batching.pending import Pending
from headrace.core.errors import InternalError

KILLED = "signal SIGKILL"
SAME_STROKE_NS = 250_000_000
MAX_DEATHS = 2  # a request that was running when so many workers died is not tried again


def survivors(pending: Iterable[Pending], model: str, cause: str, up_at_ns: int) -> list[Pending]:
    """Those of a batch that was being run to be run again, each alone; the others are answered with the reason.

    ``up_at_ns`` is since when the worker was up that has died of ``cause``.
    """
    return [one for one in living(pending) if _survives(one, model, cause, up_at_ns)]


def living(pending: Iterable[Pending]) -> list[Pending]:
    """Those that somebody waits for; the others are forgotten."""
    alive = []
    for one in pending:
        if one.dead:
            one.bury()
        else:
            alive.append(one)
    return alive


def _survives(one: Pending, model: str, cause: str, up_at_ns: int) -> bool:
    # Somebody who kills several workers at once may hit a request twice: at first, and when another worker, that
    # was up already, has just taken it over. That is one stroke. A worker that has come back since is another.
    now_ns = monotonic_ns()
    outside = cause == KILLED and up_at_ns < one.died_at_ns and now_ns - one.died_at_ns < SAME_STROKE_NS
    one.deaths += 0 if outside else 1
    one.died_at_ns = now_ns
    one.alone = True
    if one.deaths < MAX_DEATHS:
        return True
    one.fail(
        InternalError(
            f"model '{model}': the worker died ({cause}) while it ran this request, {one.deaths} times "
            "in a row; the request is not tried again"
        )
    )
    return False

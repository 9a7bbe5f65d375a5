"""When to stage a batch behind one that runs: not before there is company for it. Pure: no clock, no futures."""

_FORGET = 0.95  # how fast a crowd that has left is forgotten, per batch


class Staging:
    """A light model's worker is given its next batch while it runs one, so that it need not wait for the front.

    But doing so at once gains nothing: the worker has work, and a batch that is staged early leaves out the requests
    that come a moment later. Clients that wait for their answers come back in the groups in which they were answered,
    so small batches stay small for ever, and each costs both processes as much as a large one. So a batch is staged
    when half of all clients are there, which makes two groups of them, or when the worker has nothing left.
    """

    def __init__(self) -> None:
        self._crowd = 0.0

    def wanted(self, unanswered: int, most: int) -> int:
        """How many waiting requests are worth staging, when ``unanswered`` are under way or wait, in all.

        ``most`` is what a batch holds. Asked once a batch.
        """
        self._crowd = max(float(unanswered), self._crowd * _FORGET)
        return max(1, min((int(self._crowd) + 1) // 2, most))

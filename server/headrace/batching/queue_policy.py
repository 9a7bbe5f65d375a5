"""What requests of one priority level may expect of the queue: how many may wait, how long, and what comes then."""

from dataclasses import dataclass

MAX_TIMEOUT_US = 10**15  # thirty years: a longer timeout is none


@dataclass(frozen=True, slots=True)
class QueuePolicy:
    """The policy of one level, or of a model without levels.

    With ``delays`` a request whose timeout is over goes behind all that are in time, and is not refused.
    """

    max_size: int = 1024  # requests of the level that wait
    default_timeout_us: int = 0  # 0: none
    delays: bool = False
    allow_timeout_override: bool = True  # whether a request's own timeout counts; it can only shorten the default

    def time_limits(self, given_us: int, deadline_ns: int, now_ns: int) -> tuple[int, int]:
        """When a request that arrives now is to be given up, and when it is late; 0 for never.

        ``given_us`` is its own timeout, 0 for none, and ``deadline_ns`` until when its client waits at all: that
        holds whatever the policy is.
        """
        timeout_us = self.default_timeout_us
        if given_us and self.allow_timeout_override:
            timeout_us = min(given_us, timeout_us or MAX_TIMEOUT_US)
        if not timeout_us:
            return deadline_ns, 0
        over_ns = now_ns + timeout_us * 1000
        if self.delays:
            return deadline_ns, over_ns
        return min(over_ns, deadline_ns) if deadline_ns else over_ns, 0

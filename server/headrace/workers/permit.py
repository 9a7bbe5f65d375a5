"""What one instance has to get before it may run a batch: CPU threads, and resources that are limited."""

from time import monotonic_ns

from headrace.workers.fair_turns import Turn
from headrace.workers.rate_limit import RateLimiter
from headrace.workers.resources import Claim
from headrace.workers.turns import CpuTurns


class Permit:
    """Held while a batch of the instance is in flight. ``waited_ns`` is how long the last one waited for its CPUs.

    Resources are taken before CPUs and never after, so that no two instances wait for each other.
    """

    def __init__(self, model: str, turns: CpuTurns, cpu_weight: float) -> None:
        self.waited_ns = 0
        self.cpu_weight = cpu_weight
        self.turns = turns
        self._model = model
        self._turn: Turn | None = None  # the threads that it has
        self._next_turn: Turn | None = None  # for which it stands in line already
        self._limiter: RateLimiter | None = None
        self._claim: Claim | None = None  # what it needs, where that is limited
        self._has_claim = False  # whether it has got that

    def limit(self, limiter: RateLimiter, claim: Claim) -> None:
        """Have it need what the claim says too."""
        self._limiter, self._claim = limiter, claim

    @property
    def limited(self) -> bool:
        """Whether it needs resources that are limited."""
        return self._claim is not None

    @property
    def held(self) -> bool:
        """Whether anything of it is held now."""
        return self._turn is not None or self._has_claim

    def ask(self) -> bool:
        """Stand in line for its resources, for ``take``.

        Returns whether it has to wait for them while another instance of the model may not.
        """
        return self._limiter is not None and self._claim is not None and self._limiter.ask(self._claim)

    async def take(self, threads: int) -> None:
        """Wait for what a batch on ``threads`` CPU threads needs; 0 need no turn. When cancelled, nothing is held."""
        try:
            if self._limiter is not None and self._claim is not None:
                await self._limiter.take(self._claim)
                self._has_claim = True
            if threads:
                turn, self._next_turn = self._next_turn, None
                if turn is None:
                    turn = self.turns.ask(threads, self._model, self.cpu_weight)
                asked_ns = monotonic_ns()
                self._turn = await self.turns.wait(turn)
                self.waited_ns = monotonic_ns() - asked_ns
        except BaseException:
            self.give(ran=False)
            raise

    def give(self, *, keep_claim: bool = False, ran: bool = True, again: bool = False) -> None:
        """Return CPUs and resources, after a batch (``ran``) or without one.

        With ``keep_claim`` the resources are kept, for a stream that goes on. With ``again`` it joins the line for its
        next batch at once.
        """
        if self._turn is not None:
            self._next_turn = self.turns.give(self._turn, again=again and self._claim is None)
            self._turn = None
        if self._has_claim and not keep_claim and self._limiter is not None and self._claim is not None:
            self._has_claim = False
            self._limiter.give(self._claim, ran=ran, again=again)

    def leave_line(self) -> None:
        """Leave the lines that it stands in: there is nothing to run now."""
        if self._next_turn is not None:
            self.turns.drop(self._next_turn)
            self._next_turn = None
        if self._limiter is not None and self._claim is not None and not self._has_claim:
            self._limiter.drop(self._claim)

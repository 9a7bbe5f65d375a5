"""How much each of several takers has had, so that whoever has had least is served next. Pure: no clock."""


class VirtualTime:
    """Amounts by account, counted from a common start that moves along with those who take.

    Who comes back after a pause begins where the hungriest of the others is: a pause is no credit that could be used
    to shut others out later, and nobody who keeps taking is ever behind by more than what was charged at once.
    """

    def __init__(self) -> None:
        self._had: dict[str, float] = {}
        self._present: dict[str, int] = {}  # how often each account has joined and not left
        self._now = 0.0

    def join(self, account: str) -> None:
        """The account waits for something, or holds it; may be called several times."""
        if account not in self._present:
            self._had[account] = max(self._had.get(account, 0.0), self._now)
        self._present[account] = self._present.get(account, 0) + 1

    def leave(self, account: str) -> None:
        """The opposite of one ``join``."""
        self._present[account] -= 1
        if not self._present[account]:
            del self._present[account]
            self._advance()
            # Whoever has no more than the others would begin with nothing lost; keeping them would never end.
            for one in [one for one in self._had if one not in self._present and self._had[one] <= self._now]:
                del self._had[one]

    def charge(self, account: str, amount: float) -> None:
        """The account, which is present, has had so much more."""
        self._had[account] += amount
        self._advance()

    def had(self, account: str) -> float:
        """What the account has had; only while it is present."""
        return self._had[account]

    def _advance(self) -> None:
        if self._present:
            self._now = max(self._now, min(self._had[account] for account in self._present))

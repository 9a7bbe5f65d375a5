"""Who may run where models share what there is too little of: named resources. Pure: no clock."""

from collections.abc import Iterable, Mapping

from headrace.workers.virtual_time import VirtualTime

GLOBAL = ""  # stands for the server where others have the name of a device
EVERY_DEVICE = "*"

Resource = tuple[str, str]  # a device or GLOBAL, and a name


class Unschedulable(Exception):
    """An instance could never run: it needs more of something than there is. The message says of what."""


class Claim:
    """What one instance needs for as long as it runs a batch: whether it has ``asked`` for it, or ``holds`` it."""

    __slots__ = ("asked", "holds", "model", "needs", "priority")

    def __init__(self, model: str, needs: Mapping[Resource, int], priority: int = 1) -> None:
        self.model = model
        self.needs = dict(needs)
        self.priority = priority
        self.asked = False
        self.holds = False


class Resources:
    """Lends out resources. ``grants`` says who may run, after each ``ask``, ``withdraw`` and ``end``.

    Of those that compete, the one goes first whose model has run least often, batches of priority 2 counting twice and
    so on. What one that is next has to wait for is kept for it; others pass only if they need nothing of that.

    There is as much of a resource as ``counts`` says, by device, EVERY_DEVICE or GLOBAL; where that says nothing at
    all, as much as the neediest instance needs.
    """

    def __init__(self, counts: Mapping[Resource, int]) -> None:
        self._counts = dict(counts)
        self._claims: dict[Claim, None] = {}
        self._held: dict[Resource, int] = {}
        self._waiting: dict[Claim, None] = {}  # in the order in which they came
        self._runs = VirtualTime()

    def add(self, claim: Claim) -> None:
        """One more instance.

        Raises:
            Unschedulable: it could never run, or takes for the server's what another takes for a device's own.
        """
        for device, name in claim.needs:
            for other, taken in ((one, taken) for one in self._claims for taken in one.needs):
                if taken[1] == name and (taken[0] == GLOBAL) != (device == GLOBAL):
                    mine, theirs = ("global", "a device's") if device == GLOBAL else ("a device's", "global")
                    raise Unschedulable(
                        f"resource '{name}' is {mine} here, and {theirs} in the configuration of model '{other.model}'"
                    )
        for resource, count in claim.needs.items():
            limit = self._limit(resource)
            if limit is not None and limit < count:
                where = f"on {resource[0]}" if resource[0] else "in the server"
                raise Unschedulable(
                    f"an instance needs {count} of resource '{resource[1]}' and could never run: expected at most "
                    f"{limit}, all that there is {where} (--rate-limit-resource)"
                )
        self._claims[claim] = None

    def remove(self, claim: Claim) -> None:
        """An instance is gone; what it holds or waits for was given up before."""
        self._claims.pop(claim, None)

    def ask(self, claim: Claim) -> None:
        """The instance wants to run a batch."""
        assert not claim.asked, "an instance asks once"
        assert not claim.holds, "an instance runs one batch at a time"
        self._runs.join(claim.model)
        self._waiting[claim] = None
        claim.asked = True

    def withdraw(self, claim: Claim) -> None:
        """It was not granted, and is not wanted any more."""
        del self._waiting[claim]
        claim.asked = False
        self._runs.leave(claim.model)

    def end(self, claim: Claim, *, ran: bool = True, again: bool = False) -> None:
        """What was granted is given back; with ``again`` the instance asks for it anew."""
        claim.holds = False
        if again:
            self.ask(claim)
        for resource, count in claim.needs.items():
            self._held[resource] -= count
        if ran:
            self._runs.charge(claim.model, claim.priority)
        self._runs.leave(claim.model)

    def grants(self) -> list[Claim]:
        """Those that may run now."""
        granted = []
        kept: set[Resource] = set()
        for claim in sorted(self._waiting, key=lambda one: self._runs.had(one.model)):
            if kept.isdisjoint(claim.needs) and all(map(self._fits, claim.needs.items())):
                for resource, count in claim.needs.items():
                    self._held[resource] = self._held.get(resource, 0) + count
                del self._waiting[claim]
                claim.asked, claim.holds = False, True
                granted.append(claim)
            else:
                kept.update(claim.needs)
        return granted

    def has_other_needs(self, claim: Claim) -> bool:
        """Whether an instance of the same model needs something else, so that it may run while this one waits."""
        return any(one.model == claim.model and one.needs != claim.needs for one in self._claims)

    def usage(self) -> dict[Resource, tuple[int, int]]:
        """How many of each resource that somebody needs are held, and how many there are."""
        wanted: Iterable[Resource] = {resource for claim in self._claims for resource in claim.needs}
        return {resource: (self._held.get(resource, 0), self._count(resource)) for resource in sorted(wanted)}

    def _fits(self, need: tuple[Resource, int]) -> bool:
        resource, count = need
        return self._held.get(resource, 0) + count <= self._count(resource)

    def _count(self, resource: Resource) -> int:
        limit = self._limit(resource)
        if limit is not None:
            return limit
        return max((claim.needs.get(resource, 0) for claim in self._claims), default=0)

    def _limit(self, resource: Resource) -> int | None:
        """What the server's owner has said; None where nothing was said of any resource."""
        if not self._counts:
            return None
        device, name = resource
        if device == GLOBAL:
            return max((count for (_, one), count in self._counts.items() if one == name), default=0)
        return max(self._counts.get((where, name), 0) for where in (device, EVERY_DEVICE))

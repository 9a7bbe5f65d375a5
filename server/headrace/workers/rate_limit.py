"""The rate limiter: instances that need named resources run when they have them."""

import asyncio
import re
from collections.abc import Iterable

from headrace.core.device import is_device
from headrace.workers.resources import EVERY_DEVICE, Claim, Resource, Resources


class RateLimiter:
    """The async shell round ``Resources``: it only waits and wakes. One event loop owns it."""

    def __init__(self, resources: Resources) -> None:
        self.resources = resources
        self._wakers: dict[Claim, asyncio.Future[None]] = {}

    def ask(self, claim: Claim) -> bool:
        """Stand in line for what the instance needs, where ``give`` has not done so. Either ``take`` or ``drop`` it.

        Returns whether it has to wait while another instance of the model, which needs something else, may not.
        """
        if not (claim.asked or claim.holds):
            self.resources.ask(claim)
            self._grant()
        return not claim.holds and self.resources.has_other_needs(claim)

    async def take(self, claim: Claim) -> None:
        """Wait for what was asked for; it is the caller's until ``give``. Cancelled, it is not wanted any more."""
        if not (claim.asked or claim.holds):
            self.ask(claim)
        if claim.holds:
            return
        waker = self._wakers[claim] = asyncio.get_running_loop().create_future()
        try:
            await waker
        except asyncio.CancelledError:
            self.drop(claim)
            raise

    def give(self, claim: Claim, *, ran: bool = True, again: bool = False) -> None:
        """Return what was taken; ``ran`` tells whether a batch was run with it. With ``again`` it is asked for anew.

        Whoever has work left and asks a moment later would find that others, who have run more often, have it.
        """
        self.resources.end(claim, ran=ran, again=again)
        self._grant()

    def drop(self, claim: Claim) -> None:
        """What is asked for is not wanted any more, be it granted or not."""
        self._wakers.pop(claim, None)
        if claim.holds:
            self.resources.end(claim, ran=False)
        elif claim.asked:
            self.resources.withdraw(claim)
        self._grant()

    def remove(self, claim: Claim) -> None:
        """An instance is gone; others may need less than it did, or more can be had."""
        self.resources.remove(claim)
        self._grant()

    def _grant(self) -> None:
        for claim in self.resources.grants():
            waker = self._wakers.pop(claim, None)
            if waker is not None and not waker.done():
                waker.set_result(None)


def parse_counts(given: Iterable[str]) -> dict[Resource, int]:
    """The counts that ``NAME:COUNT`` and ``NAME:COUNT:DEVICE`` stand for.

    DEVICE is a GPU's number, or a device as models are configured with.

    Raises:
        ValueError: one of them is neither.
    """
    counts: dict[Resource, int] = {}
    for text in given:
        found = re.fullmatch(r"(?P<name>[^:]+):(?P<count>[0-9]{1,9})(?::(?P<device>.+))?", text)
        device = found["device"] or EVERY_DEVICE if found is not None else ""
        if re.fullmatch(r"(gpu:)?[0-9]{1,3}", device):
            device = f"gpu:{int(device.removeprefix('gpu:'))}"
        if found is None or not (device == EVERY_DEVICE or is_device(device)):
            raise ValueError(
                f"--rate-limit-resource '{text}' is not NAME:COUNT or NAME:COUNT:DEVICE, with a GPU's number, "
                "gpu:UUID or cpu as the device"
            )
        counts[device, found["name"]] = int(found["count"])
    return counts

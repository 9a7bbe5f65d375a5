"""The way back from a plan that turned out to be wrong while it served: to the model as it was dropped in."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from headrace.repository.model_record import ModelRecord
from headrace.repository.plans import Plans
from headrace.repository.served import ServedVersion
from headrace.repository.transition import Transition

AGAIN_S = 5.0  # after neither a plan's form nor the model as it was dropped in could be served


class FallBack:
    """``follow`` makes what serves agree with the folder as it was read last, while the record's ``change`` is held.

    It goes on trying until it has succeeded or ``closed`` is set.
    """

    def __init__(
        self,
        plans: Plans,
        transition: Transition,
        follow: Callable[[str, ModelRecord], Awaitable[None]],
        closed: asyncio.Event,
    ) -> None:
        self._plans = plans
        self._transition = transition
        self._follow = follow
        self._closed = closed

    async def run(self, served: ServedVersion, record: ModelRecord) -> None:
        """Have a distrusted version served as it was dropped in; what waits for the plan's form is answered by that."""
        planned = served.planned
        assert planned is not None, "only plans lead here"
        name, version = served.folder.name, served.files.version
        await self._plans.refuse(planned, served.distrusted)
        await served.vacate()
        while True:
            async with record.change:
                if record.serving.get(version) is served and record.folder is not None:
                    await self._follow(name, record)
                if record.serving.get(version) is not served:
                    break
            status = record.statuses[version]
            served.give_up(f"{served.distrusted}; and as it was dropped in: {status.reason or 'it cannot be loaded'}")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closed.wait(), AGAIN_S)
            if self._closed.is_set():
                return
        if not served.handed_over:
            await self._transition.finish_elsewhere(served)

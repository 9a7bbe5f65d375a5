"""Whether this worker's GPU is lost to it: then no model can run here any more, and the process has to end."""

import logging

from headrace.workers.slot_memory import described
from headrace_backends.base import DeviceLost
from headrace_backends.failures import device_lost

log = logging.getLogger("headrace.worker")


class DeviceLoss:
    """``lost`` is what the first of them was, None as long as all is well."""

    def __init__(self) -> None:
        self.lost: DeviceLost | None = None

    def note(self, model: str, error: BaseException) -> None:
        """A model has raised this: its own code does not know that its process has to end if the GPU failed."""
        if self.lost is not None:
            return
        self.lost = device_lost(error, described(error)[1])
        if self.lost is not None:
            log.error("model %s: %s; this worker ends, to be started again", model, self.lost)

    def end_if_lost(self) -> None:
        """Go on only where all is well.

        Raises:
            DeviceLost: it is not.
        """
        if self.lost is not None:
            raise self.lost

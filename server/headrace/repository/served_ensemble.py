"""One version of an ensemble while it is served: its plan, and what clients may ask about it."""

import asyncio
from collections.abc import Callable
from hashlib import blake2b

from headrace.batching.policy import BatchLimits
from headrace.batching.queue import BatchQueue
from headrace.batching.queue_policy import QueuePolicy
from headrace.core.ensemble import EnsemblePlan
from headrace.core.model import ModelInfo
from headrace.core.request import Parameters
from headrace.core.statistics import Statistics
from headrace.core.validation import InputChecker
from headrace.repository.form import version_print
from headrace.repository.layout import ModelFolder
from headrace.repository.version_files import ENSEMBLE
from headrace.workers.instance import Instance


class ServedEnsemble:
    """Made for a version that has been planned; usable at once, until ``drain`` is called. It has no workers.

    Whoever runs a request of it adds to ``running``, takes off again when it is answered, and then calls
    ``notice_idle``. The models of the steps are looked up request by request, so they may be replaced meanwhile by
    others of the same signatures.
    """

    def __init__(
        self, folder: ModelFolder, version: int, plan: EnsemblePlan, is_ready: Callable[[str, str], bool]
    ) -> None:
        self.folder = folder
        self.files = folder.versions[version]
        self.version = str(version)
        self.plan = plan
        self.print = ensemble_print(folder, version, plan)
        self.identity = f"{self.version}/{self.print}"  # of the ensemble itself: its models have theirs
        self.statistics = Statistics()
        self.running = 0  # requests under way
        # Where a model has instances and a queue, an ensemble has none and one that nothing is ever put into.
        self.instances: list[Instance] = []
        self.queue = BatchQueue(folder.name, BatchLimits(), 1)
        # What every request asks for, as plain attributes.
        self.default_timeout_us = 0
        self.default_priority = 0
        self.policy = QueuePolicy()
        self.policies: dict[int, QueuePolicy] = {}
        self.levels_shown = range(0)
        self.max_batch_size = plan.signature.max_batch_size
        self.decoupled = plan.signature.decoupled
        self.resident = True  # what leaves the memory are its models
        self.memory_bytes = 0
        self.cached = folder.config.response_cache
        self.checker = InputChecker(folder.name, plan.signature)
        self.info = ModelInfo(
            name=folder.name,
            version=self.version,
            platform=ENSEMBLE,
            backend=ENSEMBLE,
            signature=plan.signature,
            labels=dict(folder.labels),
        )
        self._is_ready = is_ready
        self._idle = asyncio.Event()

    @property
    def ready(self) -> bool:
        """Whether every model of it is."""
        return not self.unready_parts

    @property
    def unready_parts(self) -> list[str]:
        """The models of it that are not ready, in the steps' order."""
        parts = dict.fromkeys(planned.step.part for planned in self.plan.steps)
        return [model for model, version in parts if not self._is_ready(model, version)]

    @property
    def broken(self) -> bool:
        """Never: what can break are its models."""
        return False

    @property
    def notes(self) -> tuple[str, ...]:
        """What was decided for it."""
        order = ", ".join(str(planned.step.model) for planned in self.plan.steps)
        return (f"runs {order}, each as soon as its tensors are there",)

    def priority(self, _: Parameters, *, for_another: bool = False) -> int:  # noqa: ARG002 - as a model's
        """The request's level: none of its own, as each model has its levels."""
        return self.default_priority

    async def start(self) -> None:
        """Nothing is to be started."""

    async def drain(self) -> None:
        """Wait until every request under way is answered. Nobody may begin one any more."""
        while self.running:
            self._idle.clear()
            await self._idle.wait()

    def notice_idle(self) -> None:
        """A request has been answered; perhaps it was the last."""
        if not self.running:
            self._idle.set()


def ensemble_print(folder: ModelFolder, version: int, plan: EnsemblePlan) -> str:
    """What changes when the version has to be loaded anew: its files, or how it is planned."""
    planned = blake2b(repr(plan).encode(), digest_size=16).hexdigest()
    return f"{version_print(folder, version)}/{planned}"

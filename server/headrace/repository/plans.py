"""The plans of a server: which one serves which version, why others do not, and what became of those in use."""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.core.device import CPU
from headrace.core.fingerprint import fingerprint
from headrace.repository.layout import ModelFolder
from headrace.repository.planned import Planned, Unfit, device_of, planned_form, why_no_plan
from headrace_backends.optimize.basis import model_digest
from headrace_backends.optimize.plan import BadPlan, Plan
from headrace_backends.optimize.plan_cache import BrokenPlan, PlanCache, RefusedPlan, StalePlan

log = logging.getLogger(__name__)

MAX_REMEMBERED = 4096  # digests and refusals; the oldest are forgotten, which costs no more than another look


@dataclass(frozen=True, slots=True)
class Choice:
    """How a version is to be served: by a plan, or as it was dropped in and why."""

    planned: Planned | None = None
    why_not: str = ""


class Plans:
    """The plans of one server's models. One event loop owns it; what reads files does so in a thread.

    ``on_refused`` is told of each plan that is not to be used again: model, version and reason. ``marks`` is false for
    those who only look: they leave the folder as it is.
    """

    def __init__(self, cache: PlanCache, *, marks: bool = True) -> None:
        self.cache = cache
        self.on_refused: Callable[[str, str, str], None] = lambda _model, _version, _reason: None
        self.refusals: Counter[tuple[str, str]] = Counter()  # by model and version
        self.replays: Counter[tuple[str, str, bool]] = Counter()  # also by whether the answers were right
        self._marks = marks
        self._choices: dict[tuple[str, str], Choice] = {}
        self._digests: dict[tuple[str, str], str] = {}  # by the prints of files and configuration
        self._refused: dict[str, str] = {}  # reasons by the plan's print, also where the folder cannot be marked

    def choice(self, model: str, version: str) -> Choice:
        """What was chosen last for a version."""
        return self._choices.get((model, version), Choice(why_not="not looked for yet"))

    async def choose(self, folder: ModelFolder, versions: Iterable[int]) -> dict[int, Planned]:
        """The versions of a model that are to be served by a plan. Plans whose files are broken are refused."""
        chosen: dict[int, Planned] = {}
        for version in versions:
            choice, broken = await asyncio.to_thread(self._choose, folder, version)
            if broken is not None:
                await self._note_refused(folder.name, str(version), str(broken))
            self._remember(self._choices, (folder.name, str(version)), choice)
            if choice.planned is not None:
                chosen[version] = choice.planned
        return chosen

    async def refuse(self, planned: Planned, reason: str) -> None:
        """See that a plan is not used again."""
        plan = planned.plan
        self._remember(self._refused, planned.print, reason)
        self._remember(self._choices, (plan.model, plan.version), Choice(why_not=f"refused: {reason}"))
        await asyncio.to_thread(self._mark, planned.folder, reason, plan)
        await self._note_refused(plan.model, plan.version, reason)

    def note_replay(self, planned: Planned, *, good: bool) -> None:
        """The recorded requests of a plan were answered again."""
        self.replays[planned.plan.model, planned.plan.version, good] += 1

    async def _note_refused(self, model: str, version: str, reason: str) -> None:
        self.refusals[model, version] += 1
        log.error("the plan of model %s version %s is refused: %s", model, version, reason)
        self.on_refused(model, version, reason)

    # -- in a thread --------------------------------------------------------------------------------------

    def _choose(self, folder: ModelFolder, version: int) -> tuple[Choice, BrokenPlan | None]:
        why_not = why_no_plan(folder.config)
        if why_not:
            return Choice(why_not=why_not), None
        try:
            return self._find(folder, version), None
        except BrokenPlan as error:
            self._mark(error.folder, str(error))
            return Choice(why_not=f"refused: {error}"), error
        except (BadPlan, Unfit, OSError) as error:
            return Choice(why_not=_told(error)), None
        except Exception:  # a model is not to go unserved because of a bug in what only makes it faster
            log.exception("the plan of model %s version %d could not be looked for", folder.name, version)
            return Choice(why_not="it could not be looked for; the server's log says why"), None

    def _find(self, folder: ModelFolder, version: int) -> Choice:
        if not self.cache.place(folder.name, str(version)).is_dir():
            return Choice(why_not="none was made")  # no file needs to be read to know that
        plan, place = self.cache.find(folder.name, str(version), self._digest(folder, version))
        planned = planned_form(plan, place, folder, folder.versions[version])
        reason = self._refused.get(planned.print)
        return Choice(planned) if reason is None else Choice(why_not=f"refused: {reason}")

    def _digest(self, folder: ModelFolder, version: int) -> str:
        path = folder.path / str(version)
        key = (str(path), f"{fingerprint(path)}/{folder.config_print}")
        if key not in self._digests:
            self._remember(self._digests, key, digest_of(folder, version))
        return self._digests[key]

    def _mark(self, place: Path, reason: str, plan: Plan | None = None) -> None:
        if not self._marks:
            return
        try:
            self.cache.refuse(place, reason, plan)
        except OSError as error:
            log.warning("the plan in %s cannot be marked as refused: %s", place, error)

    @staticmethod
    def _remember(memory: dict[Any, Any], key: Any, value: Any) -> None:
        memory.pop(key, None)
        memory[key] = value
        while len(memory) > MAX_REMEMBERED:
            del memory[next(iter(memory))]


def digest_of(folder: ModelFolder, version: int) -> str:
    """A hash of what a plan of this version depends on: its files, and the tensors, backend and device configured.

    Labels, batching, queues and the like are not among it: they change nothing of the answers.

    Raises:
        OSError: a file cannot be read.
    """
    config = folder.config
    tensors = {"name", "datatype", "shape", "reshape"}
    relevant = {
        "backend": folder.versions[version].backend,
        "max_batch_size": config.max_batch_size,
        "parameters": config.parameters,
        "inputs": [one.model_dump(mode="json", include={*tensors, "optional"}) for one in config.inputs],
        "outputs": [one.model_dump(mode="json", include=tensors) for one in config.outputs],
        "model_file": config.model_file,
    }
    device = device_of(config, folder.versions[version].backend)
    if device != CPU:  # a form that is made for one is none for the other
        relevant["device"] = device
    return model_digest(folder.path / str(version), relevant)


def _told(error: Exception) -> str:
    match error:
        case StalePlan():
            return f"stale: {error}"
        case RefusedPlan():
            return f"refused: {error}"
        case OSError():
            return f"it cannot be read: {error}"
    return str(error)

"""What a version is run as by a plan: the configuration and the files of another form, behind the same names."""

from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgspec

from headrace.core.device import CPU
from headrace.repository.layout import ModelFolder, VersionFiles
from headrace.repository.model_config import InstanceConfig, ModelConfig
from headrace_backends.optimize.form import Form
from headrace_backends.optimize.plan import REPLAY_FILE, Plan
from headrace_backends.registry import canonical

OWN_CODE = ("python", "fake")  # backends whose models are their owner's code: there is no other form of them

_THREADS = "intra_op_threads"


class Unfit(Exception):
    """The plan holds, and the model's owner asks for something else; the message says what."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan as it is to be served. ``folder`` is the plan's."""

    plan: Plan
    folder: Path
    config: ModelConfig
    files: VersionFiles
    print: str  # changes when the plan does

    @property
    def replay(self) -> Path:
        """The recorded requests."""
        return self.folder / REPLAY_FILE

    @property
    def name(self) -> str:
        """The form, for tables and logs."""
        return self.plan.form.name


def planned_form(plan: Plan, place: Path, folder: ModelFolder, files: VersionFiles) -> Planned:
    """How a version is served by a plan that lies in ``place``.

    Raises:
        Unfit: the configuration does not allow it.
    """
    config = folder.config
    _check_wishes(plan, config)
    form = plan.form
    model_path = place / plan.artifact if plan.artifact else files.model_path
    rows = [most for most in (form.max_batch_size, config.max_batch_size) if most is not None]
    digest = blake2b(msgspec.json.encode(plan), digest_size=8).hexdigest()
    return Planned(
        plan,
        place,
        config.model_copy(
            update={
                "backend": form.backend,
                "parameters": _parameters(form, files.backend, config),
                "max_batch_size": min(rows, default=None),
                "instances": _instances(form, files.backend, config),
            }
        ),
        VersionFiles(files.version, form.backend, model_path, files.print, _bytes_below(place, files)),
        digest,
    )


def why_no_plan(config: ModelConfig) -> str:
    """Why a model with this configuration is always served as it was dropped in; empty where it is not."""
    for set_, what in (
        (config.ensemble, "an ensemble runs nothing itself"),
        (config.sequence, "a model of sequences is served as it was dropped in"),
        (config.decoupled, "a decoupled model is served as it was dropped in"),
    ):
        if set_:
            return what
    devices = sorted({group.device for group in config.instances})
    return f"its instances are on several devices ({', '.join(devices)}), and a plan is for one" if devices[1:] else ""


def device_of(config: ModelConfig, backend: str) -> str:
    """Where a model that may have a plan runs, by its first instances: they are all on one device."""
    return device_for(config.instances[0].device, backend)


def device_for(configured: str, backend: str) -> str:
    """Where an instance runs: what is configured for the CPU TensorRT runs on the first GPU all the same."""
    return "gpu:0" if configured == CPU and backend == "tensorrt" else configured


def _check_wishes(plan: Plan, config: ModelConfig) -> None:
    wishes = config.optimize
    if wishes is None:
        return  # somebody has made the plan for it on purpose
    budget = wishes.budget.budget() if wishes.budget is not None else None
    for what, made_for, wanted in (
        ("budget", plan.budget, budget),
        ("allow", sorted(plan.allow), sorted(wishes.allow)),
        ("objective", plan.objective, str(wishes.objective)),
    ):
        if made_for != wanted:
            raise Unfit(f"it was made for another {what}: {_told(made_for)}, and {_told(wanted)} is configured")


def _told(value: object) -> str:
    if isinstance(value, list):
        return f"[{', '.join(value)}]"
    return "none" if value is None else str(value)


def _parameters(form: Form, backend: str, config: ModelConfig) -> dict[str, Any]:
    """The form's parameters, and the owner's on top as far as they are for its backend."""
    own = dict(config.parameters)
    if canonical(form.backend) != canonical(backend):
        own = {_THREADS: own[_THREADS]} if _THREADS in own else {}
    asked = {_THREADS: form.threads} if form.threads else {}
    return {**form.parameters, **asked, **own}


def _instances(form: Form, backend: str, config: ModelConfig) -> tuple[InstanceConfig, ...]:
    """As configured, or as many as the form has; all on the device that it was made for."""
    asked = config.instances if "instances" in config.model_fields_set else (InstanceConfig(count=form.instances),)
    device = device_of(config, backend)
    return tuple(one if one.device == device else one.model_copy(update={"device": device}) for one in asked)


def _bytes_below(place: Path, files: VersionFiles) -> int:
    """What the form's files take; the model's own where it has none."""
    found = sum(file.stat().st_size for file in place.rglob("*") if file.is_file() and file.name != REPLAY_FILE)
    return found or files.model_bytes

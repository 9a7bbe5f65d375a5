"""What the optimiser beside the server may work on, what there is room for, and its command."""

import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from headrace.background.schedule import Room, Subject
from headrace.core.device import CPU
from headrace.core.machine_memory import read_memory
from headrace.plan_choices import served_form
from headrace.repository.form import version_print
from headrace.repository.planned import OWN_CODE, device_of, why_no_plan
from headrace.repository.plans import Plans
from headrace.repository.repository import Repository, Served
from headrace.repository.served import ServedVersion


def subjects_of(repository: Repository, plans: Plans | None) -> list[Subject]:
    """The newest version of each model whose owner asks for a plan; none before all models were loaded once."""
    if not repository.settled or plans is None:
        return []
    return [_subject(served, plans) for served in _newest(repository.served()) if wants_plan(served)]


def wants_plan(served: Served) -> bool:
    """Whether the owner asks for it, and there may be one."""
    config = served.folder.config
    return (
        isinstance(served, ServedVersion)
        and config.optimize is not None
        and served.files.backend not in OWN_CODE
        and not why_no_plan(config)
        and device_of(config, served.files.backend) == CPU  # no measure says that a GPU is idle
    )


def command_for(subject: Subject, repository: Path, plan_cache: Path) -> list[str]:
    """The optimiser's command line."""
    return [
        sys.executable,
        "-m",
        "headrace",
        "optimize",
        subject.model,
        "--version",
        subject.version,
        "--repository",
        str(repository),
        "--plan-cache",
        str(plan_cache),
        "--background",
    ]


def read_room(plan_cache: Path) -> Room:
    """What is free now of memory, and of disk where plans are made."""
    at = plan_cache
    while not at.exists() and at != at.parent:
        at = at.parent
    return Room(read_memory().free_bytes, shutil.disk_usage(at).free)


def _newest(served: Iterable[Served]) -> Iterator[Served]:
    newest: dict[str, Served] = {}
    for one in served:
        known = newest.get(one.folder.name)
        if known is None or known.files.version < one.files.version:
            newest[one.folder.name] = one
    yield from (newest[name] for name in sorted(newest, key=os.fsencode))


def _subject(served: Served, plans: Plans) -> Subject:
    form = served_form(served, plans)
    basis = version_print(served.folder, served.files.version)
    return Subject(
        served.folder.name,
        served.version,
        basis,
        form.planned,
        "" if form.planned else form.why,
        served.files.model_bytes,
    )

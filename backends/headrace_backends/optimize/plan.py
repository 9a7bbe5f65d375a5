"""A plan: the form in which a model version is served, with the proof that it is as good as its owner asked for."""

from pathlib import Path

import msgspec

from headrace.core.model import Signature
from headrace_backends.optimize.accuracy import Budget, Errors
from headrace_backends.optimize.findings import Hardware, Point
from headrace_backends.optimize.form import Form

FORMAT = 1
PLAN_FILE = "plan.json"
REPLAY_FILE = "replay.npz"


class Basis(msgspec.Struct, frozen=True):
    """What a plan was made for. One that was made for anything else is stale."""

    model: str  # a hash of everything in the version's folder, and of what the configuration says of tensors
    hardware: Hardware
    versions: dict[str, str]  # of the libraries that its form depends on


class Plan(msgspec.Struct, frozen=True, omit_defaults=True):
    """What lies in ``plan.json`` beside the artifact and the recorded answers.

    ``artifact`` is the model file below the plan's folder, empty where the form's is the one that was dropped in.
    ``files`` has the hash of every file of the plan but this one. ``tolerance`` is what the answers of ``replay.npz``
    may change by, as a share of the largest value of an output. ``signature`` is the reference's, as its backend
    tells it: the form is to have the same.
    """

    model: str
    version: str
    basis: Basis
    form: Form
    artifact: str
    files: dict[str, str]
    budget: Budget | None
    allow: tuple[str, ...]
    objective: str
    examples: str
    errors: Errors  # on the held-back half, against the reference
    speedup: float
    curve: tuple[Point, ...]
    reference_curve: tuple[Point, ...]
    made_at: str
    tolerance: float = 1e-2
    signature: Signature | None = None
    format: int = FORMAT


class BadPlan(Exception):
    """A plan that cannot be used; the message says why."""


def read_plan(folder: Path) -> Plan:
    """The plan in a folder, its files not yet looked at.

    Raises:
        BadPlan: it is broken, or of another format.
    """
    try:
        plan = msgspec.json.decode((folder / PLAN_FILE).read_bytes(), type=Plan)
    except (OSError, msgspec.DecodeError) as error:
        raise BadPlan(f"{PLAN_FILE} cannot be read: {error}") from error
    if plan.format != FORMAT:
        raise BadPlan(f"{PLAN_FILE} is of format {plan.format}, this version writes {FORMAT}")
    return plan


def write_plan(folder: Path, plan: Plan) -> None:
    """Put the plan beside its files. Whole or not at all: a reader never sees half of it."""
    new = folder / f".{PLAN_FILE}.new"
    new.write_bytes(msgspec.json.format(msgspec.json.encode(plan), indent=1))
    new.replace(folder / PLAN_FILE)

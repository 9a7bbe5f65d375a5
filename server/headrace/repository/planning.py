"""An ensemble's folder and the models that serve, into its plan."""

from collections.abc import Callable, Mapping

from headrace.core.ensemble import EnsemblePlan, EnsembleProblem, find_circle, plan_ensemble
from headrace.repository.layout import ModelFolder
from headrace.repository.lifecycle import State, Unloaded
from headrace.repository.model_record import ModelRecord, Served, parts_of, served_versions
from headrace.repository.served_ensemble import ServedEnsemble

Find = Callable[[str, str], Served | None]


def plan_folder(folder: ModelFolder, records: Mapping[str, ModelRecord], find: Find) -> EnsemblePlan:
    """How the ensemble in ``folder`` is to be run by what serves now; ``find`` gives what serves a model and version.

    Raises:
        EnsembleProblem: with everything that stands against it.
    """
    return _plan(folder, records, find, {name: record.parts for name, record in records.items()})


def still_holds(served: Served, records: Mapping[str, ModelRecord], find: Find) -> bool:
    """Whether what serves can go on as it is, whatever else may be wanted; nothing but ensembles can not."""
    if not isinstance(served, ServedEnsemble):
        return True
    uses = {name: record.serving_parts for name, record in records.items()}
    try:
        return _plan(served.folder, records, find, uses) == served.plan
    except EnsembleProblem:
        return False


def _plan(
    folder: ModelFolder, records: Mapping[str, ModelRecord], find: Find, uses: dict[str, set[str]]
) -> EnsemblePlan:
    circle = find_circle(folder.name, {**uses, folder.name: set(parts_of(folder))})
    if circle:
        raise EnsembleProblem([f"ensembles are made of each other in a circle: {' -> '.join(circle)}"])
    steps = [step.step() for step in folder.config.ensemble]
    parts = {step.part: find(*step.part) for step in steps}
    missing = [
        f"{_part_name(*part)} is not served: {_why_unserved(part[1], records.get(part[0]))}"
        for part, served in parts.items()
        if served is None
    ]
    if missing:
        raise EnsembleProblem(missing)
    return plan_ensemble(
        folder.name,
        steps,
        [tensor.spec() for tensor in folder.config.inputs],
        [tensor.spec() for tensor in folder.config.outputs],
        {part: served.info.signature for part, served in parts.items() if served is not None},
        folder.config.max_batch_size,
    )


def users_of(name: str, records: Mapping[str, ModelRecord]) -> list[str]:
    """The ensembles that are wanted and have this model in them."""
    return [other for other, record in records.items() if name in record.parts]


def _part_name(model: str, version: str) -> str:
    return f"its model '{model}'" + (f" version {version}" if version else "")


def _why_unserved(version: str, record: ModelRecord | None) -> str:
    if record is None or not record.known:
        return "it is not loaded"
    statuses = {str(number): status for number, status in record.statuses.items()}
    if version and version not in statuses:
        served = served_versions(record)
        return f"it has no such version; {served} are served" if served else "it has no such version"
    looked_at = [statuses[version]] if version else list(statuses.values())
    if any(status.state is State.LOADING for status in looked_at):
        return "it is being loaded"
    reasons = [*record.problems, *(status.reason or Unloaded().reason for status in looked_at)]
    return "; ".join(reasons) or "it has no version"

"""How a model's instances share out the CPUs that may be used."""

from headrace.core.cpus import usable_cpus

__all__ = ["threads_for", "usable_cpus"]


def threads_for(cpus: int, instances: int, wanted: int | None = None) -> int:
    """Threads for each of a model's ``instances``, so that they add up to no more than the ``cpus``.

    ``wanted`` (from the model's configuration) is granted as far as CPUs exist. Models do not share the CPUs out
    among each other here: they take turns (turns.py), so that one alone at work has them all.
    """
    if wanted is not None:
        return max(1, min(wanted, cpus))
    return max(1, cpus // max(1, instances))

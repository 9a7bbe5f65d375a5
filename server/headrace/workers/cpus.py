"""How many CPUs this process may really use, and how they are shared out."""

import math
import os
from pathlib import Path


def usable_cpus(cgroup_root: Path = Path("/sys/fs/cgroup"), self_cgroup: Path = Path("/proc/self/cgroup")) -> int:
    """CPUs by affinity and cgroup quota (v2 and v1), at least 1. ``os.cpu_count`` sees neither."""
    affinity = len(os.sched_getaffinity(0))
    quotas = [*_quotas_v2(cgroup_root, self_cgroup), *_quotas_v1(cgroup_root)]
    return max(1, min([affinity, *(math.ceil(quota) for quota in quotas)]))


def _quotas_v2(root: Path, self_cgroup: Path) -> list[float]:
    """The quota of every level from this process's group up: the tightest counts."""
    quotas = []
    for folder in _own_folders(root, self_cgroup):
        text = _read(folder / "cpu.max").split()
        if len(text) == 2 and text[0] != "max":
            quotas.append(int(text[0]) / int(text[1]))
    return quotas


def _own_folders(root: Path, self_cgroup: Path) -> list[Path]:
    for line in _read(self_cgroup).splitlines():
        if line.startswith("0::"):
            folder = root / line[3:].strip("/")
            return [folder, *(parent for parent in folder.parents if parent.is_relative_to(root))]
    return [root]


def _quotas_v1(root: Path) -> list[float]:
    quota, period = _read(root / "cpu" / "cpu.cfs_quota_us"), _read(root / "cpu" / "cpu.cfs_period_us")
    if quota and period and int(quota) > 0:
        return [int(quota) / int(period)]
    return []


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def threads_for(cpus: int, instances: int, wanted: int | None = None) -> int:
    """Threads for each of a model's ``instances``, so that they add up to no more than the ``cpus``.

    ``wanted`` (from the model's configuration) is granted as far as CPUs exist. Models do not share the CPUs out
    among each other here: they take turns (turns.py), so that one alone at work has them all.
    """
    if wanted is not None:
        return max(1, min(wanted, cpus))
    return max(1, cpus // max(1, instances))

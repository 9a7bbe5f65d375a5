"""How many CPUs this process may really use."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

from headrace.core.cgroups import ROOT, SELF, groups_v1, groups_v2, read


def usable_cpus(cgroup_root: Path = ROOT, self_cgroup: Path = SELF) -> int:
    """CPUs by affinity and cgroup quota (v2 and v1), at least 1. ``os.cpu_count`` sees neither.

    Of a quota every level from this process's group up counts, and the tightest is the one. It is read anew with each
    call, since it may be changed under a running container.
    """
    affinity = len(os.sched_getaffinity(0))
    quotas = [*_quotas_v2(cgroup_root, self_cgroup), *_quotas_v1(cgroup_root, self_cgroup)]
    return max(1, min([affinity, *(math.ceil(quota) for quota in quotas)]))


def _quotas_v2(root: Path, self_cgroup: Path) -> Iterator[float]:
    for group in groups_v2(root, self_cgroup):
        text = read(group / "cpu.max").split()
        if len(text) == 2 and text[0] != "max":
            yield int(text[0]) / int(text[1])


def _quotas_v1(root: Path, self_cgroup: Path) -> Iterator[float]:
    for group in groups_v1("cpu", root, self_cgroup):
        quota, period = read(group / "cpu.cfs_quota_us"), read(group / "cpu.cfs_period_us")
        if quota and period and int(quota) > 0:
            yield int(quota) / int(period)

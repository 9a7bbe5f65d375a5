"""How many CPUs may be used, read from made-up control groups, and how they are shared out."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.workers.cpus import threads_for, usable_cpus


@pytest.fixture
def affinity(monkeypatch):
    def set_to(cpus):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cpus)))

    set_to(16)
    return set_to


@pytest.fixture
def machine(tmp_path, affinity):
    """A function that writes a control group tree and counts the CPUs."""
    root = tmp_path / "cgroup"
    root.mkdir()
    own = tmp_path / "self"

    def count(files, group="0::/\n"):
        own.write_text(group)
        for name, text in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return usable_cpus(root, own)

    return count


def test_without_any_quota_affinity_decides(machine, affinity):
    assert machine({}) == 16
    affinity(3)
    assert machine({}) == 3


def test_without_control_groups_affinity_decides(tmp_path, affinity):
    assert usable_cpus(tmp_path / "none", tmp_path / "none either") == 16


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("max 100000\n", 16),
        ("200000 100000\n", 2),
        ("400000 200000", 2),
        ("50000 100000", 1),
        ("1000 100000", 1),
        ("150000 100000", 2),
        ("9900000 100000", 16),
        ("", 16),
    ],
)
def test_the_quota_of_a_container(machine, text, cpus):
    assert machine({"cpu.max": text}) == cpus


def test_the_tightest_level_from_its_own_group_up_counts(machine):
    files = {
        "cpu.max": "max 100000",
        "pods/cpu.max": "300000 100000",
        "pods/one/cpu.max": "800000 100000",
        "pods/other/cpu.max": "100000 100000",
    }
    assert machine(files, "0::/pods/one\n") == 3


def test_affinity_can_be_tighter_than_the_quota(machine, affinity):
    affinity(2)
    assert machine({"cpu.max": "400000 100000"}) == 2


@pytest.mark.parametrize(("quota", "cpus"), [("-1\n", 16), ("300000\n", 3), ("25000\n", 1)])
def test_version_one_of_control_groups(machine, quota, cpus):
    files = {"cpu/cpu.cfs_quota_us": quota, "cpu/cpu.cfs_period_us": "100000\n"}
    assert machine(files, "4:cpu,cpuacct:/docker/abc\n3:memory:/docker/abc\n") == cpus


@pytest.mark.parametrize(("own", "cpus"), [("/docker/abc", 3), ("/docker", 5), ("/", 8), ("/from/outside", 8)], ids=str)
def test_the_tightest_level_of_version_one_counts(machine, own, cpus):
    files = {}
    for folder, quota in (("", 800000), ("/docker", 500000), ("/docker/abc", 300000)):
        files[f"cpu,cpuacct{folder}/cpu.cfs_quota_us"] = str(quota)
        files[f"cpu,cpuacct{folder}/cpu.cfs_period_us"] = "100000"
    assert machine(files, f"5:memory:/other\n4:cpu,cpuacct:{own}\n0::/\n") == cpus


def test_a_quota_that_changes_is_read_anew(machine):
    assert machine({"cpu.max": "400000 100000"}) == 4
    assert machine({"cpu.max": "200000 100000"}) == 2


def test_this_machine_has_one_at_least():
    assert 1 <= usable_cpus() <= len(os.sched_getaffinity(0))


def test_a_models_instances_share_out_the_cpus():
    assert threads_for(cpus=8, instances=1) == 8
    assert threads_for(cpus=8, instances=3) == 2


def test_an_instance_has_its_own_thread_even_when_there_are_more_than_cpus():
    assert threads_for(cpus=2, instances=1400) == 1


@pytest.mark.parametrize(("wanted", "granted"), [(1, 1), (3, 3), (4, 4), (64, 4), (0, 1), (-2, 1)])
def test_what_the_configuration_wants_is_granted_as_far_as_there_are_cpus(wanted, granted):
    assert threads_for(cpus=4, instances=9, wanted=wanted) == granted


@given(cpus=st.integers(1, 64), instances=st.integers(1, 64))
def test_threads_of_one_model_never_exceed_the_cpus_where_each_instance_can_have_one(cpus, instances):
    threads = threads_for(cpus, instances)
    assert threads >= 1
    if instances <= cpus:
        assert instances * threads <= cpus

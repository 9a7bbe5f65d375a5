"""The driver's short slices, as the kernel tells them."""

import ctypes
import os
import platform
import struct
from concurrent.futures import ThreadPoolExecutor

import pytest
from loadtests import time_slice

GET = {"x86_64": 315, "aarch64": 275}.get(platform.machine())  # sched_getattr


def told() -> tuple[int, int]:
    """Policy and runtime of this thread."""
    memory = ctypes.create_string_buffer(56)
    assert ctypes.CDLL(None).syscall(GET, 0, memory, len(memory), 0) == 0
    return struct.unpack_from("=I", memory, 4)[0], struct.unpack_from("=Q", memory, 24)[0]


@pytest.mark.skipif(GET is None, reason=f"the number of the call is not known for {platform.machine()}")
def test_a_thread_has_short_slices_and_others_have_not():
    def ask() -> tuple[bool, tuple[int, int]]:
        return time_slice.shorten(), told()

    before = told()
    with ThreadPoolExecutor(1) as one:
        asked, (policy, runtime_ns) = one.submit(ask).result()
    if before[0] == os.SCHED_OTHER:
        assert asked
        assert runtime_ns in (time_slice.SLICE_NS, 0)  # 0 before Linux 6.12
    else:
        assert not asked
    assert policy == before[0]
    assert told() == before


def test_another_policy_stays_as_it_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getscheduler", lambda _: os.SCHED_BATCH)
    assert not time_slice.shorten()


def test_a_machine_whose_call_is_not_known(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(platform, "machine", lambda: "abacus")
    assert not time_slice.shorten()

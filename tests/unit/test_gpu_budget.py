"""Which loads a GPU's memory has room for, and what is said where it has none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.workers.gpu_budget import Gpu, GpuBudget, GpuLimits, NoGpuRoom

MIB = 1 << 20
GPU = Gpu("GPU-1", "NVIDIA L4", 1000 * MIB)
OTHER = Gpu("GPU-2", "NVIDIA L4", 500 * MIB)


@pytest.mark.parametrize(
    ("limits", "expected_mib"),
    [
        (GpuLimits(), 1000),
        (GpuLimits(nbytes=600 * MIB), 600),
        (GpuLimits(nbytes=6000 * MIB), 1000),
        (GpuLimits(fraction=0.5), 500),
        (GpuLimits(600 * MIB, 0.5), 500),
        (GpuLimits(400 * MIB, 0.5), 400),
    ],
)
def test_the_smaller_limit_counts_and_nobody_has_more_than_there_is(limits, expected_mib):
    assert limits.of(GPU) == expected_mib * MIB


def test_no_limit_is_none():
    assert not GpuLimits()
    assert GpuLimits(nbytes=1)
    assert GpuLimits(fraction=0.1)


def test_the_reason_names_the_model_the_gpu_what_is_needed_and_what_is_free():
    budget = GpuBudget(GpuLimits(fraction=0.9))
    budget.admit(1, "a", "gpu:0", GPU, 500 * MIB)
    budget.admit(2, "b", "gpu:GPU-1", GPU, 300 * MIB)
    with pytest.raises(NoGpuRoom) as refused:
        budget.admit(3, "c", "gpu:0", GPU, 101 * MIB)
    assert str(refused.value) == (
        "model 'c' needs about 101 MiB of the memory of gpu:0 (NVIDIA L4), and 100 MiB are free: models may have "
        "900 MiB of its 1000 MiB (--gpu-memory-bytes, --gpu-memory-fraction), 'a' has 500 MiB, 'b' has 300 MiB"
    )
    budget.admit(3, "c", "gpu:0", GPU, 100 * MIB)
    budget.admit(4, "c", "gpu:1", OTHER, 450 * MIB)  # the other one is full by itself
    assert (budget.held_bytes("GPU-1"), budget.held_bytes("GPU-2")) == (900 * MIB, 450 * MIB)


def test_of_many_others_the_largest_are_named():
    budget = GpuBudget(GpuLimits(nbytes=100 * MIB))
    for number in range(5):
        budget.admit(number, f"m{number}", "gpu:0", GPU, (number + 1) * MIB)
    with pytest.raises(NoGpuRoom, match="'m4' has 5 MiB, 'm3' has 4 MiB, 'm2' has 3 MiB, 2 more the rest"):
        budget.admit(9, "large", "gpu:0", GPU, 90 * MIB)
    with pytest.raises(NoGpuRoom, match=r"and 100 MiB are free: .*, and nobody else has any$"):
        GpuBudget(GpuLimits(nbytes=100 * MIB)).admit(9, "large", "gpu:0", GPU, 101 * MIB)


def test_what_is_measured_takes_the_place_of_what_was_expected():
    budget = GpuBudget(GpuLimits(nbytes=100 * MIB))
    budget.admit(1, "a", "gpu:0", GPU, 10 * MIB)
    budget.settle(1, 60 * MIB)
    budget.admit(2, "b", "gpu:0", GPU, 10 * MIB)
    with pytest.raises(NoGpuRoom, match=r"model 'b' takes 41 MiB of .* and 40 MiB are free"):
        budget.settle(2, 41 * MIB)
    assert budget.held_bytes("GPU-1") == 70 * MIB  # as before, until it is unloaded
    budget.release(2)
    budget.release(2)
    budget.admit(3, "c", "gpu:0", GPU, 40 * MIB)


def test_whoever_would_fit_without_those_that_leave_can_wait():
    budget = GpuBudget(GpuLimits(nbytes=100 * MIB))
    budget.admit(1, "a", "gpu:0", GPU, 60 * MIB)
    budget.admit(2, "b", "gpu:0", GPU, 40 * MIB)
    for number in (2, 7):
        budget.leaves(number)
    with pytest.raises(NoGpuRoom) as refused:
        budget.admit(3, "c", "gpu:0", GPU, 41 * MIB)
    assert not refused.value.soon
    with pytest.raises(NoGpuRoom) as refused:
        budget.admit(3, "c", "gpu:0", GPU, 40 * MIB)
    assert refused.value.soon
    budget.release(2)
    budget.admit(2, "c", "gpu:0", GPU, 30 * MIB)  # a number that left says nothing of a new one
    with pytest.raises(NoGpuRoom) as refused:
        budget.admit(3, "d", "gpu:0", GPU, 30 * MIB)
    assert not refused.value.soon


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from("amr"), st.integers(0, 120)), max_size=40))
def test_sums_never_pass_the_limit(events):
    budget, held = GpuBudget(GpuLimits(nbytes=200)), {}
    for number, what, nbytes in events:
        if what == "r":
            budget.release(number)
            held.pop(number, None)
        elif what == "a" and number not in held:
            if sum(held.values()) + nbytes > 200:
                with pytest.raises(NoGpuRoom):
                    budget.admit(number, "m", "gpu:0", GPU, nbytes)
            else:
                budget.admit(number, "m", "gpu:0", GPU, nbytes)
                held[number] = nbytes
        elif what == "m" and number in held:
            if sum(held.values()) - held[number] + nbytes > 200:
                with pytest.raises(NoGpuRoom):
                    budget.settle(number, nbytes)
            else:
                budget.settle(number, nbytes)
                held[number] = nbytes
        assert budget.held_bytes("GPU-1") == sum(held.values()) <= 200

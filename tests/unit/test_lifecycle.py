"""Version states, and what a change of the repository does to the versions that serve."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.repository.lifecycle import (
    Change,
    ImpossibleTransition,
    Loaded,
    LoadFailed,
    LoadStarted,
    State,
    Unloaded,
    UnloadStarted,
    VersionStatus,
    WorkersLost,
    plan_change,
    settle,
    step,
)

EVENTS = (LoadStarted(), Loaded(), LoadFailed("broken"), WorkersLost("killed"), UnloadStarted(), Unloaded())

# What each event makes of each state; a pair that is not here is impossible.
TRANSITIONS = {
    (State.UNAVAILABLE, LoadStarted): VersionStatus(State.LOADING),
    (State.UNAVAILABLE, LoadFailed): VersionStatus(State.UNAVAILABLE, "broken"),
    (State.LOADING, Loaded): VersionStatus(State.READY),
    (State.LOADING, LoadFailed): VersionStatus(State.UNAVAILABLE, "broken"),
    (State.LOADING, WorkersLost): VersionStatus(State.LOADING, "killed"),
    (State.LOADING, UnloadStarted): VersionStatus(State.UNLOADING),
    (State.READY, LoadStarted): VersionStatus(State.READY, "before"),
    (State.READY, Loaded): VersionStatus(State.READY),
    (State.READY, LoadFailed): VersionStatus(State.READY, "broken"),
    (State.READY, WorkersLost): VersionStatus(State.LOADING, "killed"),
    (State.READY, UnloadStarted): VersionStatus(State.UNLOADING),
    (State.UNLOADING, LoadStarted): VersionStatus(State.LOADING),
    (State.UNLOADING, LoadFailed): VersionStatus(State.UNLOADING, "broken"),
    (State.UNLOADING, WorkersLost): VersionStatus(State.UNLOADING, "before"),
    (State.UNLOADING, Unloaded): VersionStatus(State.UNAVAILABLE, "before"),
}


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
@pytest.mark.parametrize("state", State)
def test_step(state, event):
    status = VersionStatus(state, "before")
    expected = TRANSITIONS.get((state, type(event)))
    if expected is None:
        with pytest.raises(ImpossibleTransition, match=f"{type(event).__name__} in state {state}"):
            step(status, event)
    else:
        assert step(status, event) == expected


def test_states_are_tritons_words():
    assert [str(state) for state in State] == ["UNAVAILABLE", "LOADING", "READY", "UNLOADING"]


def test_a_version_that_is_unloaded_for_a_reason_keeps_it():
    status = step(VersionStatus(State.READY, "old"), UnloadStarted("its model is gone"))
    assert status == VersionStatus(State.UNLOADING, "its model is gone")
    assert step(status, Unloaded()) == VersionStatus(State.UNAVAILABLE, "its model is gone")
    assert step(step(VersionStatus(State.READY, "old"), UnloadStarted()), Unloaded()).reason == "unloaded"


def test_a_life():
    status = VersionStatus()
    for event, state in [
        (LoadStarted(), State.LOADING),
        (LoadFailed("no such op"), State.UNAVAILABLE),
        (LoadStarted(), State.LOADING),
        (Loaded(), State.READY),
        (WorkersLost("killed by signal 9"), State.LOADING),
        (Loaded(), State.READY),
        (UnloadStarted(), State.UNLOADING),
        (Unloaded("replaced"), State.UNAVAILABLE),
    ]:
        status = step(status, event)
        assert status.state is state
    assert status.reason == "replaced"


@pytest.mark.parametrize(
    ("serving", "wanted", "change"),
    [
        pytest.param({}, {1: "a"}, Change((1,), (), ()), id="first load"),
        pytest.param({1: "a"}, {1: "a"}, Change((), (1,), ()), id="nothing new"),
        pytest.param({1: "a"}, {1: "b"}, Change((1,), (), (1,)), id="replaced"),
        pytest.param({1: "a"}, {2: "b"}, Change((2,), (), (1,)), id="newer version"),
        pytest.param({1: "a"}, {1: "a", 2: "b"}, Change((2,), (1,), ()), id="one more"),
        pytest.param({2: "b", 1: "a"}, {}, Change((), (), (1, 2)), id="unloaded"),
        pytest.param({3: "c", 1: "a"}, {3: "x", 10: "d", 2: "b"}, Change((2, 3, 10), (), (1, 3)), id="sorted"),
    ],
)
def test_plan_change(serving, wanted, change):
    assert plan_change(serving, wanted) == change


@pytest.mark.parametrize(
    ("change", "failed", "on_disk", "retired"),
    [
        pytest.param(Change((2,), (), (1,)), set(), {1, 2}, {1}, id="newer version loaded"),
        pytest.param(Change((2,), (), (1,)), {2}, {1, 2}, set(), id="newer version failed"),
        pytest.param(Change((2,), (), (1,)), {2}, {2}, {1}, id="newer version failed, older one deleted"),
        pytest.param(Change((1,), (), (1,)), set(), {1}, {1}, id="replaced"),
        pytest.param(Change((1,), (), (1,)), {1}, {1}, set(), id="replacement failed"),
        pytest.param(Change((1, 2), (), (1,)), {2}, {1, 2}, {1}, id="replaced, another failed"),
        pytest.param(Change((2, 3), (), (1,)), {3}, {1, 2, 3}, set(), id="one of two failed"),
        pytest.param(Change((), (1,), (2,)), set(), {1, 2}, {2}, id="no longer wanted"),
        pytest.param(Change((), (), (1,)), set(), set(), {1}, id="deleted"),
    ],
)
def test_settle(change, failed, on_disk, retired):
    assert settle(change, failed, on_disk) == retired


def test_settle_refuses_failures_of_what_was_not_loaded():
    with pytest.raises(AssertionError):
        settle(Change((2,), (1,), ()), {1}, {1, 2})


PRINTS = st.dictionaries(st.integers(1, 5), st.sampled_from("ab"), max_size=5)


@given(serving=PRINTS, wanted=PRINTS, data=st.data())
def test_a_failed_load_never_costs_a_serving_version(serving, wanted, data):
    change = plan_change(serving, wanted)
    failed = data.draw(st.sets(st.sampled_from(change.load))) if change.load else set()
    on_disk = data.draw(st.sets(st.integers(1, 5)))
    retired = settle(change, failed, on_disk)
    loaded = set(change.load) - failed

    serves = (serving.keys() - retired) | loaded
    if failed:
        assert serves >= serving.keys() & on_disk
    else:
        assert serves == wanted.keys()
    # What is replaced does not serve twice, what has not changed is not touched, what never served cannot go.
    assert loaded & serving.keys() <= retired
    assert retired.isdisjoint(change.keep)
    assert retired <= serving.keys()


@given(serving=PRINTS, wanted=PRINTS)
def test_a_plan_covers_everything_once(serving, wanted):
    change = plan_change(serving, wanted)
    assert {*change.load, *change.keep} == wanted.keys()
    assert {*change.keep, *change.retire} == serving.keys()
    assert not {*change.keep} & {*change.load, *change.retire}
    assert all(serving[version] != wanted[version] for version in {*change.load} & {*change.retire})

"""Named resources that instances share, over lists of events."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.workers.rate_limit import parse_counts
from headrace.workers.resources import EVERY_DEVICE, GLOBAL, Claim, Resources, Unschedulable

R1, R2 = ("cpu", "R1"), ("cpu", "R2")


def resources_of(*claims, counts=None):
    made = Resources(counts or {})
    for claim in claims:
        made.add(claim)
    return made


def test_by_default_there_is_as_much_as_the_neediest_instance_needs():
    claims = [Claim("a", {R1: 4, R2: 4}), Claim("b", {R2: 5}), Claim("c", {R1: 1})]
    resources = resources_of(*claims)
    assert resources.usage() == {R1: (0, 4), R2: (0, 5)}
    for claim in claims:
        resources.ask(claim)
    assert resources.grants() == [claims[0]]
    resources.end(claims[0])
    assert resources.grants() == claims[1:]
    assert resources.usage() == {R1: (1, 4), R2: (5, 5)}
    resources.end(claims[2])
    resources.remove(claims[0])
    assert resources.usage() == {R1: (0, 1), R2: (5, 5)}


def test_devices_have_their_own_and_the_server_has_one_for_all():
    claims = [Claim("a", {("gpu:0", "R"): 1}), Claim("a", {("gpu:1", "R"): 1})]
    one_for_all = [Claim("b", {(GLOBAL, "G"): 1}), Claim("c", {(GLOBAL, "G"): 1})]
    resources = resources_of(*claims, *one_for_all)
    for claim in (*claims, *one_for_all):
        resources.ask(claim)
    assert resources.grants() == [*claims, one_for_all[0]]


def test_what_the_owner_has_said_counts_and_who_could_never_run_is_refused():
    counts = parse_counts(["R:10", "S:5:0", "S:8:1", "G:2", "C:3:cpu"])
    assert counts == {
        (EVERY_DEVICE, "R"): 10,
        ("gpu:0", "S"): 5,
        ("gpu:1", "S"): 8,
        (EVERY_DEVICE, "G"): 2,
        ("cpu", "C"): 3,
    }
    resources = Resources(counts)
    resources.add(Claim("a", {("gpu:0", "R"): 10, ("gpu:0", "S"): 5}))
    resources.add(Claim("a", {("gpu:1", "S"): 8, (GLOBAL, "G"): 2}))
    assert resources.usage() == {
        (GLOBAL, "G"): (0, 2),
        ("gpu:0", "R"): (0, 10),
        ("gpu:0", "S"): (0, 5),
        ("gpu:1", "S"): (0, 8),
    }
    with pytest.raises(Unschedulable, match=r"needs 6 of resource 'S' .* at most 5, .* on gpu:0"):
        resources.add(Claim("b", {("gpu:0", "S"): 6}))
    with pytest.raises(Unschedulable, match=r"needs 1 of resource 'T' .* at most 0, .* on cpu"):
        resources.add(Claim("b", {("cpu", "T"): 1}))
    with pytest.raises(Unschedulable, match=r"needs 3 of resource 'G' .* at most 2, .* in the server"):
        resources.add(Claim("b", {(GLOBAL, "G"): 3}))
    with pytest.raises(Unschedulable, match=r"resource 'R' is global here, and a device's in .* model 'a'"):
        resources.add(Claim("b", {(GLOBAL, "R"): 1}))


@pytest.mark.parametrize("text", ["R", "R:", ":3", "R:-1", "R:1:disk", "R:1:gpu", "R:1:0:0", "R:x"])
def test_what_is_no_count_is_refused(text):
    with pytest.raises(ValueError, match=r"--rate-limit-resource '.*' is not NAME:COUNT"):
        parse_counts([text])


def run(resources, claims, steps):
    """All want to run all the time; whoever has run longest ends first. Gives how often each has run."""
    ran = dict.fromkeys(claims, 0)
    for claim in claims:
        resources.ask(claim)
    running = resources.grants()
    for _ in range(steps):
        done = running.pop(0)
        ran[done] += 1
        resources.end(done, again=True)
        running += resources.grants()
        assert running, "something can always run"
    for claim in claims:
        if claim.holds:
            resources.end(claim)
        else:
            resources.withdraw(claim)
    return list(ran.values())


def test_priorities_are_weights():
    claims = [Claim("a", {R1: 1}, 1), Claim("b", {R1: 1}, 2), Claim("c", {R1: 1}, 4)]
    assert run(resources_of(*claims), claims, 700) == pytest.approx([400, 200, 100], abs=2)


def test_a_model_that_comes_later_does_not_catch_up_at_the_others_cost():
    early, late = Claim("early", {R1: 1}), Claim("late", {R1: 1})
    resources = resources_of(early, late)
    run(resources, [early], 1000)
    ran = run(resources, [early, late], 100)
    assert ran == pytest.approx([50, 50], abs=2)


def test_who_needs_much_is_not_starved_by_those_who_need_little():
    much, little = Claim("much", {R1: 4}), [Claim(f"m{i}", {R1: 1}) for i in range(4)]
    ran = run(resources_of(much, *little), [*little, much], 500)
    assert ran[-1] >= 90


def test_what_nobody_competes_for_is_not_held_up():
    holder, blocked, other = Claim("a", {R1: 1}), Claim("b", {R1: 1, R2: 1}), Claim("c", {("cpu", "R3"): 1})
    sharer = Claim("d", {R2: 1})
    resources = resources_of(holder, blocked, other, sharer)
    resources.ask(holder)
    assert resources.grants() == [holder]
    for claim in (blocked, other, sharer):
        resources.ask(claim)
    assert resources.grants() == [other], "R2 is kept for the one that is next"


@given(
    st.lists(
        st.tuples(st.dictionaries(st.sampled_from("RST"), st.integers(1, 3), min_size=1), st.integers(1, 3)),
        min_size=1,
        max_size=6,
    ),
    st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["ask", "end", "withdraw"])), max_size=80),
)
def test_never_more_than_there_is_and_nobody_waits_while_all_is_free(wanted, events):
    claims = [
        Claim(f"m{i}", {("cpu", name): count for name, count in needs.items()}, priority)
        for i, (needs, priority) in enumerate(wanted)
    ]
    resources = resources_of(*claims)
    waiting, holding = [], []
    for index, what in events:
        claim = claims[index % len(claims)]
        if what == "ask" and claim not in waiting and claim not in holding:
            resources.ask(claim)
            waiting.append(claim)
        elif what == "end" and claim in holding:
            holding.remove(claim)
            resources.end(claim, again=index % 2 == 1)
            if index % 2:
                waiting.append(claim)
        elif what == "withdraw" and claim in waiting:
            waiting.remove(claim)
            resources.withdraw(claim)
        for granted in resources.grants():
            waiting.remove(granted)
            holding.append(granted)
        held = {}
        for one in holding:
            assert one.holds
            for resource, count in one.needs.items():
                held[resource] = held.get(resource, 0) + count
        for resource, (used, count) in resources.usage().items():
            assert used == held.get(resource, 0) <= count
        assert not waiting or holding, "with everything free the first always fits"

"""How the story of a model that is optimised while it serves is told: spans, rates, errors and what is missed."""

import numpy as np
import pytest
from loadtests.grpc_message import encode_request
from loadtests.inputs import tensor_of_array
from loadtests.metrics import labels
from loadtests.optimize_sweep import Sweep
from loadtests.served import Plan, Right, Story, planned_form, tell
from loadtests.served_report import Window, cut, judge_answers, lines, plot, rates, timeline
from loadtests.served_traffic import LONGEST_PAUSE_S, Exchange, Pace

from headrace.core.tensor import to_wire
from headrace.wire import pb
from headrace_backends.optimize.accuracy import Budget
from headrace_backends.optimize.goal import Goal

RIGHT = [{"y": np.array([[1.0, 0.0]], np.float32)}, {"y": np.array([[0.0, 1.0]], np.float32)}]
WRONG = np.array([[0.0, 1.0]], np.float32)
GOAL = Goal(Budget("cosine", min=0.99))
PLAN = Plan(goal=1.5, wait_s=60.0, warmup_s=1.0, part_s=1.0, parts=2, calm_s=0.0)


def message(array):
    answer = pb.ModelInferResponse(model_name="m")
    answer.outputs.add(name="y", datatype="FP32", shape=array.shape)
    answer.raw_output_contents.append(bytes(to_wire(array)))
    return answer.SerializeToString()


def exchange(at_s, *, wire="grpc", row=0, took_s=0.01, array=None, problem=None):
    answer = b"" if problem else message(RIGHT[row]["y"] if array is None else array)
    return Exchange(wire, row, at_s - took_s, at_s, answer, problem=problem)


def story(*more, per_s_before=10, per_s_after=40, swap_s=20.0):
    """Dropped in at 0, a burst from 1 to 4, and another one right after the swap."""
    exchanges = [exchange(1 + number / per_s_before) for number in range(3 * per_s_before)]
    if swap_s is not None:
        exchanges += [exchange(swap_s + number / per_s_after, row=1) for number in range(3 * per_s_after)]
    after = None if swap_s is None else Window(swap_s, swap_s + 3)
    return Story([*exchanges, *more], 0.0, 0.5, Window(1.0, 4.0), swap_s, after, "openvino" if swap_s else "")


def told(found, explained=("plan: openvino, 3 x as fast as it was dropped in",)):
    return tell("m", found, Right([], RIGHT, GOAL, "torch"), PLAN, explained)


def test_a_good_story_is_met():
    served = told(story())
    assert served.missed == ()
    assert served.before["grpc"] == pytest.approx(10, rel=0.11)
    assert served.rise == pytest.approx(4, rel=0.15)
    assert served.swap_s == 20.0
    assert {span: errors.examples for span, errors in served.errors.items()} == {"before": 30, "after": 120}
    assert lines(served)[-1] == "  met"


@pytest.mark.parametrize(
    ("found", "missed"),
    [
        (story(exchange(9.0, problem="status 503: overloaded")), "1 of 151 requests failed"),
        (story(exchange(9.0, array=WRONG)), "meanwhile: cosine is 0"),
        (story(exchange(2.0, array=WRONG)), "before: cosine is 0"),
        (story(exchange(22.0, array=WRONG[:, :1])), "after: answers have another shape"),
        (story(per_s_after=12), "the goal is 1.5 times as many"),
        (story(swap_s=None), "no plan was swapped in within 60 s"),
        (story(Exchange("grpc", 0, 8.9, 9.0, b"rubbish")), "meanwhile: an answer over grpc cannot be read"),
    ],
)
def test_what_is_missed_is_told(found, missed):
    (said,) = told(found).missed
    assert missed in said


def test_explain_has_to_tell_of_the_plan():
    assert told(story(), ()).missed == ("headrace explain does not tell of the plan",)


def test_rates_are_the_median_of_the_windows():
    windows = cut(Window(10.0, 17.0), 1.0, 3)
    assert [(one.from_s, one.to_s) for one in windows] == [(11, 13), (13, 15), (15, 17)]
    exchanges = [exchange(10.5), *(exchange(at) for at in (11, 12, 13, 14, 14.5, 15)), exchange(14, problem="gone")]
    assert rates(exchanges, windows) == {"http": 0.0, "grpc": 1.0}


def test_answers_of_a_kind_that_may_be_wrong_now_and_then_are_judged_together():
    mostly = [*[exchange(1.0)] * 99, exchange(1.0, array=WRONG)]
    errors, missed = judge_answers(mostly, RIGHT, Goal(Budget("top1_agreement", min=0.99)))
    assert errors.top1_agreement == pytest.approx(0.99)
    assert missed == []


def test_the_timeline_has_the_percentiles_of_each_second():
    latencies = timeline([exchange(5.2, took_s=0.02), exchange(5.8, took_s=0.04), exchange(7.0, took_s=0.03)], 5.0)
    assert [(second, count) for second, count, _, _ in latencies] == [(0, 2), (2, 1)]
    assert latencies[0][3] == pytest.approx(40, abs=0.1)


def test_a_story_is_drawn(tmp_path):
    plot(told(story()), tmp_path / "served.png")
    assert (tmp_path / "served.png").read_bytes().startswith(b"\x89PNG")


def test_calm_clients_leave_the_machine_idle_and_a_burst_does_not():
    pace = Pace(16, share=0.2)
    latency_s = 0.01
    assert 16 * latency_s / (latency_s + pace.pause_s(latency_s)) == pytest.approx(0.2)
    assert pace.pause_s(3600.0) == LONGEST_PAUSE_S
    pace.calm = False
    assert pace.pause_s(latency_s) == 0.0


def test_the_plan_is_read_off_the_metrics():
    page = (
        '# TYPE headrace_plan_info gauge\nheadrace_plan_info{model="a",version="1",form="torch"} 1\n'
        'headrace_plan_info{model="m",version="1",form="openvino + openvino_int8(keep=\\"x}\\")"} 1\n'
    )
    assert planned_form(page, "m").startswith("openvino + openvino_int8")
    assert planned_form(page, "b") == ""
    assert labels(page, "headrace_plan_info", "a") == {"model": "a", "version": "1", "form": "torch"}


def test_each_call_may_have_a_message_of_its_own():
    import asyncio

    from loadtests.h2_connection import H2Connection

    written = []

    class Transport:
        write = staticmethod(written.append)
        is_closing = staticmethod(lambda: False)
        abort = staticmethod(lambda: None)

    async def call():
        connection = H2Connection("h", "/p", b"usual")
        connection.connection_made(Transport())
        connection.call(lambda *_: None)
        connection.call(lambda *_: None, encode_request("other", [tensor_of_array("x", WRONG)]))
        connection.ready.cancel()

    asyncio.run(call())
    assert b"usual" in written[-2]
    assert b"other" in written[-1]
    assert b"usual" not in written[-1]


@pytest.mark.parametrize(
    ("beside", "search_s", "complete", "missed"),
    [
        (0.96, 20.0, True, ()),
        (0.94, 20.0, True, ("94% of the best's speed, the goal is 95%",)),
        (1.0, 30.0, True, ("the search took 30% of the sweep's time, the goal is 25% at most",)),
        (1.0, 20.0, False, ("the sweep ran out of time, so that its best may not be the best",)),
    ],
)
def test_a_search_is_held_beside_a_sweep(beside, search_s, complete, missed):
    assert Sweep("m", "a", 2.0, "b", 2.1, beside, search_s, 100.0, complete).missed == missed

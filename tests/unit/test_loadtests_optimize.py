"""How the goals of the optimiser's load test are judged."""

import msgspec
import pytest
from loadtests.optimize_models import CASES, Case
from loadtests.optimize_verdict import judge, passed_over

from headrace_backends.optimize.accuracy import Budget, Errors
from headrace_backends.optimize.findings import Fate, Findings, Hardware, Row
from headrace_backends.optimize.form import Form, Step, Technique

EXPORT = Step("export_onnx")
PLAIN = Row(Form("onnxruntime", (EXPORT,)), Fate.KEPT, speedup=3.0)
INT8 = (Technique.INT8_STATIC,)
REFUSED = Row(Form("onnxruntime", (EXPORT, Step("int8_static")), techniques=INT8), Fate.REFUSED, speedup=7.0)
CHOSEN = Row(
    Form("openvino", (EXPORT, Step("openvino_int8")), threads=1),
    Fate.CHOSEN,
    speedup=6.0,
    held_back=Errors(9, cosine=0.995),
)


def findings(*rows, backend="torch"):
    reference = Row(Form(backend), Fate.KEPT, speedup=1.0)
    return Findings(
        *("m", "model.pt2", "2026-01-01", 60.0, "latency", Budget("cosine", min=0.99), (), "some"),
        *(Hardware("cpu", 2, ()), {}, reference, rows, CHOSEN.form, "why"),
    )


def case(goal=5.0, over=None, refused=()):
    return Case("m", lambda _: None, goal, over, refused)


def test_goals_are_met_by_the_chosen_form():
    verdict = judge(case(5.0, 2.0, ("export_onnx + int8_static",)), findings(PLAIN, REFUSED, CHOSEN))
    assert verdict.missed == ()
    assert verdict.over_onnxruntime == pytest.approx(2.0)
    assert "0.9950" in verdict.held_back


@pytest.mark.parametrize(
    ("goal", "rows", "told"),
    [
        (case(7.0), (PLAIN, CHOSEN), "the goal is 7 x"),
        (case(5.0, 2.5), (PLAIN, CHOSEN), "2.00 x over ONNX Runtime"),
        (case(5.0, 1.0), (CHOSEN,), "unknown over ONNX Runtime"),
        (case(refused=("export_onnx + int8_static",)), (PLAIN, CHOSEN), "was not refused"),
        (
            case(refused=("export_onnx + int8_static",)),
            (msgspec.structs.replace(REFUSED, fate=Fate.KEPT), CHOSEN),
            "was not refused",
        ),
        (case(), (msgspec.structs.replace(CHOSEN, held_back=Errors(9, cosine=0.9)),), "beyond the budget"),
        (case(), (msgspec.structs.replace(CHOSEN, held_back=None),), "beyond the budget"),
    ],
)
def test_what_is_missed_is_told(goal, rows, told):
    (missed,) = judge(goal, findings(*rows)).missed
    assert told in missed


def test_a_form_that_was_passed_over_is_judged_by_the_search_that_tries_everything():
    goal, skipped = case(refused=("int8_static",)), msgspec.structs.replace(REFUSED, fate=Fate.SKIPPED)
    hurried = findings(skipped, CHOSEN)
    assert passed_over(goal, hurried)
    assert judge(goal, hurried, findings(REFUSED, CHOSEN)).missed == ()
    (missed,) = judge(goal, hurried, findings(msgspec.structs.replace(REFUSED, fate=Fate.KEPT), CHOSEN)).missed
    assert "was not refused" in missed
    assert not passed_over(goal, findings(REFUSED, CHOSEN))


def test_forms_with_layers_left_alone_may_be_within_the_budget():
    mixed = Row(
        Form("onnxruntime", (EXPORT, Step("int8_static", {"keep_first": 8})), techniques=INT8), Fate.KEPT, speedup=5.0
    )
    assert judge(case(refused=("int8_static",)), findings(REFUSED, mixed, CHOSEN)).missed == ()


def test_what_was_dropped_in_as_onnx_is_onnx_runtime_itself():
    assert judge(case(1.0), findings(CHOSEN, backend="onnxruntime")).over_onnxruntime == pytest.approx(6.0)


def test_every_case_says_what_it_is():
    assert all((case.build.__doc__ or "").strip() for case in CASES.values())

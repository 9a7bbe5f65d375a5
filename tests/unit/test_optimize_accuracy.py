"""Errors against the reference, and budgets that judge them."""

import math

import numpy as np
import pytest

from headrace_backends.optimize.accuracy import Budget, Errors, MetricFailed, compare, judged, own_metric, untold


def rows(*values):
    return [{"y": np.array([value], np.float32)} for value in values]


def test_equal_answers_have_no_error():
    answers = rows([1.0, 2.0], [3.0, -4.0])
    errors = compare(answers, answers)
    assert errors.max_abs == 0.0
    assert errors.max_rel == 0.0
    assert errors.cosine == pytest.approx(1.0)
    assert errors.top1_agreement == 1.0
    assert errors.faithful


def test_relative_error_is_of_the_largest_value_of_all_examples():
    errors = compare(rows([0.1, 0.0], [10.0, 0.0]), rows([0.2, 0.0], [10.0, 0.0]))
    assert errors.max_abs == pytest.approx(0.1)
    assert errors.max_rel == pytest.approx(0.01)


def test_the_worst_row_tells_the_cosine():
    errors = compare(rows([1.0, 0.0], [1.0, 0.0]), rows([1.0, 0.0], [0.0, 1.0]))
    assert errors.cosine == pytest.approx(0.0)
    assert errors.mean_cosine == pytest.approx(0.5)


def test_agreement_counts_rows_of_every_position():
    right = [{"y": np.array([[[0.1, 0.9], [0.8, 0.2]]], np.float32)}]
    mine = [{"y": np.array([[[0.2, 0.8], [0.4, 0.6]]], np.float32)}]
    assert compare(right, mine).top1_agreement == 0.5


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_none_are_never_within_a_budget(bad):
    errors = compare(rows([1.0, 2.0]), rows([1.0, bad]))
    assert not errors.faithful
    assert Budget("max_abs", max=1e9).problem(errors) is not None
    assert Budget("cosine", min=0.0).problem(errors) is not None


def test_a_nan_that_the_reference_has_too_is_no_error():
    assert compare(rows([1.0, math.nan]), rows([1.0, math.nan])).max_abs == 0.0


def test_another_shape_is_beyond_every_budget():
    errors = compare(rows([1.0, 2.0]), rows([1.0, 2.0, 3.0]))
    assert not errors.faithful
    assert Budget("max_abs", max=1e9).problem(errors) is not None


def test_what_is_no_float_must_be_equal():
    right = [{"label": np.array([3, 4]), "text": np.array([b"a"], object)}]
    mine = [{"label": np.array([3, 5]), "text": np.array([b"a"], object)}]
    errors = compare(right, mine)
    assert errors.mismatches == 1
    assert not errors.faithful
    assert errors.cosine is None


def test_a_budget_on_what_outputs_do_not_have_is_missed():
    errors = compare([{"label": np.array([3])}], [{"label": np.array([3])}])
    assert "cannot be told" in Budget("cosine", min=0.9).problem(errors)


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("cosine>=0.99", Budget("cosine", min=0.99)),
        ("max_abs <= 1e-3", Budget("max_abs", max=1e-3)),
        ("judge.py:accuracy>=0.97", Budget("judge.py:accuracy", min=0.97)),
        ("judge:loss<=0.5", Budget("judge:loss", max=0.5)),
    ],
)
def test_a_budget_is_read(text, budget):
    assert Budget.parse(text) == budget
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize(
    "text",
    [
        "cosine",
        "cosine>=much",
        "cosine<=0.9",
        "max_abs>=1",
        "f1>=0.9",
        "cosine>0.9",
        "cosine>=1.01",
        "max_rel<=-0.1",
        "judge.py:f=0.9",
        "cosine>=nan",
        "",
    ],
)
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(ValueError, match="budget"):
        Budget.parse(text)


def test_a_budget_tells_by_how_much_it_is_missed():
    told = Budget("cosine", min=0.99).problem(Errors(4, cosine=0.36))
    assert told == "cosine is 0.36, the budget asks for cosine >= 0.99"


def test_the_owners_metric_gets_everything_by_name(tmp_path):
    (tmp_path / "judge.py").write_text(
        "import numpy as np\n"
        "def accuracy(outputs, labels):\n"
        "    return float(np.mean([y.argmax() == t for y, t in zip(outputs['y'], labels['digit'])]))\n"
    )
    metric = own_metric("judge.py:accuracy", tmp_path)
    assert judged(metric, rows([0.1, 0.9], [0.9, 0.1]), [{"digit": np.array(1)}, {"digit": np.array(1)}]) == 0.5
    with pytest.raises(MetricFailed, match="KeyError"):
        judged(metric, rows([0.1, 0.9]), [{}])


@pytest.mark.parametrize("name", ["judge.py:other", "nowhere.py:accuracy", "no.such.module:accuracy"])
def test_a_metric_that_is_not_there_is_named(tmp_path, name):
    (tmp_path / "judge.py").write_text("accuracy = None\n")
    with pytest.raises(MetricFailed, match=name):
        own_metric(name, tmp_path)


@pytest.mark.parametrize(
    ("budget", "value", "near"),
    [
        ("cosine>=0.99", 0.98, True),
        ("cosine>=0.99", 0.17, False),
        ("max_abs<=0.01", 0.1, True),
        ("max_abs<=0.01", 9, False),
    ],
)
def test_what_is_far_beyond_a_budget_is_not_near(budget, value, near):
    bound = Budget.parse(budget)
    assert bound.is_near(Errors(4, **{bound.metric: value})) is near
    assert not bound.is_near(Errors(4))


def test_answers_that_are_nan_agree_with_nothing():
    right, mine = rows([2.0, 1.0]), rows([math.nan, math.nan])
    for budget in ("top1_agreement>=0.5", "topk_agreement>=0.5", "cosine>=0.5"):
        assert "NaN" in Budget.parse(budget).problem(compare(right, mine))


def test_masked_values_count_for_nothing_where_they_are_the_same():
    answers = rows([1.0, -math.inf, 2.0])
    assert compare(answers, answers).cosine == pytest.approx(1.0)


def test_the_best_five_of_five_tell_nothing():
    assert compare(rows([1.0, 2.0]), rows([2.0, 1.0])).topk_agreement is None


# -- whole numbers and texts ---------------------------------------------------------------------------------------


def labelled(*labels):
    return [{"p": np.array([[0.1, 0.9]], np.float32), "label": np.array([label])} for label in labels]


@pytest.mark.parametrize(
    "budget", ["cosine>=0.9", "mean_cosine>=0.9", "top1_agreement>=0.9", "max_abs<=0.01", "max_rel<=0.01"]
)
def test_labels_that_differ_are_beyond_a_budget_though_the_floats_are_the_same(budget):
    right = labelled(1, 2, 3, 4)
    assert Budget.parse(budget).problem(compare(right, right)) is None
    assert Budget.parse(budget).problem(compare(right, labelled(1, 2, 3, 7))) is not None


def test_as_many_labels_may_differ_as_the_budget_allows():
    right, mine = labelled(*range(20)), labelled(*range(19), 99)
    errors = compare(right, mine)
    assert errors.same == errors.top1_agreement == 0.95
    for budget in ("cosine>=0.9", "top1_agreement>=0.95"):
        assert Budget.parse(budget).problem(errors) is None
    told = Budget.parse("cosine>=0.99").problem(errors)
    assert told == "only 0.95 of an output's whole numbers or texts are the same, the budget asks for cosine >= 0.99"


def test_classes_alone_have_an_agreement():
    errors = compare([{"y": np.array([[3, 4]])}], [{"y": np.array([[3, 5]])}])
    assert errors.top1_agreement == 0.5
    assert errors.cosine is None
    assert Budget.parse("top1_agreement>=0.5").problem(errors) is None


def test_whole_numbers_differ_by_what_they_are():
    image = np.array([[0, 100, 200]], np.uint8)
    errors = compare([{"y": image}], [{"y": image + 1}])
    assert (errors.max_abs, errors.max_rel, errors.mismatches) == (1.0, 1 / 200, 3)
    assert Budget.parse("max_abs<=1").problem(errors) is None
    assert Budget.parse("max_abs<=0.5").problem(errors) is not None
    large = np.array([2**60])
    assert compare([{"y": large}], [{"y": large + 1}]).max_abs > 0  # which as floats are one
    masks = np.array([True, False])
    assert compare([{"y": masks}], [{"y": ~masks}]).max_abs == 1.0


@pytest.mark.parametrize("kind", [object, "S1", "U1"])
def test_texts_differ_or_do_not(kind):
    right, mine = (
        [{"y": np.array([one.encode() if kind == "S1" else one], kind)} for one in texts] for texts in ("abcd", "abcx")
    )
    errors = compare(right, mine)
    assert (errors.mismatches, errors.same, errors.max_abs) == (1, 0.75, 1.0)
    assert compare(right, right).faithful
    assert not errors.faithful


def test_the_worst_output_tells_and_is_not_lost_among_many_rows_of_another():
    rows_of = np.eye(100, dtype=np.float32)
    right = [{"map": rows_of, "class": np.array([[0.9, 0.1]], np.float32)}]
    mine = [{"map": rows_of, "class": np.array([[0.1, 0.9]], np.float32)}]
    errors = compare(right, mine)
    assert errors.top1_agreement == 0.0
    assert errors.mean_cosine == pytest.approx(errors.cosine)


def test_whether_a_budget_tells_anything_of_such_outputs():
    errors = compare([{"label": np.array([3])}], [{"label": np.array([3])}])
    assert not Budget("cosine", min=0.9).tells(errors)
    assert Budget("top1_agreement", min=0.9).tells(errors)


# -- the owner's metric ----------------------------------------------------------------------------------------------


def test_outputs_that_a_budget_says_nothing_of_are_told():
    answers = [
        {"scores": np.eye(3, dtype=np.float32)[:1], "value": np.ones((1, 1), np.float32), "label": np.array([1])}
    ]
    assert untold(Budget("top1_agreement", min=0.9), answers) == ["value"]
    assert untold(Budget("topk_agreement", min=0.9), answers) == ["scores", "value"]
    assert untold(Budget("max_abs", max=0.1), answers) == untold(Budget("a:b", min=0.1), answers) == []


def test_a_metric_may_be_written_as_any_module(tmp_path):
    (tmp_path / "helper_of_judge.py").write_text("LIMIT = 0.5\n")
    (tmp_path / "judge.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from helper_of_judge import LIMIT\n"
        "@dataclass\n"
        "class Score:\n"
        "    value: float\n"
        "def share(outputs, labels):\n"
        "    return Score(LIMIT).value\n"
    )
    assert judged(own_metric("judge.py:share", tmp_path), rows([1.0]), [{}]) == 0.5


def test_a_metric_that_ends_the_program_has_failed(tmp_path):
    (tmp_path / "judge.py").write_text("import sys\ndef score(outputs, labels):\n    sys.exit(3)\n")
    with pytest.raises(MetricFailed, match="SystemExit"):
        judged(own_metric("judge.py:score", tmp_path), rows([1.0]), [{}])
    (tmp_path / "ends.py").write_text("import sys\nsys.exit(3)\n")
    with pytest.raises(MetricFailed, match="SystemExit"):
        own_metric("ends.py:score", tmp_path)

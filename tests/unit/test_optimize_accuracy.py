"""Errors against the reference, and budgets that judge them."""

import math

import numpy as np
import pytest

from headrace_backends.optimize.accuracy import Budget, Errors, MetricFailed, compare, judged, own_metric


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

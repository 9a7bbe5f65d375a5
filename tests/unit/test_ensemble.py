"""Steps into a plan, and everything that steps can have wrong."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.core.ensemble import EnsembleProblem, Step, find_circle, plan_ensemble
from headrace.core.model import Signature, TensorSpec
from headrace.core.tensor import DataType


def tensor(text):
    """``x FP32 -1 4``, with ``?`` behind the name of an optional one and ``*`` for an undeclared shape."""
    name, datatype, *shape = text.split()
    sizes = None if shape == ["*"] else tuple(int(size) for size in shape)
    return TensorSpec(name.removesuffix("?"), DataType(datatype), sizes, name.endswith("?"))


def signature(inputs, outputs, max_batch_size=0, decoupled=False):
    return Signature(tuple(map(tensor, inputs)), tuple(map(tensor, outputs)), max_batch_size, decoupled)


# A model is named for what it does: "ab" takes a and makes b, each FP32[-1, 2], in batches.
def model(name, rows=8):
    *taken, made = name
    return signature([f"{one} FP32 -1 2" for one in taken], [f"{made} FP32 -1 2"], rows)


def step(name, version="", **mapped):
    """A step whose tensors are named as its model has them, but for those in ``mapped``."""
    *taken, made = name
    return Step(name, version, {one: mapped.get(one, one) for one in taken}, {made: mapped.get(made, made)})


def plan(*steps, inputs=(), outputs=(), rows=None, **signatures):
    known = {one.part: signatures.get(one.model) or model(one.model) for one in steps}
    return plan_ensemble("e", steps, tuple(map(tensor, inputs)), tuple(map(tensor, outputs)), known, rows)


def problems(*steps, **more):
    with pytest.raises(EnsembleProblem) as caught:
        plan(*steps, **more)
    assert str(caught.value) == "; ".join(caught.value.problems)
    return list(caught.value.problems)


def names(specs):
    return [spec.describe() + ("?" if spec.optional else "") for spec in specs]


# ---- what works ----


def test_a_chain():
    planned = plan(step("ab"), step("bc"))
    assert planned.name == "e"
    assert names(planned.signature.inputs) == ["a FP32[-1, 2]"]
    assert names(planned.signature.outputs) == ["c FP32[-1, 2]"]
    assert planned.signature.max_batch_size == 8
    assert [(one.takes, one.makes, one.after, one.index) for one in planned.steps] == [
        (("a",), ("b",), (), 0),
        (("b",), ("c",), (0,), 1),
    ]
    assert planned.takers == {"a": 1, "b": 1}


def test_steps_in_any_order_are_put_in_one_that_works():
    planned = plan(step("cd"), step("bc"), step("ab"))
    assert [one.index for one in planned.steps] == [2, 1, 0]
    assert [one.after for one in planned.steps] == [(), (0,), (1,)]
    assert [one.step.model for one in planned.steps] == ["ab", "bc", "cd"]


def test_what_does_not_wait_for_each_other_can_run_at_once():
    planned = plan(step("ab"), step("ac"), step("bcd"))
    assert [one.after for one in planned.steps] == [(), (), (0, 1)]
    assert planned.takers == {"a": 2, "b": 1, "c": 1}


def test_a_tensor_that_one_step_takes_twice_is_taken_by_one():
    planned = plan(step("abc", a="x", b="x"))
    assert planned.takers == {"x": 1}
    assert planned.steps[0].takes == ("x",)
    assert names(planned.signature.inputs) == ["x FP32[-1, 2]"]


def test_the_same_model_twice_and_versions():
    planned = plan(step("ab", "1", b="x"), step("ab", "2", a="x", b="y"))
    assert [one.step.part for one in planned.steps] == [("ab", "1"), ("ab", "2")]
    assert [spec.name for spec in planned.signature.outputs] == ["y"]


def test_declared_tensors_are_kept_as_they_are():
    declared = {"inputs": ["a FP32 -1 2", "unused INT8 1"], "outputs": ["b FP32 -1 -1"]}
    planned = plan(step("ab"), step("bc"), rows=0, **declared)
    assert names(planned.signature.inputs) == ["a FP32[-1, 2]", "unused INT8[1]"]
    assert names(planned.signature.outputs) == ["b FP32[-1, -1]"]  # c is made and nobody asks for it
    assert planned.signature.max_batch_size == 0


@pytest.mark.parametrize(
    ("first", "second", "configured", "rows"),
    [(8, 4, None, 4), (4, 8, None, 4), (8, 0, None, 0), (0, 0, None, 0), (8, 4, 16, 16), (8, 4, 0, 0)],
)
def test_max_batch_size(first, second, configured, rows):
    signatures = {"ab": model("ab", first), "bc": model("bc", second)}
    assert plan(step("ab"), step("bc"), rows=configured, **signatures).signature.max_batch_size == rows


@pytest.mark.parametrize(
    ("made", "taken", "fits"),
    [
        ("-1 2", "-1 2", True),
        ("-1 2", "4 2", True),
        ("4 2", "-1 2", True),
        ("*", "3 3 3", True),
        ("3 3 3", "*", True),
        ("-1 2", "-1 3", False),
        ("-1 2", "2", False),
        ("1", "", False),
        ("", "", True),
    ],
)
def test_shapes(made, taken, fits):
    maker = signature(["a FP32 -1"], [f"b FP32 {made}"])
    taker = signature([f"b FP32 {taken}"], ["c FP32 -1"])
    if fits:
        assert plan(step("ab"), step("bc"), ab=maker, bc=taker)
        return
    (found,) = problems(step("ab"), step("bc"), ab=maker, bc=taker)
    assert found.startswith("tensor 'b': output 'b' of step 0 (model 'ab') has shape [")
    assert "and input 'b' of step 1 (model 'bc') has shape [" in found


def test_an_input_for_several_steps_is_as_narrow_as_the_narrowest():
    wide, narrow = signature(["a FP32 -1 -1 3"], ["b FP32 1"]), signature(["a FP32 -1 5 -1"], ["c FP32 1"])
    planned = plan(step("ab"), step("ac"), ab=wide, ac=narrow)
    assert names(planned.signature.inputs) == ["a FP32[-1, 5, 3]"]
    third = signature(["a FP32 -1 4 3"], ["d FP32 1"])
    (found,) = problems(step("ab"), step("ac"), step("ad"), ab=wide, ac=narrow, ad=third)
    assert "input 'a' of step 1 (model 'ac') has shape [-1, 5, 3], and input 'a' of step 2 (model 'ad')" in found


def test_an_input_that_every_taker_can_do_without_is_optional():
    can = signature(["a? FP32 1", "b FP32 1"], ["c FP32 1"])
    needs = signature(["a FP32 1"], ["d FP32 1"])
    assert names(plan(step("abc"), abc=can).signature.inputs) == ["a FP32[1]?", "b FP32[1]"]
    assert names(plan(step("abc"), step("ad"), abc=can, ad=needs).signature.inputs)[0] == "a FP32[1]"


def test_an_optional_input_need_not_be_mapped():
    can = signature(["a? FP32 1", "b FP32 1"], ["c FP32 1"])
    planned = plan(Step("abc", "", {"b": "b"}, {"c": "c"}), abc=can)
    assert names(planned.signature.inputs) == ["b FP32[1]"]


# ---- what does not ----


@pytest.mark.parametrize(
    ("steps", "more", "found"),
    [
        (
            [step("ab"), step("cd")],
            {"inputs": ["a FP32 -1 2"]},
            (
                "input 'c' of step 1 (model 'cd') takes tensor 'c', which no step makes and which is no input of the "
                "ensemble; there are ['a', 'b', 'd']"
            ),
        ),
        (
            [step("ab"), step("cb")],
            {},
            "tensor 'b' is made twice: by output 'b' of step 0 (model 'ab') and by output 'b' of step 1 (model 'cb')",
        ),
        (
            [step("ab")],
            {"inputs": ["a FP32 -1 2", "b FP32 -1 2"]},
            "tensor 'b' is an input of the ensemble, and output 'b' of step 0 (model 'ab') makes it too",
        ),
        (
            [step("ab")],
            {"outputs": ["z FP32 -1 2"]},
            "output 'z' of the ensemble is made by no step; they make ['b']",
        ),
        (
            [step("ab")],
            {"inputs": ["a FP32 -1 2"], "outputs": ["a FP32 -1 2"]},
            "output 'a' of the ensemble is made by no step; they make ['b']",
        ),
        (
            [Step("ab", "7", {"a": "a", "z": "y"}, {"b": "b"})],
            {},
            "step 0 (model 'ab' version 7) maps input 'z', which the model does not have; its inputs are ['a']",
        ),
        (
            [Step("ab", "", {"a": "a"}, {"b": "b", "z": "y"})],
            {},
            "step 0 (model 'ab') maps output 'z', which the model does not have; its outputs are ['b']",
        ),
        (
            [Step("abc", "", {"a": "a"}, {"c": "c"})],
            {},
            "step 0 (model 'abc') gets nothing for input 'b', which is not optional",
        ),
        (
            [step("ab"), step("bc")],
            {"bc": signature(["b INT32 -1 2"], ["c FP32 1"])},
            "tensor 'b': output 'b' of step 0 (model 'ab') has FP32, and input 'b' of step 1 (model 'bc') has INT32",
        ),
        (
            [step("ab")],
            {"inputs": ["a FP32 -1 3"]},
            (
                "tensor 'a': the ensemble's input has shape [-1, 3], and "
                "input 'a' of step 0 (model 'ab') has shape [-1, 2]"
            ),
        ),
        (
            [step("ab")],
            {"outputs": ["b FP16 -1 2"]},
            "tensor 'b': output 'b' of step 0 (model 'ab') has FP32, and the ensemble's output has FP16",
        ),
        (
            [step("ab")],
            {"inputs": ["a? FP32 -1 2"]},
            "input 'a' of the ensemble is optional, and input 'a' of step 0 (model 'ab') is not",
        ),
        (
            [step("ab")],
            {"rows": 4, "ab": signature(["a FP32 3"], ["b FP32 -1 2"])},
            (
                "input 'a' of the ensemble has shape [3], and max_batch_size is 4: expected -1, the batch, as the "
                "first dimension"
            ),
        ),
        ([step("aa")], {}, "tensors go in a circle: a -> a"),
        ([step("ab"), step("ba")], {}, "tensors go in a circle: b -> a -> b"),
        ([step("xa"), step("abc"), step("cd"), step("db")], {}, "tensors go in a circle: c -> d -> b -> c"),
    ],
)
def test_one_problem(steps, more, found):
    assert problems(*steps, **more) == [found]


def test_every_circle_is_told():
    found = problems(step("ab"), step("ba"), step("cd"), step("dc"))
    assert found == ["tensors go in a circle: b -> a -> b", "tensors go in a circle: d -> c -> d"]


def test_all_problems_at_once():
    found = problems(
        step("ab"),
        step("cb"),
        Step("de", "", {"d": "x", "z": "a"}, {"e": "e"}),
        inputs=["a INT8 1", "c FP32 -1 2"],
        outputs=["y FP32 1"],
    )
    assert [problem.split(", ")[0] for problem in found] == [
        "step 2 (model 'de') maps input 'z'",
        "tensor 'b' is made twice: by output 'b' of step 0 (model 'ab') and by output 'b' of step 1 (model 'cb')",
        "input 'd' of step 2 (model 'de') takes tensor 'x'",
        "output 'y' of the ensemble is made by no step; they make ['b'",
        "tensor 'a': the ensemble's input has INT8",
    ]


# ---- circles of models ----


@pytest.mark.parametrize(
    ("uses", "way"),
    [
        ({}, ()),
        ({"a": ["b"], "b": ["c"]}, ()),
        ({"a": ["a"]}, ("a", "a")),
        ({"a": ["b"], "b": ["a"]}, ("a", "b", "a")),
        ({"a": ["x", "b"], "b": ["y", "c"], "c": ["a"]}, ("a", "b", "c", "a")),
        ({"a": ["b"], "b": ["c"], "c": ["b"]}, ()),  # a circle, but not through a
    ],
)
def test_find_circle(uses, way):
    assert find_circle("a", uses) == way


# ---- whatever the steps ----

LETTERS = st.sampled_from("abcdefgh")
STEPS = st.lists(st.tuples(st.sets(LETTERS, max_size=3), LETTERS), min_size=1, max_size=8)


@given(STEPS)
def test_a_plan_works_or_there_are_problems(drawn):
    steps = [step("".join(sorted(taken)) + made) for taken, made in drawn]
    signatures = {one.part: model(one.model) for one in steps}
    try:
        planned = plan_ensemble("e", steps, (), (), signatures)
    except EnsembleProblem as problem:
        makers = [made for _, made in drawn]
        circle = any("circle" in one for one in problem.problems)
        assert circle or len(set(makers)) < len(makers)
        return
    there = {spec.name for spec in planned.signature.inputs}
    left = dict(planned.takers)
    for place, one in enumerate(planned.steps):
        assert there >= set(one.takes)
        assert all(earlier < place for earlier in one.after)
        needed = {tensor for earlier in one.after for tensor in planned.steps[earlier].makes}
        assert set(one.takes) <= needed | {spec.name for spec in planned.signature.inputs}
        there |= set(one.makes)
        for taken in one.takes:
            left[taken] -= 1
    assert not any(left.values())
    assert sorted(one.index for one in planned.steps) == list(range(len(steps)))
    assert {spec.name for spec in planned.signature.outputs} == {made for _, made in drawn} - planned.takers.keys()


def test_with_a_decoupled_step_the_whole_is_decoupled():
    made = plan(step("ab"), step("bc"), bc=signature(["b FP32 -1 2"], ["c FP32 -1 2"], 8, decoupled=True))
    assert made.signature.decoupled

"""Requests to an ensemble, over models that answer when the test says so."""

import asyncio
import gc
import weakref
from time import monotonic_ns

import numpy as np
import pytest

from headrace.core.ensemble import Step, plan_ensemble
from headrace.core.errors import Cancelled, DeadlineExceeded, InternalError, InvalidRequest, Overloaded
from headrace.core.model import Signature, TensorSpec
from headrace.core.request import InferRequest, InferResponse, RequestedOutput
from headrace.core.statistics import Statistics
from headrace.core.tensor import DataType, Tensor
from headrace.core.validation import ModelInputs
from headrace.pipeline import Pipeline


def spec(name):
    """A tensor; ``?`` behind its name makes it optional."""
    return TensorSpec(name.removesuffix("?"), DataType.UINT8, (-1, 1), name.endswith("?"))


def tensor(name, *values):
    return Tensor(name, DataType.UINT8, (len(values), 1), bytes(values))


class Served:
    version = "3"

    def __init__(self, plan):
        self.plan = plan
        self.statistics = Statistics()
        self.running = 0
        self.idle = 0

    def notice_idle(self):
        self.idle += not self.running


def _ends(name):
    takes, makes = name.split(">")
    return takes.split("+"), makes.split("+")


class Models:
    """Steps by what they do: "a+b>c" takes a and b and makes c: the sum of its inputs, and one more."""

    def __init__(self, *steps, inputs=(), outputs=()):
        self.asked = []
        self.futures = []
        self.refuses = {}
        made = [self._step(one) for one in steps]
        signatures = {(one, ""): self._signature(one) for one in steps}
        plan = plan_ensemble("e", made, tuple(map(spec, inputs)), tuple(map(spec, outputs)), signatures)
        self.served = Served(plan)

    @staticmethod
    def _step(name):
        takes, makes = _ends(name)
        return Step(
            name, "", {f"{one}_in": one.removesuffix("?") for one in takes}, {f"{one}_out": one for one in makes}
        )

    @staticmethod
    def _signature(name):
        takes, makes = _ends(name)
        return Signature(
            tuple(TensorSpec(f"{one}_in", DataType.UINT8, (-1, 1), one.endswith("?")) for one in takes),
            tuple(spec(f"{one}_out") for one in makes),
            8,
        )

    def infer(self, request):
        self.asked.append(request)
        error = self.refuses.get(request.model)
        if error is not None:
            raise error
        future = asyncio.get_running_loop().create_future()
        self.futures.append(future)
        return future

    def start(self, *values, outputs=(), deadline_ns=0, form=None, parameters=None, callers=()):
        """A request; values are the inputs', in the signature's order, None for one that is left out."""
        specs = self.served.plan.signature.inputs
        given = tuple(
            None if value is None else tensor(one.name, value) for one, value in zip(specs, values, strict=True)
        )
        request = InferRequest(
            "e",
            "",
            "id-1",
            tuple(one for one in given if one is not None),
            tuple(map(RequestedOutput, outputs)),
            parameters or {},
            0,
            callers,
        )
        inputs = ModelInputs(given, 1, None)
        return Pipeline(self.served, request, inputs, deadline_ns, form, self.infer)

    @property
    def waiting(self):
        """The models that have been asked and have not answered."""
        return [one.model for one, future in self._pairs() if not future.done()]

    def _pairs(self):
        answered = [one for one in self.asked if one.model not in self.refuses]
        return list(zip(answered, self.futures, strict=True))

    def future(self, model):
        """What a model answers with."""
        return next(future for one, future in self._pairs() if one.model == model and not future.done())

    async def answer(self, model, *outputs):
        """Answer the oldest request to a model, with these outputs if some are given."""
        request, future = next(pair for pair in self._pairs() if pair[0].model == model and not pair[1].done())
        value = 1 + sum(one.data[0] for one in request.inputs)
        made = [tensor(one, value) for one in outputs] or [tensor(one.name, value) for one in request.outputs]
        future.set_result(InferResponse(model, "1", request.id, tuple(made)))
        await settle()


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


def result(pipeline):
    """The whole's outputs, by name."""
    assert pipeline.future.done(), "it hangs"
    return {one.name: one.data[0] for one in pipeline.future.result().outputs}


@pytest.fixture(autouse=True)
async def nothing_is_left():
    """No future's exception may go unseen."""
    reported = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    yield
    await settle()
    gc.collect()
    await settle()
    assert reported == []


def over(models):
    """The whole is done with: nothing runs, and nobody thinks so."""
    assert models.waiting == []
    assert models.served.running == 0
    assert models.served.idle >= 1


async def test_a_step_runs_when_its_tensors_are_there():
    models = Models("a>b", "b>c")
    pipeline = models.start(5, parameters={"k": 1, "timeout": 5, "binary_data_output": True}, callers=("outer",))
    (asked,) = models.asked
    assert (asked.model, asked.id, asked.callers, asked.borrows) == ("a>b", "id-1", ("outer", "e"), True)
    assert asked.inputs == (Tensor("a_in", DataType.UINT8, (1, 1), b"\5"),)
    assert [one.name for one in asked.outputs] == ["b_out"]
    assert asked.parameters == {"k": 1}
    await models.answer("a>b")
    await models.answer("b>c")
    assert result(pipeline) == {"c": 7}
    response = pipeline.future.result()
    assert (response.model, response.version, response.id) == ("e", "3", "id-1")
    await settle()
    over(models)
    assert (models.served.statistics.success, models.served.statistics.executions) == (1, 1)
    assert models.served.statistics.last_inference_ms > 0


async def test_steps_that_do_not_wait_for_each_other_run_at_once():
    models = Models("a>b", "a>c", "b+c>d")
    pipeline = models.start(1)
    assert models.waiting == ["a>b", "a>c"]
    await models.answer("a>c")
    assert models.waiting == ["a>b"]
    await models.answer("a>b")
    await models.answer("b+c>d")
    assert result(pipeline) == {"d": 5}


async def test_a_tensor_that_is_taken_and_wanted_is_both():
    models = Models("a>b", "b>c", "b+c>d", outputs=("b", "d"))
    pipeline = models.start(1)
    for step in ("a>b", "b>c", "b+c>d"):
        await models.answer(step)
    assert result(pipeline) == {"b": 2, "d": 6}


async def test_the_client_gets_what_it_asked_for_in_its_order():
    models = Models("a>b+c", "b>d", outputs=("b", "c", "d"))
    pipeline = models.start(1, outputs=("d", "b"))
    await models.answer("a>b+c")
    await models.answer("b>d")
    assert list(result(pipeline)) == ["d", "b"]


async def test_an_input_that_several_take_and_one_that_nobody_wants_back_are_let_go_of():
    models = Models("a>b", "a+b>c")
    pipeline = models.start(1)
    assert set(pipeline._tensors) == {"a"}
    await models.answer("a>b")
    assert pipeline._tensors == {}, "the last who takes them has them"
    await models.answer("a+b>c")
    assert result(pipeline) == {"c": 4}
    await settle()
    assert pipeline._tensors == {}


@pytest.mark.parametrize(("given", "names"), [((1, 2), ["a_in", "o?_in"]), ((1, None), ["a_in"])])
async def test_an_optional_input_that_was_left_out_is_left_out_of_the_step(given, names):
    models = Models("a+o?>b", inputs=("a", "o?"), outputs=("b",))
    pipeline = models.start(*given)
    assert [one.name for one in models.asked[0].inputs] == names
    await models.answer("a+o?>b")
    assert result(pipeline) == {"b": 1 + sum(one or 0 for one in given)}


async def test_the_first_failure_fails_the_whole_and_takes_the_others_back():
    models = Models("a>b", "a>c", "b+c>d")
    pipeline = models.start(1)
    models.future("a>b").set_exception(InvalidRequest("b will have none of it"))
    await settle()
    with pytest.raises(InvalidRequest, match="none of it"):
        pipeline.future.result()
    assert len(models.asked) == 2
    over(models)
    assert models.served.statistics.failures == {"BACKEND": 1}


async def test_two_failures_at_once_are_one():
    models = Models("a>b", "a>c", "b+c>d")
    pipeline = models.start(1)
    for model in ("a>b", "a>c"):
        models.future(model).set_exception(InternalError(f"the worker of {model} died"))
    await settle()
    assert isinstance(pipeline.future.exception(), InternalError)
    assert models.served.statistics.failures == {"BACKEND": 1}
    over(models)


@pytest.mark.parametrize("error", [Overloaded("no room"), ZeroDivisionError("a bug")])
@pytest.mark.parametrize("refusing", ["a>b", "a>c", "b+c>d"])
async def test_a_step_that_is_refused_at_once_fails_the_whole(error, refusing, caplog):
    models = Models("a>b", "a>c", "b+c>d")
    models.refuses[refusing] = error
    pipeline = models.start(1)
    await settle()
    for step in list(models.waiting):
        await models.answer(step)
    assert pipeline.future.done(), "it hangs"
    expected = Overloaded if isinstance(error, Overloaded) else InternalError
    assert type(pipeline.future.exception()) is expected
    await settle()
    over(models)
    assert ("a bug" in caplog.text) == isinstance(error, ZeroDivisionError)
    assert sum(models.served.statistics.failures.values()) == 1


async def test_cancelling_the_whole_takes_back_what_runs_and_starts_nothing_more():
    models = Models("a>b", "a>c", "b+c>d")
    pipeline = models.start(1)
    await models.answer("a>b")
    running = models.future("a>c")
    pipeline.future.cancel()
    await settle()
    assert running.cancelled()
    over(models)
    assert models.served.statistics.failures == {"CANCELED": 1}
    assert pipeline._tensors == {}


async def test_an_answer_that_comes_with_the_cancelling_is_nothing():
    models = Models("a>b", "b>c")
    pipeline = models.start(1)
    future = models.future("a>b")
    pipeline.future.cancel()
    future.set_result(InferResponse("a>b", "1", "", (tensor("b_out", 1),)))
    await settle()
    assert len(models.asked) == 1
    over(models)


async def test_a_step_that_somebody_else_takes_back_fails_the_whole_with_a_word():
    models = Models("a>b", "b>c")
    pipeline = models.start(1)
    models.future("a>b").cancel()
    await settle()
    assert isinstance(pipeline.future.exception(), Cancelled)
    assert "a>b" in str(pipeline.future.exception())
    over(models)


async def test_the_deadline_goes_to_the_steps_and_holds_for_the_whole():
    models = Models("a>b", "b>c")
    deadline_ns = monotonic_ns() + 50_000_000
    pipeline = models.start(1, deadline_ns=deadline_ns)
    assert models.asked[0].deadline_ns == deadline_ns
    await asyncio.wait([pipeline.future], timeout=30)
    assert isinstance(pipeline.future.exception(), DeadlineExceeded)
    await settle()
    over(models)


async def test_no_timer_is_left_of_one_that_was_in_time():
    models = Models("a>b")
    pipeline = models.start(1, deadline_ns=monotonic_ns() + 3_600_000_000_000)
    await models.answer("a>b")
    assert result(pipeline) == {"b": 2}
    await settle()
    assert pipeline._timer.cancelled()


async def test_a_step_that_answers_with_fewer_outputs_fails_the_whole_if_they_are_needed():
    models = Models("a>b+c", outputs=("b", "c"))
    pipeline = models.start(1)
    await models.answer("a>b+c", "b_out")
    assert "'c'" in str(pipeline.future.exception())
    over(models)


async def test_one_that_answers_with_what_nobody_asked_for_does_too(caplog):
    models = Models("a>b", "b>c")
    pipeline = models.start(1)
    await models.answer("a>b", "b_out", "another")
    assert isinstance(pipeline.future.exception(), InternalError)
    over(models)


def refusing_form(outputs):
    raise InvalidRequest("no such classes")


def broken_form(outputs):
    raise ZeroDivisionError("a bug")


@pytest.mark.parametrize(("form", "expected"), [(refusing_form, InvalidRequest), (broken_form, InternalError)])
async def test_a_form_that_the_outputs_cannot_have_fails_the_request(form, expected, caplog):
    models = Models("a>b")
    pipeline = models.start(1, form=form)
    await models.answer("a>b")
    assert type(pipeline.future.exception()) is expected
    await settle()
    over(models)
    assert models.served.statistics.success == 0


async def test_the_form_is_given_what_was_asked_for():
    models = Models("a>b+c", outputs=("b", "c"))
    pipeline = models.start(1, outputs=("c",), form=lambda outputs: (*outputs, tensor("more", 9)))
    await models.answer("a>b+c")
    assert result(pipeline) == {"c": 2, "more": 9}


async def test_a_step_may_have_answered_already():
    """A cached answer is there at once."""
    models = Models("a>b", "b>c")
    infer = models.infer

    def at_once(request):
        future = infer(request)
        future.set_result(InferResponse(request.model, "1", "", tuple(tensor(one.name, 7) for one in request.outputs)))
        return future

    models.infer = at_once
    pipeline = models.start(1)
    await settle()
    assert result(pipeline) == {"c": 7}
    over(models)


async def test_a_step_that_is_refused_leaves_its_tensors_to_nobody():
    """An error that is raised refers to whoever has raised it, and so to the tensors: under overload that is much."""
    models = Models("a>b", "b>c")
    answers = {"a>b": asyncio.get_running_loop().create_future()}

    def infer(request):
        if request.model not in answers:
            raise Overloaded("Exceeds maximum queue size")
        return answers[request.model]

    models.infer = infer
    memory = np.zeros(1, np.uint8)
    freed = weakref.ref(memory)
    gc.disable()
    try:
        whole = models.start(1).future
        made = Tensor("b_out", DataType.UINT8, (1, 1), memory.data)
        answers["a>b"].set_result(InferResponse("a>b", "1", "", (made,)))
        await settle()
        assert isinstance(whole.exception(), Overloaded)
        answers.clear()
        del whole, made, memory
        assert freed() is None
    finally:
        gc.enable()

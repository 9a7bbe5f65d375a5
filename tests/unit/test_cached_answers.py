"""Answers from the cache and into it, over a made-up cache and a model that is the test itself."""

import asyncio
from types import SimpleNamespace

import pytest

from headrace.cached_answers import CachedAnswers
from headrace.core.errors import InternalError, Overloaded
from headrace.core.model import Signature
from headrace.core.request import InferRequest, InferResponse
from headrace.core.statistics import Statistics
from headrace.core.tensor import DataType, Tensor
from headrace.core.validation import ModelInputs
from headrace.repository.served_ensemble import ServedEnsemble


def tensor(value, name="x"):
    return Tensor(name, DataType.UINT8, (1,), bytes([value]))


class Store:
    """A cache in memory, or one that is asked over a network and has found what ``remote`` says."""

    def __init__(self):
        self.kept = {}
        self.forgotten = []
        self.remote = None

    def get(self, key):
        if self.remote is not None:
            return self._ask()
        return self.kept.get(key)

    async def _ask(self):
        await asyncio.sleep(0)
        return self.remote[0]

    def put(self, key, outputs):
        self.kept[key] = outputs

    def forget(self, model, version):
        self.forgotten.append((model, version))


class Model:
    """A version whose answer to every request is what ``answers`` holds next, and what asks the cache for it."""

    def __init__(self):
        self.store = Store()
        self.served = SimpleNamespace(
            version="3", identity="3/abc", statistics=Statistics(), folder=SimpleNamespace(name="m")
        )
        self.repository = SimpleNamespace(on_retired=None, find=lambda *_: self.served)
        self.answers = []
        self.ran = 0
        self.cached = CachedAnswers(self.store, self.repository, self._run, self._ask)

    def _ask(self, request):
        return self.cached.infer(self.served, request, ModelInputs(request.inputs, 1, None))

    def _run(self, served, request, inputs):
        assert served is self.served, "a version that has ended runs nothing: its requests would wait for ever"
        self.ran += 1
        answer = self.answers.pop(0)
        if isinstance(answer, Overloaded):
            raise answer
        if isinstance(answer, asyncio.Future):
            return answer
        future = asyncio.get_running_loop().create_future()
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)
        return future

    async def ask(self, value=1):
        x = tensor(value)
        request = InferRequest("m", "", "r-1", (x,))
        try:
            return await self.cached.infer(self.served, request, ModelInputs((x,), 1, None))
        finally:
            await asyncio.sleep(0)  # what waits for the answer is told after this

    def counts(self):
        statistics = self.served.statistics
        return statistics.cache_hits, statistics.cache_misses


def response(value, **parameters):
    return InferResponse("m", "3", "", (tensor(value, "y"),), parameters)


@pytest.fixture
async def model():
    return Model()


async def test_what_was_answered_once_is_not_run_again(model):
    model.answers = [response(7), response(8)]
    assert (await model.ask()).outputs == (tensor(7, "y"),)
    again = await model.ask()
    assert (again.model, again.version, again.id, again.outputs) == ("m", "3", "r-1", (tensor(7, "y"),))
    assert (model.ran, model.counts()) == (1, (1, 1))
    assert (await model.ask(2)).outputs == (tensor(8, "y"),)
    assert model.ran == 2


async def test_another_form_of_the_version_has_answers_of_its_own(model):
    model.answers = [response(7), response(8)]
    await model.ask()
    model.served.identity = "3/def"
    assert (await model.ask()).outputs == (tensor(8, "y"),)


async def test_an_error_is_not_kept_nor_is_what_came_with_parameters(model):
    model.answers = [InternalError("broken"), response(7, took="long"), response(8)]
    with pytest.raises(InternalError):
        await model.ask()
    for value in (7, 8):
        assert (await model.ask()).outputs == (tensor(value, "y"),)
    assert len(model.store.kept) == 1


async def test_what_cannot_be_accepted_is_refused_at_once(model):
    model.answers = [Overloaded("full", "queue_full")]
    with pytest.raises(Overloaded):
        await model.ask()
    assert model.store.kept == {}


async def test_a_cache_elsewhere_is_waited_for_and_may_have_nothing(model):
    model.store.remote = [(tensor(9, "y"),)]
    assert (await model.ask()).outputs == (tensor(9, "y"),)
    assert model.ran == 0
    model.store.remote = [None]
    model.answers = [response(7)]
    assert (await model.ask()).outputs == (tensor(7, "y"),)
    assert list(model.store.kept.values()) == [(tensor(7, "y"),)]


async def test_the_answers_of_a_version_that_has_ended_are_forgotten(model):
    model.repository.on_retired(model.served)
    assert model.store.forgotten == [("m", "3/abc")]


async def test_a_version_that_ends_while_the_cache_is_asked_is_not_the_one_to_run_the_request(model):
    model.store.remote = [None]
    model.answers = [response(7)]
    asked = asyncio.get_running_loop().create_task(model.ask())
    await asyncio.sleep(0)
    model.served = SimpleNamespace(version="4", identity="4/def", statistics=Statistics())
    assert (await asked).outputs == (tensor(7, "y"),)
    assert model.counts() == (0, 1), "it is the new version's"


async def test_an_answer_of_an_ensemble_is_not_kept_for_models_that_have_been_replaced(model):
    answer = asyncio.get_running_loop().create_future()
    plan = SimpleNamespace(
        signature=Signature((), (), 1), steps=[SimpleNamespace(step=SimpleNamespace(part=("a", "")))]
    )
    folder = SimpleNamespace(
        name="m",
        versions={1: SimpleNamespace(print="files")},
        config_print="config",
        config=SimpleNamespace(response_cache=True),
        labels={},
    )
    model.served = ServedEnsemble(folder, 1, plan, lambda *_: True)
    part = SimpleNamespace(identity="1/old")
    model.repository.find = lambda *_: part
    model.answers = [answer, response(8)]
    asked = asyncio.get_running_loop().create_task(model.ask())
    await asyncio.sleep(0)
    part = SimpleNamespace(identity="1/new")
    answer.set_result(response(7))
    assert (await asked).outputs == (tensor(7, "y"),)
    part = SimpleNamespace(identity="1/old")  # the files before are put back
    assert (await model.ask()).outputs == (tensor(8, "y"),)

"""Which idle forms are asked their recorded requests again, and what becomes of the answers; made-up instances."""

import asyncio
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from headrace.batching.pending import Pending
from headrace.batching.policy import BatchLimits
from headrace.batching.queue import BatchQueue
from headrace.core.errors import InternalError, NotReady
from headrace.core.model import Signature, TensorSpec
from headrace.core.request import InferRequest
from headrace.core.tensor import DataType, Tensor, from_wire, to_wire
from headrace.core.validation import InputChecker, ModelInputs
from headrace.repository.drift import DriftGuard, is_due
from headrace_backends.optimize.replay import write_replay

SIGNATURE = Signature(
    (TensorSpec("x", DataType.FP32, (-1, 2)),), (TensorSpec("y", DataType.FP32, (-1, 2)),), max_batch_size=8
)
S = 10**9


class Model:
    """A version served by a plan, whose instances add what the test says, or fail."""

    def __init__(self, replay: Path, instances: int = 1) -> None:
        plan = SimpleNamespace(model="m", version="1", tolerance=1e-2)
        self.planned = SimpleNamespace(replay=replay, plan=plan)
        self.folder = SimpleNamespace(name="m")
        self.version = "1"
        self.queue = BatchQueue("m", BatchLimits(8), 100)
        self.checker = InputChecker("m", SIGNATURE)
        self.instances = [SimpleNamespace(used_at_ns=5, adds=1.0) for _ in range(instances)]
        self.distrusted = ""
        self.resident = self.ready = True
        self.reshaped = False
        self.checked_at_ns = 0
        self.error = None
        self.ran = []
        self.after_batch = lambda: None
        self._pumps = []

    def distrust(self, reason):
        self.distrusted = reason

    def start(self):
        loop = asyncio.get_running_loop()
        self._pumps = [loop.create_task(self._pump(one)) for one in self.instances]

    async def stop(self):
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    async def _pump(self, instance):
        while True:
            batch = await self.queue.take()
            self.ran.append((instance, batch))
            await asyncio.sleep(0)
            instance.used_at_ns += 1
            for one in batch:
                if self.error is not None:
                    one.fail(self.error)
                    continue
                x = one.inputs.tensors[0]
                y = from_wire(x.data, x.datatype, x.shape) + np.float32(instance.adds)
                one.resolve((Tensor("y", DataType.FP32, x.shape, to_wire(y)),), 0)
            self.queue.finished(batch)
            self.after_batch()

    def put(self):
        x = Tensor("x", DataType.FP32, (1, 2), to_wire(np.zeros((1, 2), np.float32)))
        request = InferRequest("m", "", "", (x,))
        pending = Pending(request, ModelInputs((x,), 1, None), "1", None, asyncio.get_running_loop())
        self.queue.put(pending)
        return pending


@pytest.fixture
def replay(tmp_path):
    inputs = [{"x": np.array([[number, 1]], np.float32)} for number in range(3)]
    write_replay(tmp_path / "replay.npz", inputs, [{"y": one["x"] + 1} for one in inputs])
    return tmp_path / "replay.npz"


@pytest.fixture
def plans():
    counted = SimpleNamespace(replays=Counter())
    counted.note_replay = lambda _, *, good: counted.replays.update([good])
    return counted


async def checked(model, plans):
    model.start()
    try:
        await DriftGuard(lambda: iter([model]), plans, 300.0).check(model)
    finally:
        await model.stop()


async def test_right_answers_are_noted_and_nothing_else(replay, plans):
    model = Model(replay)
    await checked(model, plans)
    assert plans.replays == {True: 1}
    assert model.distrusted == ""
    assert model.checked_at_ns > 0
    assert [instance.used_at_ns for instance in model.instances] == [5]  # nobody has used it
    assert [len(batch) for _, batch in model.ran] == [1, 1, 1]
    assert not any(one.counts for _, batch in model.ran for one in batch)


async def test_every_instance_is_asked(replay, plans):
    model = Model(replay, instances=3)
    model.instances[1].adds = 7.0
    await checked(model, plans)
    assert Counter(id(instance) for instance, _ in model.ran) == {id(one): 3 for one in model.instances}
    assert plans.replays == {False: 1}
    assert "its answers have changed while it served: output 'y' is off by" in model.distrusted


async def test_a_form_that_fails_is_not_trusted(replay, plans):
    model = Model(replay)
    model.error = InternalError("no such kernel")
    await checked(model, plans)
    assert model.distrusted == "a recorded request is refused: no such kernel"


@pytest.mark.parametrize("leaves", ["the memory", "the shelf"])
async def test_one_that_is_not_there_any_more_is_not_asked_on(replay, plans, leaves):
    """Nobody would answer it, and no other model would be looked at for ten minutes."""
    model, there = Model(replay), []
    there.append(model)

    async def go_away():
        if leaves == "the memory":
            model.resident = False
        else:
            there.clear()
        await model.stop()

    model.after_batch = lambda: going.append(asyncio.get_running_loop().create_task(go_away()))
    going = []
    model.start()
    await asyncio.wait_for(DriftGuard(lambda: iter(there), plans, 300.0).check(model), 30)
    await asyncio.gather(*going)
    assert len(model.ran) == 1
    assert (len(model.queue), plans.replays, model.distrusted) == (0, {}, "")


async def test_what_says_nothing_of_the_form_is_no_reason(replay, plans):
    model = Model(replay)
    model.error = NotReady("its worker is restarting")
    await checked(model, plans)
    assert model.distrusted == ""
    assert plans.replays == {}


async def test_clients_requests_end_the_check(replay, plans):
    model = Model(replay)
    left = iter(range(20))
    model.after_batch = lambda: model.put() if next(left, None) is not None else None
    await checked(model, plans)
    rechecks = [one for _, batch in model.ran for one in batch if not one.counts]
    assert len(rechecks) == 1  # one recorded request, and then the clients' turn
    assert plans.replays == {}
    assert model.checked_at_ns == 0  # it is checked when it is idle again


async def test_a_recording_that_is_gone_is_no_reason(replay, plans):
    replay.unlink()
    model = Model(replay)
    await checked(model, plans)
    assert model.distrusted == ""


async def test_only_idle_forms_in_memory_are_due(replay):
    model = Model(replay)
    model.checked_at_ns = 100 * S
    assert not is_due(model, 399 * S, 300.0)
    assert is_due(model, 400 * S, 300.0)
    model.instances[0].used_at_ns = 200 * S
    assert not is_due(model, 499 * S, 300.0)
    assert is_due(model, 500 * S, 300.0)
    for name, value in (
        ("distrusted", "why"),
        ("resident", False),
        ("ready", False),
        ("reshaped", True),
        ("planned", None),
    ):
        was = getattr(model, name)
        setattr(model, name, value)
        assert not is_due(model, 500 * S, 300.0), name
        setattr(model, name, was)
    model.put()
    assert not is_due(model, 500 * S, 300.0)

"""Where instances go, what becomes of the processes, and the watch over their time; processes and clock are made up."""

import asyncio
import itertools
from types import SimpleNamespace

import pytest

from headrace.workers import supervisor
from headrace.workers.loads import LoadRefused
from headrace.workers.placement import Needs, PlacementLimits
from headrace.workers.supervisor import Supervisor

SMALL = Needs(1000, shareable=True)


class Process:
    """A worker process that loads a model when the test says so, or refuses it."""

    node, device, pid, is_loading, used_at_ns = None, "cpu", None, False, 0

    def __init__(self, name, *, shared, **_):
        self.name = name
        self.shared = shared
        self.threads = 1
        self.leaving = self.stopped = False
        self.hosted = {}
        self.answers = {}

    async def load(self, instance):
        self.hosted[instance.load.instance] = instance
        answer = self.answers[instance.load.name] = asyncio.get_running_loop().create_future()
        try:
            await answer
        except BaseException:
            self.unload(instance)
            raise

    def unload(self, instance):
        self.hosted.pop(instance.load.instance, None)

    async def stop(self):
        self.stopped = True


class Instance:
    """One that has nothing to answer."""

    loaded = broken = ""

    def __init__(self, name, number):
        self.load = SimpleNamespace(name=name, instance=number, threads=1)

    def twin(self, number):
        return Instance(self.load.name, number)

    async def leave(self):
        pass

    def replaced_by(self, twin):
        pass


async def settle():
    for _ in range(8):
        await asyncio.sleep(0)


async def two_loaded(monkeypatch):
    """A supervisor with one process, which hosts "a" and "b"."""
    monkeypatch.setattr(supervisor, "WorkerProcess", Process)
    limits = PlacementLimits(own=0, shared=1)
    made = Supervisor(cpus=lambda: 2, limits=limits, load_timeout_s=60.0, log_format="text")
    loop = asyncio.get_running_loop()
    for name in ("a", "b"):
        loading = loop.create_task(made.start_instance(Instance(name, made.number()), SMALL))
        await settle()
        made.processes[0].answers[name].set_result(None)
        await loading
    return made


async def test_a_process_that_was_to_be_replaced_stays_for_what_has_come_up_there_meanwhile(monkeypatch):
    made = await two_loaded(monkeypatch)
    (old,) = made.processes
    broken, _ = old.hosted.values()
    broken.broken = "no memory"
    replacing = asyncio.get_running_loop().create_task(made.replace(old, 1.0))
    await settle()
    _, successor = made.processes
    broken.broken = ""
    successor.answers["b"].set_result(None)
    assert await asyncio.wait_for(replacing, 30) is successor
    assert [one.load.name for one in old.hosted.values()] == ["a"]
    assert [one.load.name for one in successor.hosted.values()] == ["b"]
    assert [one.name for one in made.processes if one.leaving or one.stopped] == []


async def test_a_process_that_was_to_take_anothers_place_and_could_not_stays_for_whom_it_was_given(monkeypatch):
    monkeypatch.setattr(supervisor, "WorkerProcess", Process)
    limits = PlacementLimits(own=0, shared=1)
    made = Supervisor(cpus=lambda: 2, limits=limits, load_timeout_s=60.0, log_format="text")
    loop = asyncio.get_running_loop()
    first = loop.create_task(made.start_instance(Instance("a", made.number()), SMALL))
    await settle()
    (old,) = made.processes
    old.answers["a"].set_result(None)
    await first
    replacing = loop.create_task(made.replace(old, 1.0))
    await settle()
    _, successor = made.processes
    other = loop.create_task(made.start_instance(Instance("b", made.number()), SMALL))
    await settle()
    successor.answers["b"].set_result(None)
    await other
    successor.answers["a"].set_exception(LoadRefused("no memory for two of it"))
    with pytest.raises(LoadRefused):
        await replacing
    assert [one.load.name for one in successor.hosted.values()] == ["b"]
    assert not successor.stopped
    assert [one.name for one in made.processes if one.leaving] == []


@pytest.mark.parametrize(
    ("rounds", "counted"),
    [
        ([0.25, 0.3, 0.25], [0, 1, 2]),
        ([0.25, 60.0, 0.25, 0.25], [0, 2, 3]),  # it was held up once
        ([3.0, 3.0, 3.0, 3.0, 0.25], [1, 3, 4]),  # it always is, and a worker that hangs is to be found all the same
    ],
)
async def test_after_it_was_held_up_itself_the_server_gives_its_workers_another_moment(monkeypatch, rounds, counted):
    ends = [100.0 + one for one in itertools.accumulate(rounds)]
    reads = itertools.chain([100.0], *((end, end) for end in ends), itertools.repeat(ends[-1]))
    monkeypatch.setattr(supervisor, "monotonic", lambda: next(reads))
    monkeypatch.setattr(supervisor, "WATCH_INTERVAL_S", 0.0)
    checked = []
    made = Supervisor(cpus=lambda: 1, limits=PlacementLimits(1, 1), load_timeout_s=60.0, log_format="text")
    made._processes["w"] = SimpleNamespace(check_time=lambda now, _: checked.append(now))
    made.start()
    while len(checked) < len(counted):
        await asyncio.sleep(0)
    made._watch.cancel()
    assert checked[: len(counted)] == [ends[number] for number in counted]

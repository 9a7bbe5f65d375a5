"""A version while it is served, over made-up workers."""

import pytest

from headrace.core.errors import NotReady
from headrace.core.model import Signature, TensorSpec
from headrace.core.tensor import DataType
from headrace.repository.layout import read_folder
from headrace.repository.served import ServedVersion
from headrace.workers.frames import Loaded
from headrace.workers.loads import LoadRefused
from headrace.workers.turns import CpuTurns

SPEC = TensorSpec("x", DataType.UINT8, (-1, 2))


class Supervisor:
    """Has every instance up at once, in a worker that is never asked for anything."""

    def __init__(self, decoupled=False):
        self.turns = CpuTurns(2)
        self._number = 0
        self._signature = Signature((SPEC,), (SPEC,), 4, decoupled)

    def cpus(self):
        return 2

    def number(self):
        self._number += 1
        return self._number

    def bring_up(self, instance):
        instance.up(None, Loaded(instance.load.instance, self._signature, False, 0, (), 0.1))
        instance.start()

    async def start_instance(self, instance, _):
        self.bring_up(instance)

    async def stop_instance(self, instance):
        instance.retire()


def version(path, supervisor, more=""):
    folder = path / "m" / "1"
    folder.mkdir(parents=True)
    (path / "m" / "config.yaml").write_text(f"backend: fake\nwarmup: false\n{more}")
    found = read_folder(path / "m")
    return ServedVersion(found, found.versions[1], supervisor)


@pytest.fixture
async def served(tmp_path):
    made = version(tmp_path, Supervisor())
    await made.start()
    yield made
    await made.stop_instances()


async def test_requests_are_taken_again_when_another_instance_stands_in_for_one_that_broke_meanwhile(served):
    (old,) = served.instances
    twin = old.twin(77)
    served._supervisor.bring_up(twin)
    old.break_down("CUDA out of memory: two of it do not fit")
    with pytest.raises(NotReady, match="two of it do not fit"):
        served.queue.make_room()
    old.replaced_by(twin)
    served.queue.make_room()
    assert (served.instances, served.ready, served.broken) == ([twin], True, False)


async def test_a_model_that_turns_out_to_stream_cannot_have_an_objective(tmp_path):
    """Its requests but the first would wait for ever, for the end of a batch that has none."""
    made = version(tmp_path, Supervisor(decoupled=True), "batching: {p99_objective_ms: 50}\n")
    with pytest.raises(LoadRefused, match="p99_objective_ms is not for a decoupled model"):
        await made.start()
    assert made.instances == []

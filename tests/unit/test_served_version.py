"""A version while it is served, over made-up workers."""

from pathlib import Path

import pytest

from headrace.core.errors import InvalidRequest, NotReady
from headrace.core.fingerprint import fingerprint
from headrace.core.model import Signature, TensorSpec
from headrace.core.tensor import DataType
from headrace.repository.layout import read_folder
from headrace.repository.served import ServedVersion
from headrace.workers.frames import Loaded
from headrace.workers.loads import LoadRefused
from headrace.workers.restarts import Pause
from headrace.workers.turns import CpuTurns

SPEC = TensorSpec("x", DataType.UINT8, (-1, 2))


class Supervisor:
    """Has every instance up at once, in a worker that is never asked for anything. ``found`` is what it has read."""

    def __init__(self, decoupled=False):
        self.turns = CpuTurns(2)
        self._number = 0
        self._signature = Signature((SPEC,), (SPEC,), 4, decoupled)
        self.found = None  # None: the files of the version as they are

    def cpus(self):
        return 2

    def number(self):
        self._number += 1
        return self._number

    def bring_up(self, instance):
        load = instance.load
        found = fingerprint(Path(load.repository, load.version)) if self.found is None else self.found
        instance.up(None, Loaded(load.instance, self._signature, False, 0, (), 0.1, files_print=found))
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


async def test_one_that_keeps_dying_says_so_and_refuses_only_where_there_is_no_hope(served):
    (instance,) = served.instances
    instance.down(None, [], "signal SIGSEGV")
    assert (served.ready, served.why_unready) == (False, "its worker is restarting")
    instance.leave_alone(Pause(0.4, "its worker died 5 times in a row"))
    assert (served.ready, served.broken, served.why_unready) == (False, False, "its worker died 5 times in a row")
    served.queue.make_room()
    instance.leave_alone(Pause(5.0, "its worker died 12 times in a row", hopeless=True))
    assert (served.ready, served.broken, served.why_unready) == (False, True, "its worker died 12 times in a row")
    with pytest.raises(NotReady, match="not at ready state: its worker died 12 times in a row"):
        served.queue.make_room()
    served._supervisor.bring_up(instance)
    served.queue.make_room()
    assert (served.ready, served.broken, instance.pause) == (True, False, Pause())


# ---- whose answers they are ----


def restart(served, instance, found=None):
    """Its worker dies and is back, and has read other files than before."""
    instance.down(None, [], "signal SIGKILL")
    served._supervisor.found = found
    served._supervisor.bring_up(instance)


async def test_files_that_are_the_same_again_have_the_same_answers(served):
    assert served.identity == f"1/{served.print}"
    restart(served, served.instances[0])
    assert served.identity == f"1/{served.print}"


async def test_what_was_answered_by_other_files_is_not_taken_for_an_answer_of_these(tmp_path):
    served = version(tmp_path, Supervisor(), "instances: [{count: 2}]\n")
    await served.start()
    first, second = served.instances
    seen = [served.identity]
    restart(served, first, "changed")
    seen.append(served.identity)
    restart(served, second, "changed")
    seen.append(served.identity)
    restart(served, second, "once more")
    seen.append(served.identity)
    assert len(set(seen)) == 4, "also while one has the old files and one the new"
    restart(served, second, "changed")
    assert served.identity == seen[2]
    await served.stop_instances()
    assert served.identity == seen[2], "what it had when it was in memory last"
    await served.start_instances()
    assert served.identity == seen[2]
    await served.stop_instances()


async def test_an_instance_is_known_by_its_files_before_its_first_batch_and_so_is_one_that_takes_its_place(served):
    (old,) = served.instances
    before = served.identity
    twin = old.twin(77)
    served._supervisor.found = "changed"
    served._supervisor.bring_up(twin)
    both = served.identity
    old.replaced_by(twin)
    assert len({before, both, served.identity}) == 3


def test_a_step_of_an_ensemble_may_have_fewer_levels_than_its_request_names(tmp_path):
    made = version(tmp_path, Supervisor(), "batching: {priority_levels: 3, default_priority: 2}\n")
    for wanted, level in ((0, 2), (1, 1), (3, 3)):
        assert made.priority({"priority": wanted}) == made.priority({"priority": wanted}, for_another=True) == level
    assert made.priority({"priority": 4}, for_another=True) == 2
    for wanted in (4, -1, "1", True, 1.0):
        with pytest.raises(InvalidRequest, match="served first"):
            made.priority({"priority": wanted}, for_another=wanted != 4)

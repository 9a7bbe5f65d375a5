"""What the instances of a version load and need, as its model was dropped in or by a plan."""

from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest

from headrace.repository.form import ServedForm, version_print
from headrace.repository.layout import ModelFolder, VersionFiles
from headrace.repository.model_config import ModelConfig
from headrace.workers.resources import GLOBAL

FILES = VersionFiles(3, "onnxruntime", Path("/models/m/3/model.onnx"), "files", 1000)


def folder_of(config_print="config", **config):
    return ModelFolder("m", Path("/models/m"), ModelConfig(**config), versions={3: FILES}, config_print=config_print)


def form_of(planned=None, **config):
    return ServedForm(folder_of(**config), FILES, planned)


def loads(form, cpus=8):
    numbers = count(40)
    return form.loads(cpus, lambda: next(numbers))


def planned(**config):
    """A plan's form, of another backend."""
    files = VersionFiles(3, "torch", Path("/plans/p/model.pt2"), "files", 7000)
    plan = SimpleNamespace(tolerance=0.25)
    return SimpleNamespace(
        config=ModelConfig(**config), files=files, print="plan", plan=plan, replay=Path("/plans/p/replay")
    )


def test_every_instance_is_asked_to_load_the_same_on_its_own_device():
    form = form_of(instances=[{"count": 2}, {"device": "gpu:1"}], execution_timeout_s=3.0, parameters={"a": 1})
    made = loads(form)
    assert form.count == len(made) == 3
    assert [one.instance for one in made] == [40, 41, 42]
    assert [one.device for one in made] == ["cpu", "cpu", "gpu:1"]
    assert {(one.name, one.version, one.backend, one.path) for one in made} == {
        ("m", "3", "onnxruntime", "/models/m/3/model.onnx")
    }
    assert all((one.parameters, one.replay, one.tolerance) == ({"a": 1}, "", 0.0) for one in made)


@pytest.mark.parametrize(
    ("parameters", "threads"),
    [({}, 2), ({"intra_op_threads": 3}, 3), ({"intra_op_threads": 99}, 8), ({"intra_op_threads": True}, 2)],
)
def test_instances_share_the_cpus_unless_their_owner_has_said_how_many_threads_they_have(parameters, threads):
    form = form_of(instances=[{"count": 4}], parameters=parameters)
    assert {one.threads for one in loads(form)} == {threads}


def test_a_plan_says_what_is_run_and_the_folder_what_it_is_called():
    form = form_of(planned(instances=[{"count": 2}], max_batch_size=16), max_batch_size=4)
    made = loads(form)
    assert [(one.backend, one.path, one.max_batch_size) for one in made] == [("torch", "/plans/p/model.pt2", 16)] * 2
    assert {(one.name, one.version, one.replay, one.tolerance) for one in made} == {("m", "3", "/plans/p/replay", 0.25)}
    assert form.estimated_bytes == 14000
    assert [one.file_bytes for one in form.needs(None, pages=False)] == [7000] * 2


def test_the_print_is_that_of_the_files_the_configuration_and_the_plan():
    prints = {
        form_of().print,
        ServedForm(folder_of(config_print="changed"), FILES, None).print,
        form_of(planned()).print,
    }
    assert len(prints) == 3
    assert form_of().print == version_print(folder_of(), 3) == "config/files"


def test_each_needs_what_its_group_says():
    limit = {"resources": {"R": 2}, "global_resources": {"G": 1}, "priority": 3}
    form = form_of(instances=[{"count": 1}, {"device": "gpu:1", "count": 2, "rate_limit": limit}])
    first, *others = form.needs(None, pages=True)
    assert (first.device, first.resources, first.priority) == ("cpu", {}, 1)
    assert len(others) == 2
    for one in others:
        assert (one.device, one.priority) == ("gpu:1", 3)
        assert one.resources == {("gpu:1", "R"): 2, (GLOBAL, "G"): 1}
    assert all(one.pages and not one.again for one in (first, *others))


def test_only_what_may_be_measured_together_shares_a_process():
    assert all(one.shareable for one in form_of().needs(None, pages=False))
    assert not any(one.shareable for one in form_of(memory_limit_bytes=1 << 30).needs(None, pages=False))
    assert not any(one.shareable for one in form_of(planned()).needs(None, pages=False))


@pytest.mark.parametrize(
    ("said", "took", "needs"), [(0, None, 1000), (0, 5000, 5000), (9000, 5000, 9000), (9, None, 9)]
)
def test_of_a_gpu_it_needs_what_was_said_or_its_files_size_and_what_it_took_if_that_was_more(said, took, needs):
    form = form_of(instances=[{"device": "gpu:0", "gpu_memory_bytes": said}])
    before = None if took is None else SimpleNamespace(gpu_bytes=took)
    (one,) = form.needs(before, pages=False)
    assert (one.gpu_bytes, one.again) == (needs, took is not None)

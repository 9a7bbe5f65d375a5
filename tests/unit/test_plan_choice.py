"""Which version is served by which plan: found, fitted to the configuration, refused with reasons; made-up files."""

from pathlib import Path

import msgspec
import pytest
from hand_made_plans import put_plan

from headrace.core.model import TensorSpec
from headrace.core.tensor import DataType
from headrace.optimizing import OptimizeArguments, job_of
from headrace.repository.layout import read_folder
from headrace.repository.planned import Unfit, planned_form
from headrace.repository.plans import Plans, digest_of
from headrace.repository.trust import MAX_DEATHS, WITHIN_NS, Trust
from headrace_backends.optimize.accuracy import Budget
from headrace_backends.optimize.form import Form
from headrace_backends.optimize.plan import PLAN_FILE
from headrace_backends.optimize.plan_cache import PlanCache

X = "{name: x, datatype: FP32, shape: [-1, 2]}"


@pytest.fixture
def cache(tmp_path):
    return PlanCache(tmp_path / "plans")


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "repository" / "m"
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.onnx").write_bytes(b"weights")
    return folder


@pytest.fixture
def plans(cache):
    return Plans(cache)


async def chosen(plans, model: Path):
    folder = read_folder(model)
    found = await plans.choose(folder, folder.versions)
    return found.get(1), plans.choice("m", "1").why_not


async def test_a_plan_is_chosen_only_where_there_is_one(plans, cache, model):
    assert await chosen(plans, model) == (None, "none was made")
    put_plan(cache, model, b"form")
    planned, why_not = await chosen(plans, model)
    assert planned is not None
    assert why_not == ""
    assert planned.files.model_path.read_bytes() == b"form"
    assert planned.replay.exists()


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            "instances: [{device: 'gpu:0'}, {}]",
            "its instances are on several devices (cpu, gpu:0), and a plan is for one",
        ),
        ("decoupled: true", "a decoupled model is served as it was dropped in"),
        ("sequence: {}", "a model of sequences is served as it was dropped in"),
        ("ensemble: [{model: a, outputs: {y: y}}]", "an ensemble runs nothing itself"),
    ],
)
async def test_some_models_are_never_served_by_plans(plans, cache, model, config, reason):
    put_plan(cache, model, b"form")
    (model / "config.yaml").write_text(config)
    assert await chosen(plans, model) == (None, reason)


@pytest.mark.parametrize(
    ("optimize", "reason"),
    [
        ("{}", ""),
        ("{objective: throughput}", "it was made for another objective: latency, and throughput is configured"),
        (
            "{budget: {metric: cosine, min: 0.9}}",
            "it was made for another budget: none, and cosine >= 0.9 is configured",
        ),
        (
            "{budget: {metric: cosine, min: 0.9}, allow: [bf16]}",
            "it was made for another budget: none, and cosine >= 0.9 is configured",
        ),
    ],
)
async def test_a_plan_is_for_what_its_owner_wishes(plans, cache, model, optimize, reason):
    put_plan(cache, model, b"form")
    (model / "config.yaml").write_text(f"optimize: {optimize}\n")
    planned, why_not = await chosen(plans, model)
    assert why_not == reason
    assert (planned is None) == bool(reason)


async def test_what_is_allowed_has_to_be_the_same(plans, cache, model):
    put_plan(cache, model, b"form", budget=Budget("cosine", min=0.9), allow=("bf16", "int8_static"))
    (model / "config.yaml").write_text("optimize: {budget: {metric: cosine, min: 0.9}, allow: [int8_static, bf16]}")
    assert (await chosen(plans, model))[1] == ""
    (model / "config.yaml").write_text("optimize: {budget: {metric: cosine, min: 0.9}, allow: [bf16]}")
    assert (await chosen(plans, model))[1] == (
        "it was made for another allow: [bf16, int8_static], and [bf16] is configured"
    )


async def test_only_what_changes_answers_makes_a_plan_stale(plans, cache, model):
    put_plan(cache, model, b"form")
    (model / "config.yaml").write_text(
        "batching: {max_queue_size: 7}\nwarmup: false\nversions: all\nresponse_cache: true\n"
        "outputs: [{name: y, datatype: FP32, shape: [-1, 2], labels: l.txt}]\n"
    )
    (model / "l.txt").write_text("a")
    declared = digest_of(read_folder(model), 1)
    (model / "config.yaml").write_text("outputs: [{name: y, datatype: FP32, shape: [-1, 2]}]\n")
    assert digest_of(read_folder(model), 1) == declared
    (model / "config.yaml").write_text("batching: {max_queue_size: 7}\n")
    assert (await chosen(plans, model))[1] == ""
    for change in ("max_batch_size: 4", "parameters: {a: 1}", f"inputs: [{X}]", "backend: onnx\nparameters: {b: 1}"):
        (model / "config.yaml").write_text(change)
        assert (await chosen(plans, model))[1].startswith("stale: the model's files or its configuration"), change
    (model / "config.yaml").unlink()
    (model / "1" / "model.onnx").write_bytes(b"other weights")
    assert (await chosen(plans, model))[1].startswith("stale: ")


async def test_files_are_read_again_only_when_they_change(plans, cache, model, monkeypatch):
    put_plan(cache, model, b"form")
    read = []
    monkeypatch.setattr(
        "headrace.repository.plans.digest_of",
        lambda folder, version: read.append(version) or digest_of(folder, version),
    )
    await chosen(plans, model)
    await chosen(plans, model)
    assert read == [1]
    (model / "1" / "more").write_bytes(b"x")
    await chosen(plans, model)
    assert read == [1, 1]


async def test_a_broken_plan_is_refused_once_and_told(plans, cache, model):
    told = []
    plans.on_refused = lambda *what: told.append(what)
    (put_plan(cache, model, b"form") / "model.onnx").write_bytes(b"fork")
    planned, why_not = await chosen(plans, model)
    assert planned is None
    assert why_not == "refused: its file 'model.onnx' is not what was put there"
    assert told == [("m", "1", "its file 'model.onnx' is not what was put there")]
    assert await chosen(plans, model) == (None, why_not)
    assert plans.refusals["m", "1"] == 1
    put_plan(cache, model, b"form")  # rebuilt
    assert (await chosen(plans, model))[0] is not None


async def test_a_refused_plan_is_not_used_even_where_it_cannot_be_set_aside(plans, cache, model, monkeypatch):
    def cannot(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr(PlanCache, "refuse", cannot)
    put_plan(cache, model, b"form")
    planned, _ = await chosen(plans, model)
    await plans.refuse(planned, "wrong answers")
    assert await chosen(plans, model) == (None, "refused: wrong answers")
    put_plan(cache, model, b"better form")
    assert (await chosen(plans, model))[0] is not None


async def test_a_plan_that_was_made_meanwhile_is_not_refused_for_its_forerunner(plans, cache, model):
    put_plan(cache, model, b"form")
    planned, _ = await chosen(plans, model)
    put_plan(cache, model, b"better form")
    await plans.refuse(planned, "wrong answers")
    better, _ = await chosen(plans, model)
    assert better.files.model_path.read_bytes() == b"better form"


@pytest.mark.parametrize("error", [PermissionError("not yours"), RuntimeError("a bug")])
async def test_what_cannot_be_looked_for_is_no_reason_not_to_serve(plans, cache, model, monkeypatch, error):
    def fail(*_):
        raise error

    put_plan(cache, model, b"form")
    monkeypatch.setattr(PlanCache, "place", fail)
    planned, why_not = await chosen(plans, model)
    assert planned is None
    assert why_not.startswith("it c")


async def test_who_only_looks_changes_nothing(cache, model):
    plans = Plans(cache, marks=False)
    folder = put_plan(cache, model, b"form")
    (folder / PLAN_FILE).write_text("{")
    assert (await chosen(plans, model))[1].startswith("refused: plan.json cannot be read")
    assert folder.is_dir()


# ---- the planned form ----


def formed(cache, model, form, config="", artifact="model.onnx"):
    (model / "config.yaml").write_text(config)
    place = put_plan(cache, model, b"form", form=form, backend=form.backend)
    plan = cache.find("m", "1", digest_of(read_folder(model), 1))[0]
    folder = read_folder(model)
    return planned_form(msgspec.structs.replace(plan, artifact=artifact), place, folder, folder.versions[1])


def test_a_form_without_a_configuration_has_its_own_way(cache, model):
    form = Form("openvino", parameters={"precision": "f32"}, threads=1, instances=2, max_batch_size=16)
    planned = formed(cache, model, form)
    config = planned.config
    assert planned.files.backend == "openvino"
    assert planned.files.model_bytes > 0
    assert (config.parameters, config.max_batch_size) == ({"precision": "f32", "intra_op_threads": 1}, 16)
    assert [(one.device, one.count) for one in config.instances] == [("cpu", 2)]


def test_what_the_owner_has_said_wins(cache, model):
    form = Form("onnxruntime", parameters={"a": 1, "b": 2}, threads=2, instances=2, max_batch_size=16)
    said = "max_batch_size: 4\ninstances: [{count: 3}]\nparameters: {intra_op_threads: 1, b: 3}\n"
    config = formed(cache, model, form, said).config
    assert config.parameters == {"a": 1, "b": 3, "intra_op_threads": 1}
    assert config.max_batch_size == 4
    alone = msgspec.structs.replace(form, max_batch_size=1)  # it was proved for no more
    assert formed(cache, model, alone, said).config.max_batch_size == 1
    assert [one.count for one in config.instances] == [3]


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_what_is_measured_is_what_is_served(cache, model, tmp_path, backend):
    form = Form(backend, parameters={"a": 1, "b": 2}, threads=2)
    served = formed(cache, model, form, "parameters: {intra_op_threads: 1, c: 3}").config
    job = job_of(OptimizeArguments("m", model.parent, tmp_path / "plans"))
    assert job.subject.source(form, tmp_path, 4).parameters == served.parameters
    assert job.subject.overruled(form) == []
    other = msgspec.structs.replace(form, parameters={"a": 1, "c": 2})
    assert job.subject.overruled(other) == (["c"] if backend == "onnxruntime" else [])
    assert job.goal.several
    (model / "config.yaml").write_text("instances: [{count: 1}]")
    assert not job_of(OptimizeArguments("m", model.parent, tmp_path / "plans")).goal.several


def test_machine_code_of_a_plan_needs_no_consent_of_its_own_and_may_be_forbidden(cache, model):
    form = Form("onnxruntime", parameters={"allow_native_code": True})
    assert formed(cache, model, form).config.parameters == {"allow_native_code": True}
    forbidden = formed(cache, model, form, "parameters: {allow_native_code: false}")
    assert forbidden.config.parameters == {"allow_native_code": False}


def test_another_backend_is_not_given_the_owners_parameters_but_for_threads(cache, model):
    said = "parameters: {intra_op_threads: 1, graph_optimization_level: all}\n"
    assert formed(cache, model, Form("openvino"), said).config.parameters == {"intra_op_threads": 1}


def test_a_form_of_the_file_that_was_dropped_in_runs_that(cache, model):
    planned = formed(cache, model, Form("openvino"), artifact="")
    assert planned.files.model_path == model / "1" / "model.onnx"


def test_every_plan_has_a_print_of_its_own(cache, model):
    assert formed(cache, model, Form("openvino")).print != formed(cache, model, Form("onnxruntime")).print


def test_wishes_are_checked_whoever_asks(cache, model):
    folder = read_folder(model)
    place = put_plan(cache, model, b"form")
    plan = cache.find("m", "1", digest_of(folder, 1))[0]
    (model / "config.yaml").write_text("optimize: {objective: throughput}")
    folder = read_folder(model)
    with pytest.raises(Unfit, match="another objective"):
        planned_form(plan, place, folder, folder.versions[1])


def spec(name="x", datatype=DataType.FP32, shape=(-1, 4), optional=False):
    return TensorSpec(name, datatype, shape, optional)


# ---- trust ----


def test_one_request_that_kills_twice_or_three_deaths_soon_end_the_trust():
    trust = Trust()
    assert not trust.died(0, used_up=False)
    assert trust.died(1, used_up=True)
    trust = Trust()
    assert [trust.died(number, used_up=False) for number in range(MAX_DEATHS)] == [False, False, True]


def test_rare_deaths_are_forgiven():
    trust = Trust()
    assert not any(trust.died(number * WITHIN_NS, used_up=False) for number in range(20))

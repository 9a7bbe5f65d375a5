"""What the optimiser tries on a GPU, and what a plan for one depends on: with made-up hardware."""

import time
from pathlib import Path

import pytest

import headrace
from headrace import optimizing
from headrace.optimizing import CannotOptimize, OptimizeArguments, job_of
from headrace.repository.layout import read_folder
from headrace.repository.planned import planned_form
from headrace.repository.plans import digest_of
from headrace_backends.optimize import library
from headrace_backends.optimize.accuracy import Errors
from headrace_backends.optimize.basis import difference, searched_versions
from headrace_backends.optimize.candidates import candidates
from headrace_backends.optimize.facts import Facts
from headrace_backends.optimize.findings import Hardware
from headrace_backends.optimize.form import Form, Technique
from headrace_backends.optimize.hardware import told_by
from headrace_backends.optimize.plan import Basis, Plan
from headrace_backends.optimize.search import SearchFailed
from headrace_backends.optimize.subject import Subject
from headrace_backends.optimize.trial import Trial, TrialFailed

HALVES = frozenset({Technique.TF32, Technique.FP16, Technique.BF16})
UUID = "GPU-5a3c1f00-0b1d-4f5e-9c7a-0123456789ab"


def forms(ending=".onnx", backend="onnxruntime", kind="dense", allow=frozenset(), **more):
    return [one.form for one in candidates(Facts(ending, backend, kind, frozenset(allow), on_gpu=True, **more))]


def names(*asked, **more):
    return [form.name for form in forms(*asked, **more)]


@pytest.mark.parametrize(
    ("ending", "backend"),
    [
        (".onnx", "onnxruntime"),
        (".onnx", "tensorrt"),
        (".pt2", "torch"),
        (".pt", "torch"),
        (".plan", "tensorrt"),
        (".xml", "openvino"),
    ],
)
@pytest.mark.parametrize("kind", ["convolutional", "transformer", "dense"])
@pytest.mark.parametrize("exhaustive", [False, True])
def test_every_form_runs_on_a_gpu_and_without_permission_answers_stay(ending, backend, kind, exhaustive):
    found = forms(ending, backend, kind, exhaustive=exhaustive)
    assert all(form.faithful for form in found)
    assert "openvino" not in {form.backend for form in found}
    assert not {"tf32", "autocast"} & {name for form in found for name in form.parameters}
    assert {form.parameters.get("precision", "fp32") for form in found} <= {"fp32"}
    lossy = forms(ending, backend, kind, HALVES, exhaustive=exhaustive)
    assert len({form.name for form in lossy}) == len(lossy)
    assert [form.faithful for form in lossy] == sorted((form.faithful for form in lossy), reverse=True)
    assert [form for form in lossy if form.faithful] == found


@pytest.mark.parametrize("technique", sorted(HALVES))
def test_each_precision_is_tried_where_it_is_allowed_and_nowhere_else(technique):
    found = forms(".pt2", "torch", "convolutional", {technique})
    lossy = [form for form in found if not form.faithful]
    assert {form.techniques for form in lossy} == {(technique,)}
    asked = {"tf32": [{"tf32": True}, {"precision": "tf32"}]}.get(
        technique, [{"autocast": str(technique)}, {"precision": str(technique)}]
    )
    for parameters in asked:
        assert any(form.parameters.items() >= parameters.items() for form in lossy)


def test_an_onnx_file_is_tried_on_every_engine():
    assert names() == [
        "tensorrt + cuda_graphs=True + precision=fp32",
        "onnxruntime + cuda_graphs=True",
    ]
    assert "onnxruntime + provider=tensorrt + tf32=True" in names(allow={Technique.TF32})  # it cannot do without
    assert "onnxruntime + half(to=float16)" in names(allow={Technique.FP16})
    assert "onnxruntime + fuse_transformer" in names(kind="transformer")
    deep = names(allow={Technique.FP16}, exhaustive=True)
    assert "tensorrt + builder_level=5 + cuda_graphs=True + precision=fp16" in deep
    assert "tensorrt + precision=fp32" in deep


def test_a_torch_file_is_compiled_in_several_ways_and_exported():
    found = names(".pt2", "torch", "convolutional")
    for wanted in ("torch + compile=True", "torch + channels_last=True",
                   "torch + compile=True + compile_mode=reduce-overhead",
                   "torch + aot_inductor + allow_native_code=True + cuda_graphs=True",
                   "tensorrt + export_onnx + cuda_graphs=True + precision=fp32"):  # fmt: skip
        assert wanted in found
    assert not any("max-autotune" in name for name in found)
    assert "torch + aot_inductor + allow_native_code=True + tf32=True" in names(".pt2", "torch", allow=HALVES)
    assert any("max-autotune" in name for name in names(".pt2", "torch", exhaustive=True))
    assert not any("compile" in name for name in names(".pt", "torch"))


def test_an_engine_is_as_it_was_built():
    assert names(".plan", "tensorrt", allow=HALVES) == ["tensorrt + cuda_graphs=True"]


def test_every_parameter_is_one_of_its_backend():
    from headrace_backends import onnxruntime, torch
    from headrace_backends.tensorrt import backend as tensorrt

    known = {"onnxruntime": onnxruntime.PARAMETERS, "torch": torch._PARAMETERS, "tensorrt": tensorrt._PARAMETERS}
    for ending, name in ((".onnx", "onnxruntime"), (".pt2", "torch")):
        for form in forms(ending, name, "convolutional", HALVES, exhaustive=True):
            assert set(form.parameters) <= set(known[form.backend])


def test_forms_are_loaded_on_the_gpu_of_their_subject():
    subject = Subject("m", "1", Path("m.onnx"), "onnxruntime", Path(), device="gpu:2")
    assert subject.source(Form("tensorrt"), Path("m.onnx"), 4).gpu == 2
    assert Subject("m", "1", Path("m.onnx"), "onnxruntime", Path()).source(Form("onnxruntime"), Path(), 4).gpu is None


def test_a_trial_sees_its_gpu_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", UUID)
    with Trial(tmp_path / "log", 1, device=f"gpu:{UUID}") as trial:
        told = Path(f"/proc/{trial.pid}/environ")
        ends = time.monotonic() + 30
        while not told.read_text() and time.monotonic() < ends:  # it is empty while the program is being started
            time.sleep(0.01)
        assert f"CUDA_VISIBLE_DEVICES={UUID}\0" in told.read_text()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-other")
    with pytest.raises(TrialFailed, match="is not among the GPUs that this server may use"):
        Trial(tmp_path / "log", 1, device=f"gpu:{UUID}")


class Nvml:
    """Two GPUs, as nvidia-ml-py tells of them; ``fails`` names a call that it refuses."""

    class NVMLError(Exception):
        pass

    def __init__(self, count=2, fails="", driver=b"580.95.05"):
        self._count, self._fails, self._driver = count, fails, driver
        self.open = 0

    def __getattr__(self, name):
        def call(*asked):
            if name == self._fails:
                raise self.NVMLError(name)
            self.open += {"nvmlInit": 1, "nvmlShutdown": -1}.get(name, 0)
            return {
                "nvmlDeviceGetCount": self._count,
                "nvmlDeviceGetHandleByIndex": asked[0] if asked else None,
                "nvmlSystemGetDriverVersion": self._driver,
                "nvmlDeviceGetCudaComputeCapability": (8, 9),
                "nvmlDeviceGetName": f"NVIDIA L{asked[0]}" if asked else None,
            }.get(name)

        return call


def test_the_machine_is_told_by_its_gpus_and_their_driver():
    assert told_by(Nvml()) == "NVIDIA L0 8.9, NVIDIA L1 8.9, driver 580.95.05"
    assert told_by(Nvml(1, driver="570.1")) == "NVIDIA L0 8.9, driver 570.1"


@pytest.mark.parametrize("fails", ["nvmlInit", "nvmlDeviceGetCount", "nvmlSystemGetDriverVersion", ""])
def test_gpus_that_cannot_be_told_are_none(fails):
    nvml = Nvml(2 if fails else 0, fails)
    assert told_by(nvml) == ""
    assert nvml.open == 0


def test_a_plan_holds_for_one_gpu_and_one_driver():
    def basis(gpu):
        return Basis("m", Hardware("cpu", 2, (), gpu), {})

    assert difference(basis("L4 8.9, driver 580"), basis("L4 8.9, driver 580")) == ""
    assert difference(basis("L4 8.9, driver 580"), basis("L4 8.9, driver 590")) == (
        "it was made for another machine: the GPU was L4 8.9, driver 580 and is L4 8.9, driver 590"
    )


def test_the_versions_that_count_are_those_of_what_is_tried():
    assert "openvino" in searched_versions()
    assert "openvino" not in searched_versions(on_gpu=True)
    assert any(name.startswith("tensorrt") for name in searched_versions(on_gpu=True))


def model(folder, config):
    (folder / "1").mkdir(parents=True, exist_ok=True)
    (folder / "1" / "model.onnx").write_bytes(b"onnx")
    (folder / "config.yaml").write_text(config)
    return read_folder(folder)


def test_a_plan_of_the_cpu_is_none_for_a_gpu(tmp_path):
    configs = ("", "instances: [{count: 3}]", "instances: [{device: 'gpu:0'}]", "instances: [{device: 'gpu:1'}]",
               "backend: tensorrt", "backend: tensorrt\ninstances: [{device: 'gpu:0', count: 2}]")  # fmt: skip
    digests = [digest_of(model(tmp_path, config), 1) for config in configs]
    assert digests[0] == digests[1]
    assert digests[4] == digests[5]
    assert len(set(digests)) == 4


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("instances: [{device: 'gpu:1', count: 2}]", [("gpu:1", 2)]),
        ("backend: tensorrt", [("gpu:0", 1)]),  # which runs there whatever is said
        ("backend: tensorrt\ninstances: [{count: 3}]", [("gpu:0", 3)]),
        ("", [("cpu", 4)]),
    ],
)
def test_a_form_is_served_on_the_device_that_it_was_made_for(tmp_path, config, expected):
    folder = model(tmp_path, config)
    count = 4 if not config else 1
    form = Form("onnxruntime", instances=count)
    basis = Basis("", Hardware("", 1, ()), {})
    plan = Plan("m", "1", basis, form, "", {}, None, (), "", "", Errors(4), 2.0, (), (), "")
    planned = planned_form(plan, tmp_path, folder, folder.versions[1])
    assert [(one.device, one.count) for one in planned.config.instances] == expected
    assert planned.config.backend == "onnxruntime"


def arguments(folder):
    model(folder / "m", "instances: [{device: 'gpu:0'}]")
    return OptimizeArguments("m", folder, folder / "plans")


def test_without_a_gpu_the_command_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(optimizing, "hardware", lambda: Hardware("cpu", 2, ()))
    with pytest.raises(
        CannotOptimize, match=r"model 'm' is to run on 'gpu:0', and no GPU is seen here: .*nvidia-ml-py"
    ):
        job_of(arguments(tmp_path))


def test_with_one_the_subject_is_on_it(tmp_path, monkeypatch):
    monkeypatch.setattr(optimizing, "hardware", lambda: Hardware("cpu", 2, (), "L4 8.9, driver 580"))
    assert job_of(arguments(tmp_path)).subject.device == "gpu:0"


def of_file(folder, name="net.onnx", **more):
    (folder / name).write_bytes(b"model")
    return job_of(OptimizeArguments(str(folder / name), folder, folder / "plans", **more))


def test_a_file_is_optimised_where_the_command_says(tmp_path, monkeypatch):
    monkeypatch.setattr(optimizing, "hardware", lambda: Hardware("cpu", 2, (), "L4 8.9, driver 580"))
    jobs = [of_file(tmp_path, device=device) for device in (None, "cpu", "gpu:0", "gpu:1", f"gpu:{UUID}")]
    assert [job.subject.device for job in jobs] == ["cpu", "cpu", "gpu:0", "gpu:1", f"gpu:{UUID}"]
    # Neither work nor plan of one device is the other's.
    assert (jobs[0].work, jobs[0].digest) == (jobs[1].work, jobs[1].digest)
    assert len({job.work for job in jobs}) == len({job.digest for job in jobs}) == 4
    assert of_file(tmp_path, "net.plan").subject.device == "gpu:0"


@pytest.mark.parametrize(
    ("name", "device", "message"),
    [
        ("net.onnx", "gpu:0", r"model 'net' is to run on 'gpu:0', and no GPU is seen here: .*nvidia-ml-py"),
        ("net.plan", None, r"model 'net' is to run on 'gpu:0', and no GPU is seen here"),
        ("net.onnx", "cuda:0", r"model 'net' is to run on 'cuda:0', and there is no such device: expected 'cpu'"),
    ],
)  # fmt: skip
def test_where_a_file_cannot_be_optimised_is_said(tmp_path, monkeypatch, name, device, message):
    monkeypatch.setattr(optimizing, "hardware", lambda: Hardware("cpu", 2, ()))
    with pytest.raises(CannotOptimize, match=message):
        of_file(tmp_path, name, device=device)


def test_where_a_model_of_the_repository_runs_its_configuration_says(tmp_path):
    arguments(tmp_path)
    with pytest.raises(CannotOptimize, match=r"--device is for a model file, and there is no file 'm'; .*instances: "):
        job_of(OptimizeArguments("m", tmp_path, tmp_path / "plans", device="gpu:0"))


@pytest.mark.parametrize(
    ("model", "device", "error", "message"),
    [
        ("net.onnx", "gpu:0", SearchFailed, "the model is to run on 'gpu:0', and no GPU is seen here: a driver"),
        ("net.onnx", f"gpu:{UUID}", ValueError, "by the number that this process sees it by"),
        ("net.onnx", "cuda", ValueError, "device is 'cuda', expected 'cpu' or 'gpu:N'"),
        ("net.plan", "cpu", ValueError, r"'net\.plan' is an engine, which runs on a GPU: expected device='gpu:0'"),
    ],
)  # fmt: skip
def test_the_library_says_where_it_cannot_optimise(monkeypatch, model, device, error, message):
    monkeypatch.setattr(library, "hardware", lambda: Hardware("cpu", 2, ()))
    with pytest.raises(error, match=message):
        headrace.optimize(model, None, device=device)


def test_the_library_searches_on_the_device_that_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "hardware", lambda: Hardware("cpu", 2, (), "L4 8.9, driver 580"))
    (tmp_path / "net.onnx").write_bytes(b"model")
    found = []

    class Stopped:
        def __init__(self, subject, *rest):
            found.append((subject.device, rest[-1]))

        def run(self):
            raise SearchFailed("stopped")

    monkeypatch.setattr(library, "Search", Stopped)
    for device in ("cpu", "gpu:1"):
        with pytest.raises(SearchFailed, match="stopped"):
            headrace.optimize(tmp_path / "net.onnx", {}, folder=tmp_path / "out", device=device)
    assert [device for device, _ in found] == ["cpu", "gpu:1"]
    assert [bool(versions.keys() & {"openvino"}) for _, versions in found] == [True, False]

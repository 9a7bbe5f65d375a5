"""Compiled packages (AOTInductor): what they say of themselves, where they may run, and a real one that is served."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from headrace.core.model import Signature, TensorSpec
from headrace.core.tensor import DataType
from headrace.repository.pbtxt import parse_pbtxt
from headrace_backends import threads
from headrace_backends.base import InputError, LoadError, ModelSource
from headrace_backends.compiled_package import Here, Package, is_package, misfit, opened
from headrace_backends.compiled_source import DeclaredInput, Sizes, compiled_threads, declared_inputs
from headrace_backends.optimize.candidates import candidates
from headrace_backends.optimize.examples import Examples
from headrace_backends.optimize.facts import COMPILED, Facts, ending_of
from headrace_backends.optimize.misfit import misfit as differs
from headrace_backends.optimize.steps.base import StepFailed, StepTask

FP32 = DataType.FP32
AGREED = {"allow_native_code": True}


def check(index, dtype, *lines):
    """What a package's source says of one input."""
    body = "\n".join(lines)
    return f"""
static void check_input_{index}(AtenTensorHandle* input_handles) {{
    ConstantHandle arg = ConstantHandle(input_handles[{index}]);
    int32_t arg_expected_dtype = aoti_torch_dtype_{dtype}();
    {body}
}}
"""


IMAGE = check(
    0, "float16",
    "if (arg_size[0] < 2) {}", "if (arg_size[0] > 64) {}", "if (3 != arg_size[1]) {}",
    "if (3 != arg_stride[0]) {}", "if (1 != arg_stride[1]) {}",
)  # fmt: skip
TOKENS = check(1, "int64", "if (arg_size[0] < 2) {}", "if (1 != arg_stride[1]) {}")
REST = "void run() {\n if (7 != other_size[1]) {}\n#pragma omp parallel num_threads(6)\n}\n"


def test_inputs_are_told_by_their_checks():
    assert declared_inputs(IMAGE + TOKENS + REST) == [
        DeclaredInput("float16", (Sizes(2, 64), Sizes(3, 3))),
        DeclaredInput("int64", (Sizes(2), Sizes())),
    ]
    assert [one.shape for one in declared_inputs(IMAGE + TOKENS)] == [(-1, 3), (-1, -1)]
    assert declared_inputs(check(0, "bool")) == [DeclaredInput("bool", ())]


@pytest.mark.parametrize(
    "source",
    ["", REST, TOKENS, IMAGE + TOKENS.replace("_expected_dtype", "_type"), IMAGE + check(2, "int8")],
    ids=["nothing", "no checks", "the first is missing", "another form", "one is missing"],
)
def test_a_source_that_does_not_tell_of_all_inputs_tells_of_none(source):
    assert declared_inputs(source) is None


def test_threads_that_the_code_starts():
    assert compiled_threads(IMAGE) == 1
    assert compiled_threads(REST + "#pragma omp parallel num_threads(4)") == 6


def test_sizes():
    assert [size for size in range(6) if size in Sizes(2, 4)] == [2, 3, 4]
    assert 10**9 in Sizes(2)
    assert [str(one) for one in (Sizes(2, 4), Sizes(2), Sizes(3, 3))] == ["2 to 4", "2 and more", "3"]


METADATA = {
    "AOTI_DEVICE_KEY": "cpu",
    "AOTI_PLATFORM": "linux",
    "AOTI_MACHINE": "x86_64",
    "AOTI_CPU_ISA": "AVX512 AVX512_VNNI",
    "AOTI_COMPUTE_CAPABILITY": "",
}
LINUX = Here("linux", "x86_64", frozenset({"avx2", "avx512f", "avx512_vnni"}))
ON_GPU = {"AOTI_DEVICE_KEY": "cuda", "AOTI_COMPUTE_CAPABILITY": "86"}


def gpu(capability):
    return Here("linux", "x86_64", LINUX.instructions, capability)


@pytest.mark.parametrize(
    ("changed", "device", "here", "wrong"),
    [
        ({}, "cpu", LINUX, None),
        ({}, "cpu", Here("linux", "x86_64"), None),  # its instructions are not known
        (
            {},
            "cuda",
            gpu((9, 0)),
            "compiled for cpu, and its instances are on cuda: set instances: [{device: cpu}], or",
        ),
        (
            ON_GPU,
            "cpu",
            LINUX,
            'compiled for cuda, and its instances are on cpu: set instances: [{device: "gpu:0"}], or',
        ),
        ({"AOTI_DEVICE_KEY": "xpu"}, "cpu", LINUX, "for xpu, and its instances are on cpu: compile it anew"),
        ({"AOTI_PLATFORM": "win32"}, "cpu", LINUX, "compiled for the system win32, and this one is linux"),
        ({"AOTI_MACHINE": "aarch64"}, "cpu", LINUX, "compiled for the CPU aarch64, and this one is x86_64"),
        (
            {},
            "cpu",
            Here("linux", "x86_64", frozenset({"avx2"})),
            "CPUs with avx512, avx512_vnni, which this one has not",
        ),
        (ON_GPU, "cuda", gpu((8, 6)), None),
        (ON_GPU, "cuda", gpu((8, 9)), None),
        (ON_GPU, "cuda", gpu((8, 0)), "compute capability 8.6, and this one has 8.0"),
        (ON_GPU, "cuda", gpu((9, 0)), "compute capability 8.6, and this one has 9.0"),
    ],
)
def test_where_a_package_may_run(changed, device, here, wrong):
    found = misfit(Package(METADATA | changed, own_kernels=True), device, here)
    assert found is None if wrong is None else wrong in found


def test_kernels_for_several_gpus_are_not_refused():
    assert misfit(Package(METADATA | ON_GPU), "cuda", gpu((9, 0))) is None


@pytest.mark.parametrize("told", ["", "nonsense", "[1]", '{"a": 1}'])
def test_names_that_are_none_are_passed_over(told):
    assert Package({"HEADRACE_INPUTS": told}).names == Package({}).names == ()
    assert Package({"HEADRACE_INPUTS": '["a", "b"]'}).names == ("a", "b")


def archive(path, files, prefix="m/data/aotinductor/model/"):
    with zipfile.ZipFile(path, "w") as made:
        for name, content in files.items():
            made.writestr(prefix + name, content)
    return path


def test_what_is_a_package_is_told_by_what_lies_in_it(tmp_path):
    path = tmp_path / "model.pt2"
    assert not is_package(path)
    path.write_bytes(b"garbage")
    assert not is_package(path)
    assert not is_package(archive(path, {"model.json": "{}"}, "m/models/"))
    assert ending_of(path) == ".pt2"
    assert is_package(archive(path, {"a.so": "x"}))
    assert is_package(archive(path, {"a.so": "x"}, "data/aotinductor/model/"))  # as older versions wrote them
    assert ending_of(path) == COMPILED
    assert ending_of(tmp_path / "model.onnx") == ".onnx"


def test_nothing_is_made_of_a_package():
    assert candidates(Facts(COMPILED, "torch", "dense")) == []
    (only,) = candidates(Facts(COMPILED, "torch", "dense", on_gpu=True))
    assert only.form.name == "torch + cuda_graphs=True"


def test_archives_that_are_no_such_package(tmp_path):
    path = tmp_path / "model.pt2"
    told = {"a.wrapper_metadata.json": json.dumps(METADATA)}
    for files, prefix, wrong in (
        ({"a.so": "x"}, "m/data/aotinductor/other/", r"holds \['other'\], expected one model called 'model'"),
        (told, "m/data/aotinductor/model/", "holds source code alone: compile it, without package_cpp_only"),
        ({"a.so": "x"}, "m/data/aotinductor/model/", "does not say for which device it was compiled"),
        ({"a.so": "x", "a_metadata.json": "{"}, "m/data/aotinductor/model/", "is damaged"),
    ):
        with pytest.raises(LoadError, match=wrong):
            opened(archive(path, files, prefix))
    package = opened(archive(path, {"a.so": "x", "a.wrapper.cpp": IMAGE, "k.cubin": "x", **told}))
    assert package == Package(METADATA, [DeclaredInput("float16", (Sizes(2, 64), Sizes(3, 3)))], 1, own_kernels=True)
    content = bytearray(path.read_bytes())
    content[content.index(b"AOTI_DEVICE_KEY")] ^= 1
    path.write_bytes(content)
    with pytest.raises(LoadError, match=r"'model\.pt2' is damaged: Bad CRC-32"):
        opened(path)


# -- a real one -----------------------------------------------------------------------------------------------

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'headrace[torch]'")
from headrace_backends.optimize.steps import aot_inductor  # noqa: E402 only where torch is
from headrace_backends.torch import TorchBackend  # noqa: E402
from headrace_backends.torch_package import _rows  # noqa: E402

COMPILE = """
import sys
from pathlib import Path

import torch
import torch._inductor.cpu_vec_isa

from headrace.core.model import Signature
from headrace_backends.optimize.examples import Examples
from headrace_backends.optimize.steps import aot_inductor
from headrace_backends.optimize.steps.base import StepTask

folder = Path(sys.argv[1])

torch.set_num_threads(1)
torch.manual_seed(0)
weight = torch.randn(3, 4)
# Otherwise it compiles a program for each kind of CPU, to see what the compiler can do.
torch._inductor.cpu_vec_isa.valid_vec_isa_list = list


class Net(torch.nn.Module):
    def forward(self, rows, *, scale):
        return {"product": rows @ weight, "scaled": scale @ weight}


size = torch.export.Dim("n", max=64)
program = torch.export.export(
    Net(), (torch.ones(2, 3),), {"scale": torch.ones(2, 3)}, dynamic_shapes={"rows": {0: size}, "scale": {0: size}}
)
quick = {"aot_inductor.precompile_headers": False, "compile_threads": 1}
torch._inductor.aoti_compile_and_package(
    program, package_path=str(folder / "model.pt2"), inductor_configs=quick
)
torch.export.save(program, folder / "program.pt2")
(folder / "made").mkdir()
task = StepTask(folder / "program.pt2", folder / "made", Signature((), ()), Examples((), (), ""), note=print)
print(aot_inductor.apply(task))
"""
torch.manual_seed(0)
WEIGHT = torch.randn(3, 4).numpy()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A program, its package, and one that the optimiser makes of it.

    Compiled in a process of its own: the compiler keeps its settings for as long as a process lives.
    """
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ to compile with")
    folder = tmp_path_factory.mktemp("package")
    ended = subprocess.run(
        [sys.executable, "-c", COMPILE, str(folder)],
        env={
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"),
            "AOT_INDUCTOR_ENABLE_LINE_TABLES": "0",
            "AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL": "O0",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    (folder / "told").write_text(ended.stdout)
    return folder


@pytest.fixture(scope="module")
def package(compiled):
    """The package that somebody else has compiled."""
    return compiled / "model.pt2"


def changed(package, path, change):
    """A copy of the package of which each file is what ``change`` makes of its name and content."""
    with zipfile.ZipFile(package) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            content = change(name, old.read(name))
            if content is not None:
                new.writestr(name, content)
    return path


def load(path, agreed=True, **keywords):
    given = (AGREED if agreed else {}) | keywords.pop("parameters", {})
    return TorchBackend.load(ModelSource("m", "1", path, threads=1, parameters=given, **keywords))


def rows_of(count):
    generator = np.random.default_rng(count)
    return generator.standard_normal((count, 3), dtype=np.float32), np.full((count, 3), 2, np.float32)


def test_a_package_is_served_where_its_owner_agrees(package, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(LoadError, match=r"holds machine code \(AOTInductor\).*set parameters\.allow_native_code: true"):
        load(package, agreed=False)
    backend = load(package)
    assert not list(tmp_path.glob("headrace-package-*"))  # what was unpacked is gone, although it runs
    assert backend.signature.inputs == (TensorSpec("input_0", FP32, (-1, 3)), TensorSpec("scale", FP32, (-1, 3)))
    assert backend.signature.outputs == (TensorSpec("product", FP32, (-1, 4)), TensorSpec("scaled", FP32, (-1, 4)))
    assert backend.signature.max_batch_size == 32
    assert any("fewer than 2 rows is filled up" in note for note in backend.notes())
    for count in (1, 2, 32):
        rows, scale = rows_of(count)
        answers = backend.execute({"input_0": rows, "scale": scale}, ())
        np.testing.assert_allclose(answers["product"], rows @ WEIGHT, atol=1e-5)
        np.testing.assert_allclose(answers["scaled"], scale @ WEIGHT, atol=1e-5)
    backend.close()


def test_a_size_that_it_was_not_compiled_for_is_refused(package):
    backend = load(package, max_batch_size=0)
    rows, scale = rows_of(65)
    with pytest.raises(
        InputError, match="input 'input_0' has 65 in dimension 0, and the model was compiled for 2 to 64"
    ):
        backend.execute({"input_0": rows, "scale": scale}, ())
    with pytest.raises(
        InputError, match="input 'input_0' has 1 in dimension 0"
    ):  # rows that are not merged are counted
        backend.execute({"input_0": rows[:1], "scale": scale[:1]}, ())
    with pytest.raises(InputError):  # that both have as many rows, its own check says
        backend.execute({"input_0": rows[:5], "scale": scale[:4]}, ())
    with pytest.raises(LoadError, match=r"max_batch_size is 128, and 'model\.pt2' was compiled for at most 64 rows"):
        load(package, max_batch_size=128)


def test_names_and_shapes_of_the_configuration(package):
    one = TensorSpec("points", FP32, (-1, 3))
    backend = load(
        package, inputs=(one, TensorSpec("scale", FP32, (-1, 3))), outputs=(TensorSpec("scaled", FP32, None),)
    )
    assert [spec.name for spec in backend.signature.inputs] == ["points", "scale"]
    assert backend.signature.outputs == (TensorSpec("scaled", FP32, (-1, 4)),)
    rows, scale = rows_of(2)
    assert backend.execute({"points": rows, "scale": scale}, ()).keys() == {"scaled"}
    for keywords, wrong in (
        ({"inputs": (one,)}, r"the inputs \['points'\] are configured, the package takes \['input_0', 'scale'\]"),
        ({"inputs": (one, TensorSpec("more", FP32, (-1, 3)))}, r"the package takes \['input_0', 'scale'\]"),
        ({"inputs": (TensorSpec("input_0", FP32, (-1, 4)),)}, r"shape \[-1, 4\]; the file has \[-1, 3\]"),
        ({"outputs": (TensorSpec("scaled", DataType.FP16, (-1, 4)),)}, "configured as FP16; the file has FP32"),
        ({"outputs": (TensorSpec("sum", FP32, (-1, 3)),)}, r"the module has \['product', 'scaled'\]"),
        ({"parameters": {"compile": True}}, "'model.pt2' is compiled already"),
        ({"parameters": {"autocast": "bf16"}}, "'model.pt2' is compiled already"),
    ):
        with pytest.raises(LoadError, match=wrong):
            load(package, **keywords)


def test_what_it_does_not_tell_the_configuration_has_to(package, tmp_path):
    path = changed(
        package,
        tmp_path / "model.pt2",
        lambda name, content: (
            content.replace(b"_expected_dtype", b"_dtype_wanted") if name.endswith(".cpp") else content
        ),
    )
    with pytest.raises(LoadError, match=r"does not say what it takes.*\ninputs: \[\{name: input_0, .*\{name: scale, "):
        load(path)
    inputs = (TensorSpec("input_0", FP32, (-1, 3)), TensorSpec("scale", FP32, (-1, 3)))
    backend = load(path, inputs=inputs, max_batch_size=8)
    assert backend.signature.outputs == (TensorSpec("product", FP32, (-1, 4)), TensorSpec("scaled", FP32, (-1, 4)))
    wrong = (TensorSpec("input_0", FP32, (-1, 4)), inputs[1])
    with pytest.raises(
        LoadError, match=r"(?s)does not say what it gives, and it does not run .*\noutputs: \[.*product"
    ):
        load(path, inputs=wrong)  # its own check refuses to read beyond the rows


def test_packages_that_cannot_run_here(package, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = tmp_path / "model.pt2"

    def told(**metadata):
        return lambda name, content: (
            json.dumps(json.loads(content) | metadata) if name.endswith("_metadata.json") else content
        )

    for change, wrong in (
        (told(AOTI_DEVICE_KEY="cuda"), "cannot run here: it was compiled for cuda, and its instances are on cpu"),
        (told(AOTI_MACHINE="riscv64"), "cannot run here: it was compiled for the CPU riscv64"),
        (
            lambda name, content: b"garbage" if name.endswith(".so") else content,
            r"cannot load 'model\.pt2': .*the version of torch that compiled it, and here is 2\.",
        ),
    ):
        with pytest.raises(LoadError, match=wrong):
            load(changed(package, path, change))
    assert not list(tmp_path.glob("headrace-package-*"))
    path.write_bytes(package.read_bytes()[:-100])
    with pytest.raises(LoadError, match="it is not a zip file"):
        load(path)


def test_rows_that_the_code_takes():
    assert _rows(None) == (1, None)
    assert _rows([DeclaredInput("float32", (Sizes(2, 64), Sizes(3, 3))), DeclaredInput("int64", (Sizes(4),))]) == (
        4,
        64,
    )
    assert _rows([DeclaredInput("float32", (Sizes(0, 64),))]) == (1, 64)  # as check_lowerbound=False has it
    assert _rows([DeclaredInput("float32", (Sizes(2, 64),)), DeclaredInput("float32", ())]) == (1, None)


def test_threads_are_those_that_were_compiled_in(package, tmp_path, monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "LIGHT_MODEL_MS", 0)
    path = changed(
        package, tmp_path / "model.pt2", lambda name, content: content + name.endswith(".cpp") * REST.encode()
    )
    backend = load(path)
    assert any(note.startswith("its code starts 6 threads whatever it is given") for note in backend.notes())
    assert backend.cpu_threads == 1
    assert not any("its code starts" in note for note in load(package).notes())
    torch.set_num_threads(before)


def test_a_configuration_of_tritons():
    text = 'platform: "torch_aoti" parameters { key: "allow_native_code" value { string_value: "true" } }'
    config = parse_pbtxt(text, "m")
    assert (config.backend, config.parameters) == ("torch", {"allow_native_code": "true"})


# -- those that the optimiser makes ---------------------------------------------------------------------------


def test_a_program_that_the_optimiser_has_compiled_stands_for_it(compiled):
    note, path = (compiled / "told").read_text().splitlines()
    assert note.endswith("to machine code for this machine; served outside of a plan, it needs "
                         "parameters.allow_native_code")  # fmt: skip
    assert [file.name for file in Path(path).parent.iterdir()] == ["model.pt2"]  # a plan has what lies there
    program, made = load(compiled / "program.pt2", agreed=False), load(Path(path))
    assert differs(program.signature, made.signature) == ""
    assert [spec.name for spec in made.signature.inputs] == ["rows", "scale"]
    assert not any("filled up" in note for note in made.notes())
    for count in (1, 2, 32):
        rows, scale = rows_of(count)
        right, answers = (one.execute({"rows": rows, "scale": scale}, ()) for one in (program, made))
        np.testing.assert_allclose(answers["product"], right["product"], atol=1e-5)
        np.testing.assert_allclose(answers["scaled"], right["scaled"], atol=1e-5)
    with pytest.raises(LoadError, match="holds machine code"):
        load(Path(path), agreed=False)


def step(source, folder, device="cpu"):
    return aot_inductor.apply(StepTask(source, folder, Signature((), ()), Examples((), (), ""), device=device))


def test_without_a_compiler_nothing_is_compiled(compiled, tmp_path, monkeypatch):
    import torch._inductor.config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/nowhere/g++",))
    with pytest.raises(StepFailed, match="it takes a C\\+\\+ compiler, and there is none: install g"):
        step(compiled / "program.pt2", tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_compiled_is_told(compiled, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    for source, device, wrong in (
        (tmp_path / "model.pt", "cpu", r"'model\.pt' is no exported program"),
        (compiled / "model.pt2", "cpu", r"holds compiled code \(AOTInductor\), of which no other form can be made"),
        (compiled / "program.pt2", "gpu:99", r"device 'gpu:99' is not here: torch 2"),
    ):
        with pytest.raises(StepFailed, match=wrong):
            step(source, tmp_path, device)

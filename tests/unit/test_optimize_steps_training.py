"""The steps that train: on real digits and tiny networks, from a served file to an ONNX file with its names."""

import re
import textwrap

import numpy as np
import pytest

from headrace.core.model import Signature, TensorSpec
from headrace.core.tensor import DataType
from headrace_backends.base import ModelSource
from headrace_backends.optimize.examples import Examples
from headrace_backends.optimize.steps.base import StepFailed, StepTask
from headrace_backends.optimize.steps.registry import step

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'headrace[torch]'")
onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install 'headrace[optimize]'")
pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install 'headrace[optimize]'")
datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
from headrace_backends.onnxruntime import OnnxRuntimeBackend  # noqa: E402 after the skips
from headrace_backends.optimize import fitting, folding  # noqa: E402
from headrace_backends.optimize.steps import distill, quantization_aware, sparsify, torch_int8_dynamic  # noqa: E402
from headrace_backends.torch import TorchBackend  # noqa: E402

WIDTH, TRAINED = 32, 1400
SIGNATURE = Signature(
    (TensorSpec("image", DataType.FP32, (-1, 1, 8, 8)),), (TensorSpec("logits", DataType.FP32, (-1, 10)),), 32
)
TRAINING = """
from pathlib import Path
import torch
from sklearn.datasets import load_digits
from torch import nn

images, digits = load_digits(return_X_y=True)
images = torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
digits = torch.tensor(digits)

def network(width):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(width * 16, 64), nn.ReLU(), nn.Linear(64, 10))

def model():
    module = network(32)
    module.load_state_dict(torch.load(Path(__file__).with_name("weights.pt")))
    return module

def student():
    return network(8)

def batches(training):
    rows = torch.randperm(1400) if training else torch.arange(1400, len(images))
    for some in rows.split(50):
        yield (images[some],), digits[some]

def score(module):
    return (module(images[1400:]).argmax(1) == digits[1400:]).float().mean()
"""


NO_NUMBER = "def loss(outputs, labels):\n    return outputs.sum() * float('nan')\n\ndef score("


class Served:
    """A model as its owner has it: the file that is served, and the code that it was trained with."""

    def __init__(self, folder):
        self.folder = folder
        self.training = folder / "training.py"
        self.training.write_text(TRAINING)
        self.code = {"__file__": str(self.training)}
        exec(TRAINING, self.code)
        self.images, self.digits = (self.code[name].numpy() for name in ("images", "digits"))
        torch.manual_seed(1)
        module = self.code["network"](WIDTH)
        optimizer = torch.optim.Adam(module.parameters(), 1e-3)
        for _ in range(3):
            for (inputs,), labels in self.code["batches"](training=True):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(module(inputs), labels).backward()
                optimizer.step()
        module.eval()
        torch.save(module.state_dict(), folder / "weights.pt")
        self.source = folder / "model.pt2"
        program = torch.export.export(
            Named(module), (self.code["images"][:4],), dynamic_shapes=({0: torch.export.Dim("n")},)
        )
        torch.export.save(program, self.source)
        self.accuracy = float(self.code["score"](module))

    def task(self, folder, notes=None, options=None, **changes):
        inputs = tuple({"image": self.images[row : row + 1]} for row in range(64))
        fields = {
            "source": self.source,
            "folder": folder,
            "signature": SIGNATURE,
            "examples": Examples(inputs, tuple({} for _ in inputs), "digits"),
            "options": options or {},
            "training": str(self.training),
            "note": (notes if notes is not None else []).append,
        }
        return StepTask(**fields | changes)


class Named(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, image):
        return {"logits": self.inner(image)}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Served(tmp_path_factory.mktemp("served"))
    torch.set_num_threads(before)


def accuracy(path, served):
    backend = OnnxRuntimeBackend.load(ModelSource("m", "1", path))
    assert backend.signature == SIGNATURE
    answers = backend.execute({"image": served.images[TRAINED:]}, [])["logits"]
    return float((answers.argmax(1) == served.digits[TRAINED:]).mean())


def operators(path):
    return [node.op_type for node in onnx.load(path).graph.node]


def weights(path):
    return {one.name: onnx.numpy_helper.to_array(one) for one in onnx.load(path).graph.initializer}


def last_score(notes):
    return float(re.findall(r"score ([\d.]+)", " ".join(notes))[-1])


def test_pruning_removes_channels_and_keeps_the_accuracy(served, tmp_path):
    pytest.importorskip("torch_pruning", reason="torch-pruning is not installed: pip install 'headrace[optimize]'")
    notes = []
    path = step("prune")(served.task(tmp_path, notes, {"share": 0.5, "epochs": 4}))
    assert path == tmp_path / "model.onnx"
    assert served.accuracy > 0.9
    assert accuracy(path, served) > served.accuracy - 0.04
    shapes = sorted(array.shape for array in weights(path).values() if array.ndim > 1)
    assert shapes == [(10, 32), (16, 1, 3, 3), (16, 16, 3, 3), (32, 256)]  # the ten outputs are all there
    assert "BatchNormalization" not in operators(path)
    assert notes[0] == f"score {served.accuracy:.4g} before anything was changed"
    assert [note.split(":")[0] for note in notes[1:6]] == [
        "before training",
        *(f"epoch {n} of 4" for n in (1, 2, 3, 4)),
    ]
    assert "parameters 43.2 k -> 11.1 k (3.9 times fewer), multiply-adds a row" in notes[-2]
    assert notes[-1] == "2 batch normalisations are folded into the layers before them"
    assert last_score(notes) == pytest.approx(accuracy(path, served), abs=0.01)


def test_pruning_is_the_same_each_time(served, tmp_path):
    pytest.importorskip("torch_pruning", reason="torch-pruning is not installed: pip install 'headrace[optimize]'")
    made = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        task = served.task(tmp_path / name, options={"share": 0.7, "epochs": 1, "rounds": 2, "multiple": 4})
        made.append(weights(step("prune")(task)))
    assert made[0].keys() == made[1].keys()
    for name, array in made[0].items():
        np.testing.assert_array_equal(array, made[1][name])


def test_nothing_to_prune(served, tmp_path):
    pytest.importorskip("torch_pruning", reason="torch-pruning is not installed: pip install 'headrace[optimize]'")
    with pytest.raises(StepFailed, match=r"no layer has channels to spare: .* fewer than 999 channels"):
        step("prune")(served.task(tmp_path, options={"smallest": 999, "epochs": 0}))


def test_weights_that_became_zero_stay_zero(served, tmp_path):
    notes = []
    path = step("sparsify")(served.task(tmp_path, notes, {"share": 0.8, "epochs": 3}))
    assert accuracy(path, served) > served.accuracy - 0.04
    large = [array for array in weights(path).values() if array.dtype == np.float32 and array.size >= 9216]
    assert [round(float((array == 0).mean()), 2) for array in large] == [0.8, 0.8]
    assert notes[-3] == "78% of all weights are zero, in 2 of 4 layers"
    assert "gain nothing" in notes[-2]


def test_two_of_four():
    weight = torch.tensor([[1.0, -3.0, 2.0, 0.5], [0.0, 0.0, 5.0, 1.0]])
    assert sparsify.two_in_four(weight).tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]
    mask = sparsify.two_in_four(torch.randn(6, 8, 3, 3))
    assert mask.shape == (6, 8, 3, 3)
    assert (mask.reshape(6, 2, 4, 3, 3).sum(2) == 2).all()
    assert sparsify.two_in_four(torch.randn(6, 3)) is None
    assert sparsify.largest(torch.tensor([[1.0, -3.0], [2.0, 0.5]]), 0.5).tolist() == [[0, 1], [1, 0]]


def test_a_student_learns_from_its_teacher(served, tmp_path):
    notes = []
    path = step("distill")(served.task(tmp_path, notes, {"epochs": 6, "learning_rate": 3e-3}))
    assert accuracy(path, served) > 0.8
    assert last_score(notes) == pytest.approx(accuracy(path, served), abs=0.01)
    assert notes[0].endswith("of the model, which is the teacher")
    assert "parameters 43.2 k -> 9.6 k (4.5 times fewer)" in notes[-2]


def test_what_is_learned_of_a_teacher():
    torch.manual_seed(6)
    student, teacher = torch.randn(5, 3), torch.randn(5, 3)
    assert distill.distance(teacher, teacher, "probabilities", 4.0) == pytest.approx(0, abs=1e-6)
    assert distill.distance(teacher + 3, teacher, "probabilities", 4.0) == pytest.approx(0, abs=1e-5)  # as probable
    assert distill.distance(student, teacher, "probabilities", 4.0) > 0.01
    assert distill.distance(student, teacher, "values", 4.0) == ((student - teacher) ** 2).mean()


def test_training_with_rounding(served, tmp_path):
    notes = []
    path = step("quantization_aware")(served.task(tmp_path, notes, {"epochs": 1}))
    assert accuracy(path, served) > served.accuracy - 0.02
    assert {"QuantizeLinear", "DequantizeLinear"} <= set(operators(path))
    in_int8 = [array for array in weights(path).values() if array.dtype == np.int8 and array.ndim > 1]
    assert sorted(array.ndim for array in in_int8) == [2, 2, 4, 4]
    assert list(tmp_path.iterdir()) == [path]
    assert notes[-1] == "4 layers were trained with int8 weights and activations"


def test_rounding_in_training():
    weight = torch.nn.Parameter(torch.tensor([[1.0, 0.5], [100.0, 0.0]]))
    rounded = quantization_aware.RoundedWeight()(weight)
    assert rounded.flatten().tolist() == pytest.approx([1.0, 64 / 127, 100.0, 0.0])
    rounded.sum().backward()
    assert weight.grad.tolist() == [[1, 1], [1, 1]]  # as if nothing had been rounded
    inputs = quantization_aware.RoundedInput()
    assert inputs(torch.tensor([-1.0, 0.01, 4.0])).tolist() == pytest.approx([-1, 0, 4], abs=0.02)
    inputs.eval()
    assert inputs(torch.tensor([-9.0, 9.0])).tolist() == pytest.approx([-1, 4], abs=0.02)


def test_another_model_than_the_served_one_is_refused(served, tmp_path):
    other = tmp_path / "training.py"
    other.write_text(TRAINING.replace("    module.load_state_dict", "    0 and module.load_state_dict"))
    with pytest.raises(StepFailed, match=r"^training\.py's model\(\) is not the model that is served: .* differ, by"):
        step("sparsify")(served.task(tmp_path, training=str(other)))


@pytest.mark.parametrize(
    ("kind", "options", "change", "message"),
    [
        ("prune", {"share": 1.5}, ("", ""), r"^prune: Expected `float` < 1\.0 - at `\$\.share`"),
        ("sparsify", {"pattern": "1:4"}, ("", ""), "^sparsify: Invalid enum value '1:4'"),
        ("distill", {"temprature": 1}, ("", ""), "^distill: Object contains unknown field `temprature`"),
        ("distill", {"soft": 0, "hard": 0}, ("", ""), "both 0, so there is nothing to learn"),
        ("distill", {}, ("def student", "def pupil"), r"has no student\(\), expected"),
        ("sparsify", {}, ("(images[some],)", "(images[some, 0],)"), r"does not run on a batch .* \[\[50, 8, 8\]\]"),
        ("distill", {}, ("network(8)", "nn.Flatten()"), r"student\(\) gives outputs of \{'logits': \(4, 64\)\}"),
        ("sparsify", {"learning_rate": 10.0}, ("def score(", NO_NUMBER), r"loss is (nan|inf) in epoch 1"),
        ("sparsify", {"smallest": 10**9}, ("", ""), "none of 4 layers has 1000000000 weights or more"),
        ("quantization_aware", {}, ("return module", "return nn.Sequential(nn.Flatten())"), "not run|shapes|differ"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_told(served, tmp_path, kind, options, change, message):
    code = tmp_path / "training.py"
    code.write_text(TRAINING.replace(*change) if change[0] else TRAINING)
    (tmp_path / "weights.pt").write_bytes((served.folder / "weights.pt").read_bytes())
    with pytest.raises(StepFailed, match=message):
        step(kind)(served.task(tmp_path, options=options, training=str(code)))


def test_rows_of_a_fixed_number_stay_fixed(tmp_path):
    code = """
    import torch
    def model():
        torch.manual_seed(3)
        return torch.nn.Sequential(torch.nn.Flatten(0), torch.nn.Linear(1200, 40), torch.nn.Linear(40, 2))
    def batches(training):
        for _ in range(2):
            yield (torch.ones(3, 400),), torch.tensor(1)
    """
    (tmp_path / "training.py").write_text(textwrap.dedent(code))
    names = {}
    exec(textwrap.dedent(code), names)
    torch.export.save(torch.export.export(names["model"](), (torch.ones(3, 400),)), tmp_path / "model.pt2")
    source = ModelSource("m", "1", tmp_path / "model.pt2")
    signature = TorchBackend.load(source).signature
    assert signature.max_batch_size == 0
    (tmp_path / "out").mkdir()
    path = step("sparsify")(
        StepTask(
            tmp_path / "model.pt2",
            tmp_path / "out",
            signature,
            Examples((), (), ""),
            training=str(tmp_path / "training.py"),
        )
    )
    assert OnnxRuntimeBackend.load(ModelSource("m", "1", path)).signature == signature


def test_normalisations_are_folded_where_that_is_the_same():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = torch.nn.Conv2d(2, 4, 1), torch.nn.BatchNorm2d(4)
            self.used_twice, self.other_norm = torch.nn.Conv2d(4, 4, 1), torch.nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.used_twice(self.norm(self.conv(x)))
            return self.other_norm(y) + y

    torch.manual_seed(7)
    module = Net()
    module(torch.randn(8, 2, 5, 5) * 3 + 1)  # sets the running statistics
    module.eval()
    x = torch.randn(3, 2, 5, 5)
    before = module(x)
    assert folding.fold(module) == 1
    assert isinstance(module.norm, torch.nn.Identity)
    torch.testing.assert_close(module(x), before)

    class Branching(torch.nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    assert folding.fold(Branching()) is None


def test_a_normalisation_over_places_is_not_folded_into_the_linear_layer_before_it():
    module = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(5))
    module(torch.randn(8, 5, 4))
    assert folding.fold(module.eval()) == 0


def test_the_learning_rate_falls():
    schedule = fitting.Schedule(5, 0.1)
    rates = [fitting.rate(schedule, epoch) for epoch in range(1, 6)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[-1] == pytest.approx(0.005)
    assert rates == sorted(rates, reverse=True)
    assert fitting.rate(fitting.Schedule(1, 0.1), 1) == 0.1


class Transformerlike(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.back, self.last = (
            torch.nn.Linear(64, 128),
            torch.nn.Linear(128, 64, bias=False),
            torch.nn.Linear(64, 3),
        )

    def forward(self, tokens, *, scale):
        hidden = self.back(torch.nn.functional.gelu(self.wide(tokens * scale)))
        return {"hidden": hidden, "classes": self.last(hidden).sum(1)}


def test_linear_layers_of_an_exported_program_in_int8(tmp_path):
    torch.manual_seed(5)
    n, length = torch.export.Dim("n", max=64), torch.export.Dim("length")
    program = torch.export.export(
        Transformerlike().eval(),
        (torch.randn(4, 7, 64),),
        {"scale": torch.ones(4, 1, 1)},
        dynamic_shapes={"tokens": {0: n, 1: length}, "scale": {0: n}},
    )
    source = tmp_path / "source.pt2"
    torch.export.save(program, source)
    notes = []
    (tmp_path / "out").mkdir()
    plain = TorchBackend.load(ModelSource("m", "1", source))
    path = torch_int8_dynamic.apply(
        StepTask(source, tmp_path / "out", plain.signature, Examples((), (), ""), note=notes.append)
    )
    assert notes == ["2 of 3 linear layers multiply in int8"]
    assert path.stat().st_size < source.stat().st_size
    small = TorchBackend.load(ModelSource("m", "1", path))
    assert small.signature == plain.signature
    for rows, tokens in ((1, 1), (3, 9), (32, 2)):
        given = {"tokens": np.random.default_rng(rows).standard_normal((rows, tokens, 64)).astype(np.float32)}
        given["scale"] = np.ones((rows, 1, 1), np.float32)
        right, answer = plain.execute(given, []), small.execute(given, [])
        for name in ("hidden", "classes"):
            assert 0 < np.abs(right[name] - answer[name]).max() < 0.04 * np.abs(right[name]).max()
    with pytest.raises(StepFailed, match="none of 3 linear layers is of fp32 and has 100000 weights"):
        torch_int8_dynamic.apply(
            StepTask(source, tmp_path, plain.signature, Examples((), (), ""), options={"smallest": 100000})
        )
    with pytest.raises(StepFailed, match=r"'model\.onnx' is no exported program"):
        torch_int8_dynamic.apply(StepTask(tmp_path / "model.onnx", tmp_path, plain.signature, Examples((), (), "")))

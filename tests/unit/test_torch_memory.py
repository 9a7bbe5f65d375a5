"""What PyTorch modules keep between requests: what other clients would notice is refused, and nothing else."""

import warnings

import numpy as np
import pytest

from headrace.core.model import TensorSpec
from headrace.core.tensor import DataType
from headrace_backends.base import LoadError, ModelSource

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'headrace[torch]'")
from headrace_backends.torch import TorchBackend  # noqa: E402 only where torch is
from headrace_backends.torch_memory import answers_by_history  # noqa: E402 only where torch is

ROWS = {0: torch.export.Dim("n", min=1, max=64)}
FP32 = DataType.FP32


class Holding(torch.nn.Module):
    """Modules that write to ``table``, which is of the size of a row, ``number`` and ``filled``."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.zeros(1, 3))
        self.register_buffer("number", torch.zeros((), dtype=torch.int64))
        self.register_buffer("filled", torch.zeros((), dtype=torch.bool))


class Counter(Holding):
    def forward(self, x: torch.Tensor):
        self.number.add_(1)
        return x * 2


class Scratch(Holding):
    def forward(self, x: torch.Tensor):
        self.table.zero_()
        self.table.add_(x[:1])
        return x + self.table


class Copied(Holding):
    def forward(self, x: torch.Tensor):
        self.table.copy_(x[:1].double())
        return x + self.table


class Table(Holding):
    def forward(self, x: torch.Tensor):
        new = torch.arange(3, dtype=torch.float32, device=x.device).sin().unsqueeze(0)
        self.table.copy_(torch.where(self.filled, self.table, new))
        self.filled.fill_(True)
        return x + self.table


class Last(Holding):
    def forward(self, x: torch.Tensor):
        answer = x + self.table
        self.table.copy_(x[:1])
        return answer


class Counted(Holding):
    def forward(self, x: torch.Tensor):
        self.number.add_(1)
        return x * self.number


class Chained(Holding):
    def forward(self, x: torch.Tensor):
        answer = x + self.number
        self.number.copy_(self.table.sum())
        self.table.copy_(x[:1])
        return answer


class First(Holding):
    def forward(self, x: torch.Tensor):
        self.table.copy_(torch.where(self.filled, self.table, x[:1]))
        self.filled.fill_(True)
        return x + self.table


class Greatest(Holding):
    def forward(self, x: torch.Tensor):
        self.table.copy_(torch.maximum(self.table, x.amax(0, keepdim=True)))
        return x / self.table


class Weighed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor):
        with torch.no_grad():
            self.weight.add_(x.sum())
        return x * self.weight


class WeightTurned(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([-1.0, 2.0, 3.0]))

    def forward(self, x: torch.Tensor):
        with torch.no_grad():
            self.weight.abs_()
        return x * self.weight


def exported(folder, module):
    program = torch.export.export(module, (torch.ones(2, 3),), dynamic_shapes=(ROWS,))
    torch.export.save(program, folder / "model.pt2")
    return ModelSource("m", "1", folder / "model.pt2")


def scripted(folder, module, size=3):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(module), folder / "model.pt")
    inputs, outputs = (TensorSpec("x", FP32, (-1, size)),), (TensorSpec("y", FP32, (-1, size)),)
    return ModelSource("m", "1", folder / "model.pt", inputs=inputs, outputs=outputs, max_batch_size=4)


def answer(backend, x):
    (array,) = backend.execute({backend.signature.inputs[0].name: np.array(x, np.float32)}, []).values()
    return np.array(array)


@pytest.mark.parametrize("kind", [Counter, Scratch, Copied, Table])
def test_an_exported_program_may_write_to_what_no_answer_depends_on(tmp_path, kind):
    backend = TorchBackend.load(exported(tmp_path, kind()))
    first = answer(backend, [[1, 2, 3]])
    answer(backend, [[5, 5, 5], [7, 7, 7]])
    np.testing.assert_array_equal(answer(backend, [[1, 2, 3]]), first)
    np.testing.assert_array_equal(first, kind()(torch.tensor([[1.0, 2, 3]])).numpy())


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (Last, "'table'"),
        (Counted, "'number'"),
        (Chained, "'table'"),
        (First, "'table'"),
        (Greatest, "'table'"),
        (Weighed, "'weight'"),
    ],
)
def test_an_exported_program_that_answers_by_what_was_asked_before_is_refused(tmp_path, kind, names):
    with pytest.raises(
        LoadError, match=rf"'model\.pt2' keeps {names} from one .* expected a module that holds the same"
    ):
        TorchBackend.load(exported(tmp_path, kind()))


class Growing(torch.nn.Module):
    """A table that is made anew where a request is longer than it."""

    def __init__(self):
        super().__init__()
        self.table = torch.zeros(0)

    def forward(self, x: torch.Tensor):
        if self.table.size(0) < x.size(1):
            table = torch.zeros(x.size(1))
            table[::2] = 1
            self.table = table
        return x + self.table[: x.size(1)]


class Stretched(torch.nn.Module):
    """The same, with numbers that depend on the longest request."""

    def __init__(self):
        super().__init__()
        self.table = torch.zeros(0)

    def forward(self, x: torch.Tensor):
        if self.table.size(0) < x.size(1):
            self.table = torch.linspace(0.0, 1.0, x.size(1))
        return x + self.table[: x.size(1)]


class Once(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.filled = False
        self.register_buffer("table", torch.zeros(3))

    def forward(self, x: torch.Tensor):
        if not self.filled:
            self.table.copy_(torch.arange(3))
            self.filled = True
        return x + self.table


class Calls(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor):
        self.calls += 1
        return x * 2


class Inside(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor):
        return self.inner(x)


class Rebound(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("last", torch.zeros(1))

    def forward(self, x: torch.Tensor):
        answer = x + self.last
        self.last = x.sum().unsqueeze(0)
        return answer


class Listed(torch.nn.Module):
    past: list[torch.Tensor]

    def __init__(self):
        super().__init__()
        self.past = []

    def forward(self, x: torch.Tensor):
        answer = x + len(self.past)
        self.past.append(x)
        return answer


class Named(torch.nn.Module):
    past: dict[str, torch.Tensor]

    def __init__(self):
        super().__init__()
        self.past = {}

    def forward(self, x: torch.Tensor):
        answer = x + self.past["x"].sum() if "x" in self.past else x
        self.past["x"] = x
        return answer


class CalledBefore(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor):
        self.calls += 1
        return x * self.calls


@pytest.mark.parametrize(
    "module",
    [Growing(), Once(), Calls(), WeightTurned(), Inside(Growing()), Inside(Calls()), Counter(), Table()],
)
def test_torchscript_may_write_to_what_no_answer_depends_on(tmp_path, module):
    free = isinstance(module, Growing) or isinstance(getattr(module, "inner", None), Growing)
    backend = TorchBackend.load(scripted(tmp_path, module, -1 if free else 3))
    first = answer(backend, [[1, 2, 3]])
    answer(backend, [[5] * 9] if free else [[5, 5, 5], [7, 7, 7]])
    np.testing.assert_array_equal(answer(backend, [[1, 2, 3]]), first)


@pytest.mark.parametrize(
    ("module", "size", "name"),
    [
        (Stretched(), -1, "table"),
        (Inside(Stretched()), -1, r"inner\.table"),
        (Rebound(), 3, "last"),
        (Inside(Rebound()), 3, r"inner\.last"),
        (Weighed(), 3, "weight"),
        (Listed(), 3, "past"),
        (Named(), 3, "past"),
        (CalledBefore(), 3, "calls"),
        (Last(), 3, "table"),
        (First(), 3, "table"),
        (Greatest(), 3, "table"),
    ],
)
def test_torchscript_that_answers_by_what_was_asked_before_is_refused(tmp_path, module, size, name):
    with pytest.raises(LoadError, match=rf"'model\.pt' keeps '{name}' from one request to the next"):
        TorchBackend.load(scripted(tmp_path, module, size))


def test_torchscript_of_a_batch_norm_in_training_mode_is_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(torch.nn.BatchNorm1d(3).train(), torch.randn(4, 3), check_trace=False)
    with pytest.raises(LoadError, match=r"keeps 'running_mean', 'running_var' from one"):
        TorchBackend.load(scripted(tmp_path, traced))


class Compiled:
    """What cannot be looked into: ``answer`` of what is asked, of what was asked before, and of a random number."""

    def __init__(self, answer):
        self._answer = answer
        self._random = np.random.default_rng(1)
        self.renewed = 0
        self.renew()

    def renew(self):
        self._before = [np.float32(7)]
        self.renewed += 1

    def run(self, inputs):
        x = inputs["x"]
        if x.max() > 100:
            raise ValueError("too much")
        y = self._answer(x, self._before, np.float32(self._random.random()))
        self._before.append(x.sum())
        return {"y": y}


@pytest.mark.parametrize(
    ("answer", "by_history"),
    [
        (lambda x, before, random: x * 2, False),
        (lambda x, before, random: x * (1 + random), False),
        (lambda x, before, random: x + before[-1], True),
        (lambda x, before, random: x + len(before), True),
        (lambda x, before, random: x + np.max(before), True),
        (lambda x, before, random: x + before[-1] + random, False),  # it may as well be chance
    ],
)
def test_compiled_code_is_known_by_its_answers(answer, by_history):
    compiled = Compiled(answer)
    requests = [{"x": np.array([size], np.float32)} for size in (1000, -9, 4)]
    assert answers_by_history(compiled.run, requests, compiled.renew) is by_history


def test_compiled_code_is_read_again_only_for_a_reason():
    compiled = Compiled(lambda x, before, random: x)
    assert not answers_by_history(compiled.run, [{"x": np.array([4], np.float32)}], compiled.renew)
    assert compiled.renewed == 1
    assert not answers_by_history(compiled.run, [{"x": np.array([1000], np.float32)}], compiled.renew)

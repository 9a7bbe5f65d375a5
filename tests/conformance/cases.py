"""The protocol's cases, one list for every front end: what is sent, and what has to come back."""

import struct
from dataclasses import dataclass
from typing import Any

from fronts import Call
from wire_values import DATATYPES, Given

INF, NAN = float("inf"), float("nan")
# The neutral kind of an error: HTTP's status and gRPC's code for it.
STATUS = {
    "INVALID": (400, "INVALID_ARGUMENT"),
    "NOT_FOUND": (404, "NOT_FOUND"),
    "NOT_READY": (503, "UNAVAILABLE"),
    "OVERLOADED": (503, "UNAVAILABLE"),
    "DEADLINE": (503, "DEADLINE_EXCEEDED"),
    "UNSUPPORTED": (501, "UNIMPLEMENTED"),
    "INTERNAL": (500, "INTERNAL"),
}


@dataclass(frozen=True)
class Echo:
    """A request that succeeds: these outputs, in this order."""

    name: str
    call: Call
    outputs: tuple[Given, ...]
    version: str = "1"


@dataclass(frozen=True)
class Refusal:
    """A request that fails: this kind, and a message that has all of ``says``."""

    name: str
    call: Call
    kind: str
    says: tuple[str, ...]


def _rounded(*values: float) -> tuple[float, ...]:
    return struct.unpack(f"<{len(values)}f", struct.pack(f"<{len(values)}f", *values))


VALUES: dict[str, tuple[Any, ...]] = {
    "BOOL": (True, False, True),
    "UINT8": (0, 1, 2**8 - 1),
    "UINT16": (0, 1, 2**16 - 1),
    "UINT32": (0, 1, 2**32 - 1),
    "UINT64": (0, 2**63, 2**64 - 1),
    "INT8": (-(2**7), -1, 2**7 - 1),
    "INT16": (-(2**15), -1, 2**15 - 1),
    "INT32": (-(2**31), -1, 2**31 - 1),
    "INT64": (-(2**63), 2**53 + 1, 2**63 - 1),
    "FP16": (0.0, -65504.0, 2.0**-24),
    "BF16": (1.0, -0.0, 2.0**127),
    "FP32": _rounded(3.4028234e38, -0.1, 1e-45),
    "FP64": (1.7976931348623157e308, -0.1, 5e-324),
    "BYTES": (b"", 'na\u00efve \U0001f600 "\\\0\n'.encode(), b"x" * 70_000),
}
FLOATS = ("FP16", "BF16", "FP32", "FP64")
SHAPES = ((), (0,), (0, 3), (2, 0, 4), (1, 1, 1, 1, 1), (3, 1), (2, 3))


def _any(name: str, datatype: str, shape: tuple[int, ...], values: tuple[Any, ...]) -> Echo:
    given = Given(f"x_{datatype}", datatype, shape, values)
    call = Call("any", (given,), outputs=(f"y_{datatype}",))
    return Echo(f"any-{datatype}-{name}", call, (given.renamed(f"y_{datatype}"),))


def _onnx(datatype: str, rows: int) -> Echo:
    given = Given("x", datatype, (rows, 3), VALUES[datatype] * rows)
    return Echo(f"onnx-{datatype}-{rows}-rows", Call(f"onnx_{datatype.lower()}", (given,)), (given.renamed("y"),))


def _filled(datatype: str, shape: tuple[int, ...]) -> tuple[Any, ...]:
    count = 1
    for size in shape:
        count *= size
    return tuple(VALUES[datatype][index % 3] for index in range(count))


X = Given("x", "FP32", (1, 3), (1.0, 2.0, 3.0))
X_FIXED = Given("x", "FP32", (2, 3), (1.0, 2.0, 3.0, 4.0, 5.0, 6.0))
NUMBERS = Given("numbers", "INT32", (2, 2), (1, 2, 30, 40))
TEXTS = Given("texts", "BYTES", (2, 1), (b"a", b""))
OFFSET = Given("offset", "INT32", (2, 1), (1000, 2000))
SUMS = Given("sums", "INT32", (2, 1), (3, 70))
TEXTS_OUT = TEXTS.renamed("texts_out")
NUMBERS_OUT = NUMBERS.renamed("numbers_out")
ROWS_OUT = (SUMS, TEXTS_OUT, NUMBERS_OUT)
MANY = 11  # rows, for a model whose batches have 4
MANY_IN = (
    Given("numbers", "INT32", (MANY, 2), tuple(range(2 * MANY))),
    Given("texts", "BYTES", (MANY, 1), tuple(b"t" * row for row in range(MANY))),
)
MANY_OUT = (
    Given("sums", "INT32", (MANY, 1), tuple(4 * row + 1 for row in range(MANY))),
    MANY_IN[1].renamed("texts_out"),
    MANY_IN[0].renamed("numbers_out"),
)
FAKE_X = Given("x", "FP32", (1, 1), (1.0,))
VERSION_X = Given("x", "FP32", (1,), (1.0,))

ECHOES: list[Echo] = [
    *(_any("values", datatype, (3,), VALUES[datatype]) for datatype in DATATYPES),
    *(_any(f"shape-{shape}", datatype, shape, _filled(datatype, shape)) for datatype in DATATYPES for shape in SHAPES),
    *(_any("not-finite", datatype, (3,), (NAN, INF, -INF)) for datatype in FLOATS),
    *(_onnx(datatype, rows) for datatype in DATATYPES for rows in (1, 3)),
    _any("not-utf8", "BYTES", (2,), (b"\xff\xfe\0", b"\xc3")),
    _any("many", "FP32", (20_000,), tuple(float(index) for index in range(20_000))),
    _any("32-dimensions", "UINT8", (1,) * 31 + (2,), (7, 8)),
    Echo("fixed-shape", Call("fixed", (X_FIXED,)), (X_FIXED.renamed("y"),)),
    Echo("more-rows-than-a-batch", Call("rows", MANY_IN), MANY_OUT),
    Echo("id", Call("onnx_fp32", (X,), id='caf\u00e9 \U0001f600/"42\\'), (X.renamed("y"),)),
    Echo("long-id", Call("onnx_fp32", (X,), id="i" * 10_000), (X.renamed("y"),)),
    Echo("all-outputs", Call("rows", (NUMBERS, TEXTS)), ROWS_OUT),
    Echo("inputs-in-another-order", Call("rows", (TEXTS, NUMBERS)), ROWS_OUT),
    Echo(
        "optional-input",
        Call("rows", (OFFSET, NUMBERS, TEXTS)),
        (Given("sums", "INT32", (2, 1), (1003, 2070)), TEXTS_OUT, NUMBERS_OUT),
    ),
    Echo("one-output", Call("rows", (NUMBERS, TEXTS), outputs=("texts_out",)), (TEXTS_OUT,)),
    Echo(
        "outputs-in-the-order-asked",
        Call("rows", (NUMBERS, TEXTS), outputs=("numbers_out", "sums", "texts_out")),
        (NUMBERS_OUT, SUMS, TEXTS_OUT),
    ),
    Echo(
        "parameters-of-every-kind",
        Call("onnx_fp32", (X,), parameters={"text": "t", "whole": 2**62, "part": 0.5, "flag": True, "timeout": 10**7}),
        (X.renamed("y"),),
    ),
    *(
        Echo(
            f"version-{asked or 'none'}",
            Call("versions", (VERSION_X,), version=asked),
            (Given("y", "INT32", (1,), (int(served),)),),
            served,
        )
        for asked, served in (("", "7"), ("1", "1"), ("2", "2"), ("7", "7"))
    ),
]

REFUSALS: list[Refusal] = [
    Refusal("unknown-model", Call("nobody", (X,)), "NOT_FOUND", ("Request for unknown model", "nobody")),
    Refusal(
        "unknown-version",
        Call("onnx_fp32", (X,), version="9"),
        "NOT_FOUND",
        ("version 9 is not found", "these are served: 1"),
    ),
    Refusal("version-text", Call("onnx_fp32", (X,), version="latest"), "INVALID", ("latest",)),
    Refusal("version-zero", Call("onnx_fp32", (X,), version="0"), "INVALID", ("'0'",)),
    Refusal("version-leading-zero", Call("onnx_fp32", (X,), version="09"), "INVALID", ("09",)),
    Refusal("version-huge", Call("onnx_fp32", (X,), version="9" * 30), "INVALID", ("9" * 30,)),
    Refusal("broken", Call("broken", (X,)), "NOT_FOUND", ("broken", "has no available versions")),
    Refusal("broken-version", Call("broken", (X,), version="1"), "NOT_READY", ("broken", "not at ready state")),
    Refusal("no-inputs", Call("onnx_fp32"), "INVALID", ("onnx_fp32", "'x'")),
    Refusal("missing-input", Call("rows", (NUMBERS,)), "INVALID", ("rows", "'texts'")),
    Refusal("unknown-input", Call("onnx_fp32", (X.renamed("z"),)), "INVALID", ("onnx_fp32", "'z'", "x FP32[-1, 3]")),
    Refusal("extra-input", Call("onnx_fp32", (X, X.renamed("z"))), "INVALID", ("'z'",)),
    Refusal("input-twice", Call("onnx_fp32", (X, X)), "INVALID", ("'x'",)),
    Refusal("unknown-output", Call("onnx_fp32", (X,), outputs=("z",)), "INVALID", ("'z'", "'y'")),
    Refusal(
        "wrong-datatype",
        Call("onnx_fp32", (Given("x", "INT32", (1, 3), (1, 2, 3)),)),
        "INVALID",
        ("onnx_fp32", "'x'", "INT32", "FP32"),
    ),
    Refusal("wrong-rank", Call("onnx_fp32", (Given("x", "FP32", (3,), (1, 2, 3)),)), "INVALID", ("[3]", "[-1, 3]")),
    Refusal("scalar-for-rows", Call("onnx_fp32", (Given("x", "FP32", (), (1.0,)),)), "INVALID", ("[]", "[-1, 3]")),
    Refusal("wrong-size", Call("onnx_fp32", (Given("x", "FP32", (1, 2), (1, 2)),)), "INVALID", ("[1, 2]", "[-1, 3]")),
    Refusal("no-rows", Call("onnx_fp32", (Given("x", "FP32", (0, 3), ()),)), "INVALID", ("'x'", "0 rows")),
    Refusal("rows-differ", Call("rows", (NUMBERS, Given("texts", "BYTES", (1, 1), (b"",)))), "INVALID", ("rows",)),
    Refusal("too-few", Call("onnx_fp32", (Given("x", "FP32", (1, 3), (1, 2)),)), "INVALID", ("'x'", "[1, 3]")),
    Refusal("too-many", Call("onnx_fp32", (Given("x", "FP32", (1, 3), (1, 2, 3, 4)),)), "INVALID", ("'x'", "[1, 3]")),
    Refusal("no-elements", Call("onnx_fp32", (Given("x", "FP32", (1, 3), ()),)), "INVALID", ("'x'", "[1, 3]")),
    Refusal("negative-size", Call("any", (Given("x_INT8", "INT8", (-1, -1), (1,)),)), "INVALID", ("negative",)),
    Refusal("huge-shape", Call("any", (Given("x_INT8", "INT8", (2**40, 2**40), ()),)), "INVALID", ("x_INT8",)),
    Refusal("shape-overflows", Call("any", (Given("x_INT8", "INT8", (2**62, 4), ()),)), "INVALID", ("x_INT8",)),
    Refusal("huge-empty-shape", Call("any", (Given("x_INT8", "INT8", (0, 2**62, 2**62), ()),)), "INVALID", ("x_INT8",)),
    Refusal("33-dimensions", Call("any", (Given("x_INT8", "INT8", (1,) * 33, (1,)),)), "INVALID", ("x_INT8",)),
    Refusal("timeout-text", Call("fake", (FAKE_X,), parameters={"timeout": "soon"}), "INVALID", ("timeout", "soon")),
    Refusal("timeout-negative", Call("fake", (FAKE_X,), parameters={"timeout": -1}), "INVALID", ("timeout",)),
    Refusal("timeout-expires", Call("fake", (FAKE_X,), parameters={"timeout": 1}), "DEADLINE", ("fake",)),
    Refusal("model-refuses", Call("fake", (FAKE_X,), parameters={"fake_input_error": "ugh"}), "INVALID", ("ugh",)),
    Refusal("model-fails", Call("fake", (FAKE_X,), parameters={"fake_fail": "alas"}), "INTERNAL", ("fake", "alas")),
]

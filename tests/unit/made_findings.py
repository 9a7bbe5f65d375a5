"""Findings as a search could have made them: of any number of candidates, with everything or with little."""

import math

from headrace_backends.optimize.accuracy import Budget, Errors
from headrace_backends.optimize.findings import (
    Fate,
    Findings,
    Hardware,
    LayerSensitivity,
    OperatorTime,
    Point,
    Profile,
    Row,
)
from headrace_backends.optimize.form import Form, Step, Technique

REFERENCE = Form("onnxruntime")
HOSTILE = "<script>alert('x')</script>&\"$\\frac{1}{0}$[red]"
INT8 = Form(
    "openvino",
    (Step("openvino"), Step("openvino_int8", {"keep": ["conv1", "conv2", "fc"], "preset": "mixed"})),
    threads=2,
    max_batch_size=16,
    techniques=(Technique.INT8_STATIC,),
)
BUDGET = Budget("top1_agreement", min=0.97)


def curve(ms, rows=(1, 2, 4, 8, 16)):
    return tuple(Point(count, ms * (0.6 + 0.4 * count), ms * (0.8 + 0.5 * count)) for count in rows)


def errors(agreement, examples=250):
    loss = 1 - agreement
    return Errors(examples, 8 * loss + 1e-6, loss + 1e-7, 1 - loss / 3, 1 - loss / 9, agreement, 1 - loss / 4)


def row(form, fate, speedup=None, agreement=None, reason="", **more):
    curve_ms = 12.5 / speedup if speedup else None
    return Row(
        form,
        fate,
        reason,
        speedup,
        curve(curve_ms) if curve_ms and "curve" not in more else more.pop("curve", ()),
        None if agreement is None else errors(min(1.0, agreement + 0.004), 251),
        None if agreement is None or fate in (Fate.SLOWER, Fate.FAILED) else errors(agreement),
        **more,
    )


def many_rows(count):
    """Rows of every fate: the first is chosen."""
    rows = [
        row(INT8, Fate.CHOSEN, 4.31, 0.981, "the fastest within the budget", file_bytes=5_100_000,
            memory_bytes=131_000_000, build_s=41.5, load_s=0.7, notes=("12 of 61 layers kept in fp32",)),
        row(Form("openvino", (Step("openvino"),)), Fate.KEPT, 1.62, 1.0, "faithful; 38 % of the chosen one's speed",
            file_bytes=18_800_000, memory_bytes=240_000_000, build_s=3.1, load_s=0.5),
        row(Form("onnxruntime", (Step("int8_static", {"calibrate": "minmax", "per_channel": True}),),
                 techniques=(Technique.INT8_STATIC,)), Fate.REFUSED, 5.2, 0.78,
            "top1_agreement is 0.78, the budget asks for top1_agreement >= 0.97", file_bytes=5_000_000,
            memory_bytes=120_000_000, build_s=22.0, load_s=0.4),
        row(Form("onnxruntime", (Step("int8_dynamic"),), techniques=(Technique.INT8_DYNAMIC,)), Fate.SLOWER, 0.21, None,
            "after 12 runs at most 0.2 times as fast as the best", file_bytes=5_000_000, build_s=2.0, load_s=0.3),
        row(Form("torch", (Step("compile"),), {"compile": True}), Fate.FAILED, None, None,
            "crashed: its process was ended by SIGSEGV", build_s=88.0),
        row(Form("torch", (Step("torch_int8_dynamic"),)), Fate.SKIPPED, None, None, "torchao is not installed"),
    ]  # fmt: skip
    fates = (Fate.KEPT, Fate.REFUSED, Fate.SLOWER, Fate.KEPT, Fate.FAILED)
    for place in range(count - len(rows)):
        fate = fates[place % len(fates)]
        speedup = None if fate is Fate.FAILED else 0.7 + (place * 37 % 50) / 14
        agreement = 0.6 + (place * 29 % 37) / 100 if fate is Fate.REFUSED else 1 - (place * 13 % 30) / 1000
        form = Form(
            "onnxruntime", (Step("simplify"), Step("int8_static", {"keep": place})), {"block": place}, place % 3
        )
        rows.append(row(form, fate, min(speedup, 4.2) if speedup and fate is Fate.KEPT else speedup,
                        agreement if speedup else None, f"made up as number {place}", file_bytes=4_000_000 + place,
                        memory_bytes=90_000_000 + place, build_s=float(place)))  # fmt: skip
    return tuple(rows[:count])


def profile(form, scale, operators=("Conv", "Clip", "Add", "MatMul", "ReorderInput", "GlobalAveragePool")):
    times, at = [], 0.0
    for place in range(40):
        operator = operators[place * place % len(operators)]
        took = scale * (1 + place % 7) * (20 if operator == "Conv" else 2)
        times.append(OperatorTime(f"/features/{place // 5}/{operator.lower()}_{place}", operator, took, at))
        at += took + 0.5
    return Profile(form.name, tuple(times))


def findings(count=6, **changes):
    everything = {
        "model": "efficientnet_lite0",
        "source": "model.onnx",
        "started_at": "2026-11-27T09:14:02Z",
        "seconds": 613.4,
        "objective": "latency",
        "budget": BUDGET,
        "allow": ("bf16", "int8_dynamic", "int8_static"),
        "examples": "501 from calibration.npz, 251 to calibrate and choose with, 250 held back",
        "hardware": Hardware("Intel(R) Xeon(R) Platinum 8481C", 2, ("avx2", "avx512f", "avx512_vnni", "amx_int8")),
        "versions": {"headrace": "0.1.0", "onnxruntime": "1.32.0", "openvino": "2026.4.0", "torch": "2.13.0"},
        "reference": row(REFERENCE, Fate.KEPT, 1.0, 1.0, "the model as it was dropped in", file_bytes=18_600_000,
                         memory_bytes=210_000_000, load_s=0.3),
        "rows": many_rows(count),
        "chosen": INT8,
        "why": "the fastest of the candidates whose top-1 agreement on the held-back half is within the budget",
        "sensitivities": tuple(
            LayerSensitivity(f"/blocks/{place}/conv_dw", "Conv", 0.21 / (1 + place * place)) for place in range(45)
        ),
        "profiles": (profile(REFERENCE, 10.0), profile(INT8, 2.3, ("Convolution", "Add", "Reorder", "MatMul"))),
        "graphs": {
            REFERENCE.name: {"Conv": 49, "Clip": 33, "Add": 10, "Gemm": 1, "Identity": 7},
            INT8.name: {"Convolution": 49, "Add": 10, "MatMul": 1, "FakeQuantize": 97},
        },
    }  # fmt: skip
    return Findings(**{**everything, **changes})


def bare(**changes):
    """The least that a search can have found: nothing but the reference, and that was not measured."""
    return findings(
        0,
        **{
            "reference": Row(REFERENCE, Fate.CHOSEN),
            "chosen": REFERENCE,
            "budget": None,
            "allow": (),
            "sensitivities": (),
            "profiles": (),
            "graphs": {},
            "why": "",
            "complete": False,
            "versions": {},
            **changes,
        },
    )


def hostile():
    """Names that are markup, and numbers that are none."""
    form = Form("openvino", (Step(HOSTILE, {"keep": HOSTILE}),), {"name": HOSTILE * 9}, techniques=(Technique.PRUNE,))
    nothing = Errors(3, math.nan, math.nan, math.nan, math.inf, math.nan, -math.inf, 5)
    return findings(
        3,
        model=HOSTILE,
        source=HOSTILE,
        why=HOSTILE,
        examples=HOSTILE,
        versions={HOSTILE: HOSTILE},
        hardware=Hardware(HOSTILE, 1, (HOSTILE,), HOSTILE),
        chosen=form,
        rows=(
            Row(
                form, Fate.CHOSEN, HOSTILE, math.nan, curve(1.0), nothing, nothing, 0, 0, math.nan, math.inf, (HOSTILE,)
            ),
            Row(Form(HOSTILE), Fate.REFUSED, HOSTILE, math.inf, (Point(1, math.nan, math.nan), Point(2, 0.0, 0.0))),
            Row(Form("torch"), Fate.KEPT, "", -1.0, (Point(8, 3.0, 4.0),), errors(0.5), errors(1.0)),
        ),
        sensitivities=(LayerSensitivity(HOSTILE, HOSTILE, math.nan), LayerSensitivity("b", "Conv", 0.0)),
        profiles=(Profile(HOSTILE, (OperatorTime(HOSTILE, HOSTILE, math.nan), OperatorTime("b", "c", 1.0))),),
        graphs={HOSTILE: {HOSTILE: 1}},
    )

"""Which forms of a model are worth trying, and in what order: those that promise most come first.

The gains are what such forms brought over PyTorch eager on two cores with AVX-512 and VNNI, and only order them: each
is measured. Faithful forms come before all others: they are quick to make, and set the bar for what is clearly slower.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from headrace_backends.optimize.facts import TORCH_ENDINGS, Candidate, Facts, packaged, steps_to_onnx
from headrace_backends.optimize.form import Form, Step, Technique
from headrace_backends.optimize.gpu_candidates import REFERENCE_GAINS_ON_GPU, gpu_candidates

_REFERENCE_GAINS = {"onnxruntime": 2.2, "openvino": 2.2, "litert": 2.2, "ncnn": 2.3}
_OPENVINO_ALONE = (".xml", ".tflite")  # besides the backend of the file
_PRUNED_SHARES = (0.3, 0.5, 0.7)  # of the channels of each layer
_STATIC = Step("int8_static")
# Options that were seen to bring answers nearer, by the kind of step.
_MILDER: dict[str, tuple[dict[str, Any], ...]] = {
    "int8_static": ({"calibrate": "percentile"},),
    "int8_dynamic": ({"operators": ["MatMul"], "keep_contracting": True},),
}


def candidates(facts: Facts) -> list[Candidate]:
    """Every form to try but the reference, in order; gains are over the reference."""
    reference = Form(facts.backend)
    every = gpu_candidates(facts) if facts.on_gpu else [*_faithful(facts), *_lossy(facts)]
    found = sorted(every, key=lambda one: (not one.form.faithful, -one.gain))
    usual = (REFERENCE_GAINS_ON_GPU if facts.on_gpu else _REFERENCE_GAINS).get(facts.backend, 1.0)
    once: dict[str, Candidate] = {}  # a form holds dicts, so there is nothing to hash but its name
    for one in found:
        if one.form != reference:
            once.setdefault(one.form.name, Candidate(one.form, one.gain / usual))
    return list(once.values())


def milder(form: Form) -> list[Form]:
    """The same form with other options, which cost little speed and may keep answers nearer."""
    found = []
    for place, step in enumerate(form.steps):
        for options in _MILDER.get(step.kind, ()):
            if not step.options.items() >= options.items():
                found.append(_with_step(form, place, Step(step.kind, {**step.options, **options})))  # noqa: PERF401
    return found


def kept_in_full(form: Form, layers: Sequence[str], count: int) -> Form | None:
    """The form with ``count`` layers left as they are; None where none of its steps can do that.

    ``layers`` are sorted: those first that are best kept. In an ONNX file the first layers of the net are kept in their
    place: a single float layer between quantised ones costs two conversions, and what is around it is rounded anyway.
    """
    for place, step in enumerate(form.steps):
        if step.kind == "int8_static":
            return _with_step(form, place, Step(step.kind, {**step.options, "keep_first": count, "keep_last": 1}))
        if step.kind in ("openvino_int8", "int8_dynamic"):
            return _with_step(form, place, Step(step.kind, {**step.options, "keep": list(layers[:count])}))
    return None


def _with_step(form: Form, place: int, step: Step) -> Form:
    return msgspec.structs.replace(form, steps=(*form.steps[:place], step, *form.steps[place + 1 :]))


def _faithful(facts: Facts) -> Iterator[Candidate]:
    base = steps_to_onnx(facts.ending)
    if base is not None:
        yield from _by_way_of_onnx(facts, base)
    if facts.ending in _OPENVINO_ALONE and facts.backend != "openvino":
        yield Candidate(Form("openvino", (Step("openvino"),)), 2.3)
    package = packaged(facts)
    if package is not None:
        yield Candidate(package, 2.0)  # the smaller the net, the more: 4.7 for a row of two layers
    if facts.ending in TORCH_ENDINGS:
        if facts.ending == ".pt2":
            yield Candidate(Form("torch", parameters={"compile": True}), 1.4)
        if facts.kind == "convolutional":
            yield Candidate(Form("torch", parameters={"channels_last": True}), 1.05)


def _by_way_of_onnx(facts: Facts, base: tuple[Step, ...]) -> Iterator[Candidate]:
    yield Candidate(Form("onnxruntime", base), 2.4)
    yield Candidate(Form("openvino", (*base, Step("openvino"))), 2.3)
    if facts.kind == "convolutional":
        yield Candidate(Form("ncnn", (*base, Step("ncnn"))), 2.35)
    if facts.kind == "transformer":
        yield Candidate(Form("onnxruntime", (*base, Step("fuse_transformer"))), 2.5)
    yield Candidate(Form("onnxruntime", (*base, Step("simplify"))), 2.0 if facts.exhaustive else 1.0)
    if facts.exhaustive:
        for level in ("disabled", "basic", "extended"):
            yield Candidate(Form("onnxruntime", base, {"graph_optimization_level": level}), 0.9)


def _lossy(facts: Facts) -> Iterator[Candidate]:
    base = steps_to_onnx(facts.ending)
    if base is not None:
        yield from _quantized(facts, base)
        yield from _halved(facts, base)
    if facts.trains:
        yield from _trained(facts)
    if facts.ending in _OPENVINO_ALONE:
        yield from _read_by_openvino(facts)
    if Technique.INT8_DYNAMIC in facts.allow and facts.ending == ".pt2":
        step = Step("torch_int8_dynamic")
        gain = 0.3 if facts.kind == "convolutional" else 2.0
        yield Candidate(Form("torch", (step,), techniques=(Technique.INT8_DYNAMIC,)), gain)
    if Technique.BF16 in facts.allow and facts.ending in TORCH_ENDINGS:
        yield Candidate(Form("torch", parameters={"autocast": "bf16"}, techniques=(Technique.BF16,)), 1.1)


def _read_by_openvino(facts: Facts) -> Iterator[Candidate]:
    """What nobody here makes an ONNX file of."""
    if Technique.INT8_STATIC in facts.allow:
        yield Candidate(_static_openvino(facts, ()), 6.0)
    if Technique.INT8_DYNAMIC in facts.allow:
        yield Candidate(_weights_openvino(()), 3.0)
    if Technique.BF16 in facts.allow:
        steps = () if facts.backend == "openvino" else (Step("openvino"),)
        yield Candidate(Form("openvino", steps, {"precision": "bf16"}, techniques=(Technique.BF16,)), 1.6)


def _quantized(facts: Facts, base: tuple[Step, ...]) -> Iterator[Candidate]:
    """8 bits. Static suits convolutions and dynamic suits matrix products; the other way round is slow or ruinous."""
    convolutional, transformer = facts.kind == "convolutional", facts.kind == "transformer"
    if Technique.INT8_STATIC in facts.allow:
        static = _static_openvino(facts, base)
        yield Candidate(static, 7.0 if convolutional else 5.0)
        if Technique.BF16 in facts.allow:  # for the layers that are left in float
            both = (Technique.INT8_STATIC, Technique.BF16)
            yield Candidate(
                msgspec.structs.replace(static, parameters={"precision": "bf16"}, techniques=both),
                7.2 if convolutional else 5.2,
            )
        yield Candidate(
            Form("onnxruntime", (*base, _STATIC), techniques=(Technique.INT8_STATIC,)),
            6.5 if convolutional else 3.0 if transformer else 5.0,
        )
    if Technique.INT8_DYNAMIC in facts.allow:
        dynamic = (Step("fuse_transformer"), Step("int8_dynamic")) if transformer else (Step("int8_dynamic"),)
        yield Candidate(
            # One scale is found for a whole batch: merged, a client's row could ruin another's.
            Form("onnxruntime", (*base, *dynamic), max_batch_size=1, techniques=(Technique.INT8_DYNAMIC,)),
            0.2 if convolutional else 4.6,
        )
        yield Candidate(_weights_openvino(base), 2.2 if convolutional else 4.0)


def _static_openvino(facts: Facts, base: tuple[Step, ...]) -> Form:
    options = {"transformer": True} if facts.kind == "transformer" else {}
    return Form("openvino", (*base, Step("openvino_int8", options)), techniques=(Technique.INT8_STATIC,))


def _weights_openvino(base: tuple[Step, ...]) -> Form:
    # Without its parameter the weights are only smaller, and nothing is faster.
    steps, parameters = (*base, Step("openvino_int8_weights")), {"dynamic_quantization": True}
    return Form("openvino", steps, parameters, techniques=(Technique.INT8_DYNAMIC,))


def _halved(facts: Facts, base: tuple[Step, ...]) -> Iterator[Candidate]:
    if Technique.BF16 in facts.allow:
        yield Candidate(
            Form("openvino", (*base, Step("openvino")), {"precision": "bf16"}, techniques=(Technique.BF16,)), 1.6
        )
        if facts.kind == "convolutional":
            yield Candidate(
                Form("ncnn", (*base, Step("ncnn")), {"precision": "bf16"}, techniques=(Technique.BF16,)), 2.6
            )
    if Technique.FP16 in facts.allow:
        yield Candidate(
            Form("onnxruntime", (*base, Step("half", {"to": "float16"})), techniques=(Technique.FP16,)), 0.8
        )


def _trained(facts: Facts) -> Iterator[Candidate]:
    """What the owner's training code makes: ONNX files, which may then be quantised as well."""
    made: list[tuple[tuple[Step, ...], Technique, float]] = []
    if Technique.PRUNE in facts.allow:
        made += [((Step("prune", {"share": share}),), Technique.PRUNE, 2.4 / (1 - share)) for share in _PRUNED_SHARES]
    if Technique.DISTILL in facts.allow:
        made.append(((Step("distill"),), Technique.DISTILL, 9.0))
    if Technique.SPARSE in facts.allow:
        made.append(((Step("sparsify"),), Technique.SPARSE, 0.9))
    for steps, technique, gain in made:
        yield Candidate(Form("onnxruntime", steps, techniques=(technique,)), gain)
        yield Candidate(Form("openvino", (*steps, Step("openvino")), techniques=(technique,)), gain * 0.95)
        if facts.kind == "convolutional":
            yield Candidate(Form("ncnn", (*steps, Step("ncnn")), techniques=(technique,)), gain * 0.98)
        for candidate in _quantized(facts, steps):
            form = candidate.form
            both = msgspec.structs.replace(form, techniques=(technique, *form.techniques))
            yield Candidate(both, gain * candidate.gain / 2.4)
    if Technique.QAT in facts.allow:
        yield Candidate(Form("onnxruntime", (Step("quantization_aware"),), techniques=(Technique.QAT,)), 5.0)

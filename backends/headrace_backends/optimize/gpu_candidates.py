"""Which forms of a model are worth trying on a GPU: engines, providers, compilers, precisions, graphs of launches.

The gains are guesses over PyTorch eager fp32 on the same GPU, without TF32, and only order the forms: each is measured.
What is not installed is tried all the same, so that the report says what it would need.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from headrace_backends.optimize.facts import COMPILED, TORCH_ENDINGS, Candidate, Facts, packaged, steps_to_onnx
from headrace_backends.optimize.form import Form, Step, Technique

REFERENCE_GAINS_ON_GPU: Mapping[str, float] = {"onnxruntime": 1.3, "tensorrt": 2.0}
_GRAPHS = {"cuda_graphs": True}
_LONGEST = 5  # of TensorRT's builder levels
# What a precision brings with tensor cores, by the name that the configuration allows it by.
_PRECISIONS = {Technique.TF32: 1.6, Technique.FP16: 3.0, Technique.BF16: 2.8}


def gpu_candidates(facts: Facts) -> Iterator[Candidate]:
    """Every form to try, in no order; gains are over PyTorch eager."""
    base = steps_to_onnx(facts.ending)
    if base is not None:
        yield from _tensorrt(facts, base)
        yield from _onnxruntime(facts, base)
    elif facts.backend == "tensorrt":  # an engine: all but the way of launching it was settled when it was built
        yield Candidate(Form("tensorrt", parameters=_GRAPHS), 2.1)
    if facts.ending in TORCH_ENDINGS:
        yield from _torch(facts)
    elif facts.ending == COMPILED:
        yield Candidate(Form("torch", parameters=_GRAPHS), 1.7)


def _allowed(facts: Facts) -> Iterator[tuple[Technique, float]]:
    return ((technique, gain) for technique, gain in _PRECISIONS.items() if technique in facts.allow)


def _tensorrt(facts: Facts, base: tuple[Step, ...]) -> Iterator[Candidate]:
    plain = Form("tensorrt", base, {"precision": "fp32", **_GRAPHS})
    levels = (None, _LONGEST) if facts.exhaustive else (None,)
    for level in levels:
        deeper = {} if level is None else {"builder_level": level}
        yield Candidate(_with(plain, **deeper), 2.0 + bool(deeper) * 0.05)
        for technique, gain in _allowed(facts):
            form = _with(plain, technique, precision=str(technique), **deeper)
            yield Candidate(form, 2.0 * gain * (1 + bool(deeper) * 0.02))
    if facts.exhaustive:
        yield Candidate(_without(plain, "cuda_graphs"), 1.9)


def _onnxruntime(facts: Facts, base: tuple[Step, ...]) -> Iterator[Candidate]:
    plain = Form("onnxruntime", base)
    forms = [(plain, 1.3), (_with(plain, **_GRAPHS), 1.5)]
    if facts.kind == "transformer":
        fused = Form("onnxruntime", (*base, Step("fuse_transformer")))
        forms.append((fused, 1.6))
    for form, gain in forms:
        yield Candidate(form, gain)
        if Technique.TF32 in facts.allow:
            yield Candidate(_with(form, Technique.TF32, tf32=True), gain * _PRECISIONS[Technique.TF32])
    for technique, gain in _allowed(facts):
        # In fp32 it is TF32 where that is quicker, and ONNX Runtime has no option against it.
        asked = {"tf32": True} if technique is Technique.TF32 else {"precision": str(technique)}
        yield Candidate(_with(plain, technique, provider="tensorrt", **asked), 1.9 * gain)
    if Technique.FP16 in facts.allow:
        half = Form("onnxruntime", (*base, Step("half", {"to": "float16"})), techniques=(Technique.FP16,))
        yield Candidate(half, 2.6)


def _torch(facts: Facts) -> Iterator[Candidate]:
    plain = Form("torch")
    forms = [(plain, 1.0), (_with(plain, **_GRAPHS), 1.3)]
    if facts.ending == ".pt2":
        forms.append((_with(plain, compile=True), 1.4))
        # Launches of whole graphs, for sizes that are fixed but for the rows; the others also measure kernels against
        # each other, which takes long.
        forms.append((_with(plain, compile=True, compile_mode="reduce-overhead"), 1.7))
        if facts.exhaustive:
            forms.append((_with(plain, compile=True, compile_mode="max-autotune"), 1.8))
            forms.append((_with(plain, compile=True, compile_mode="max-autotune-no-cudagraphs"), 1.5))
    if facts.kind == "convolutional":
        forms += [(_with(form, channels_last=True), gain * 1.05) for form, gain in forms]
    package = packaged(facts)
    if package is not None:
        for form, gain in ((package, 1.5), (_with(package, **_GRAPHS), 1.75)):
            yield Candidate(form, gain)
            if Technique.TF32 in facts.allow:  # other precisions are settled where the program is exported
                yield Candidate(_with(form, Technique.TF32, tf32=True), gain * _PRECISIONS[Technique.TF32] * 0.8)
    for form, gain in forms:
        yield Candidate(form, gain)
        for technique, more in _allowed(facts):
            asked = {"tf32": True} if technique is Technique.TF32 else {"autocast": str(technique)}
            yield Candidate(_with(form, technique, **asked), gain * more * 0.8)


def _with(form: Form, *techniques: Technique, **parameters: Any) -> Form:
    return msgspec.structs.replace(
        form, parameters={**form.parameters, **parameters}, techniques=(*form.techniques, *techniques)
    )


def _without(form: Form, name: str) -> Form:
    kept = {key: value for key, value in form.parameters.items() if key != name}
    return msgspec.structs.replace(form, parameters=kept)

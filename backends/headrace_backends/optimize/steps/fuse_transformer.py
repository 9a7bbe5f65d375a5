"""An ONNX transformer whose attention, norms and GELUs are single operators of ONNX Runtime's, still in float32."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import onnx

from headrace_backends.optimize import onnx_model
from headrace_backends.optimize.probes import shaken
from headrace_backends.optimize.quiet import hushed
from headrace_backends.optimize.sensitivity import relative_error
from headrace_backends.optimize.steps import options
from headrace_backends.optimize.steps.base import StepFailed, StepTask

_FUSED = (
    "Attention", "MultiHeadAttention", "SkipLayerNormalization", "EmbedLayerNormalization", "Gelu", "FastGelu",
    "BiasGelu", "QuickGelu", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization", "GroupNorm",
)  # fmt: skip


# Families whose attention is fused in different ways; what one does not recognise in an export, another may.
_FAMILIES = ("bert", "bart", "gpt2", "vit")
_NOISE = 1e-3  # of an output's spread: what another order of additions may change


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``model_type`` is a family that ONNX Runtime's optimiser knows, or auto. Sizes of 0 are found by it."""

    model_type: str = "auto"
    heads: Annotated[int, msgspec.Meta(ge=0)] = 0
    hidden: Annotated[int, msgspec.Meta(ge=0)] = 0


def apply(task: StepTask) -> Path:
    """Fuse what the optimiser recognises, as the family of models that suits best and answers as before.

    Raises:
        StepFailed: nothing is recognised, or the answers differ.
    """
    from onnxruntime.transformers.optimizer import MODEL_TYPES

    chosen = options.read("fuse_transformer", Options, task.options)
    if chosen.model_type not in {*MODEL_TYPES, "auto"}:
        raise StepFailed(
            f"fuse_transformer: model_type is {chosen.model_type!r}, expected auto or one of {sorted(MODEL_TYPES)}"
        )
    original = onnx_model.read(task.source)
    onnx_model.refuse_quantized(original)
    before = onnx_model.counts(original)
    families = _FAMILIES if chosen.model_type == "auto" else (chosen.model_type,)
    tried = [(_fused(task, original, family, chosen), family) for family in families]
    made = sorted(
        (
            (_gain(before, onnx_model.counts(model)), place)
            for place, (model, _) in enumerate(tried)
            if model is not None
        ),
        key=lambda one: (one[0] or (0, 0), -one[1]),
        reverse=True,
    )
    useful = [tried[place] for gain, place in made if gain]
    if not useful:
        raise StepFailed("nothing in the graph is attention, a norm or a GELU in a form that can be fused")
    for model, family in useful:
        path = _written_if_alike(model, task, original)
        if path is not None:
            after = onnx_model.counts(model)
            fused = [
                f"{after[one] - before.get(one, 0)} {one}" for one in _FUSED if after.get(one, 0) > before.get(one, 0)
            ]
            task.note(
                f"as {family}: {sum(before.values())} operators became {sum(after.values())}, "
                f"among them {', '.join(fused)}"
            )
            return path
    raise StepFailed("what can be fused in the graph answers otherwise than before")


def _fused(task: StepTask, original: Any, family: str, chosen: Options) -> Any | None:
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    # By itself it takes a mask for the number of tokens before the padding as bert, and leaves it out as vit.
    fusions = FusionOptions(family)
    fusions.use_raw_attention_mask()
    whole = task.folder / "whole.onnx"
    onnx.save(original, whole)
    try:
        with hushed():
            # Level 0: ONNX Runtime's own fusions come when the model is loaded, as they do for every model.
            fused = optimize_model(
                str(whole),
                model_type=family,
                num_heads=chosen.heads,
                hidden_size=chosen.hidden,
                opt_level=0,
                optimization_options=fusions,
                use_gpu=False,
            )
    except Exception as error:  # noqa: BLE001 - of any kind, on graphs that it does not know
        task.note(f"as {family}: the optimiser gave up: {type(error).__name__}: {str(error)[:100]}")
        return None
    finally:
        whole.unlink()
    onnx_model.import_own(fused.model)
    return fused.model


def _gain(before: Mapping[str, int], after: Mapping[str, int]) -> tuple[int, int] | None:
    """How much attention is fused, and how much of anything; None for nothing."""
    more = {kind: after.get(kind, 0) - before.get(kind, 0) for kind in _FUSED}
    attention = max(0, more["Attention"]) + max(0, more["MultiHeadAttention"])
    total = sum(count for count in more.values() if count > 0)
    return (attention, total) if total else None


def _written_if_alike(model: Any, task: StepTask, original: Any) -> Path | None:
    """The model's file; None where it has other inputs, or gives the first examples other answers.

    Each is asked a second time with its whole numbers shaken: what is fused as another kind of mask or position is
    right for all examples without padding.
    """
    try:
        path = onnx_model.write(model, task, original)
        session = onnx_model.session_of(path, task)
    except StepFailed:
        return None
    reference = onnx_model.session_of(original, task)
    random = np.random.default_rng(task.seed)
    feeds = [dict(example) for example in task.examples.first(4).inputs]
    right = [onnx_model.run(reference, feed) for feed in feeds]
    for feed in [dict(shaken(feed, random)) for feed in feeds]:
        with suppress(StepFailed):  # the model need not take that
            answer = onnx_model.run(reference, feed)
            if all(np.isfinite(array).all() for array in answer.values() if array.dtype.kind == "f"):
                feeds.append(feed)
                right.append(answer)
    try:
        answers = [onnx_model.run(session, feed) for feed in feeds]
    except StepFailed:
        return None
    return path if not right or relative_error(right, answers) <= _NOISE else None

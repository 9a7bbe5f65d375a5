"""Which steps there are: names to ``module:function``, imported only in the process that takes the step."""

from importlib import import_module

from headrace_backends.optimize.steps.base import Apply

_STEPS: dict[str, str] = {
    # PyTorch files to ONNX
    "export_onnx": "headrace_backends.optimize.steps.export_onnx:apply",
    # ONNX to ONNX
    "simplify": "headrace_backends.optimize.steps.simplify:apply",
    "fuse_transformer": "headrace_backends.optimize.steps.fuse_transformer:apply",
    "int8_dynamic": "headrace_backends.optimize.steps.int8_dynamic:apply",
    "int8_static": "headrace_backends.optimize.steps.int8_static:apply",
    "half": "headrace_backends.optimize.steps.half:apply",
    # ONNX, TorchScript or OpenVINO IR to OpenVINO IR
    "openvino": "headrace_backends.optimize.steps.openvino_ir:apply",
    "openvino_int8": "headrace_backends.optimize.steps.openvino_int8:apply",
    "openvino_int8_weights": "headrace_backends.optimize.steps.openvino_int8_weights:apply",
    # ONNX to ncnn
    "ncnn": "headrace_backends.optimize.steps.ncnn_model:apply",
    # PyTorch to PyTorch
    "torch_int8_dynamic": "headrace_backends.optimize.steps.torch_int8_dynamic:apply",
    "aot_inductor": "headrace_backends.optimize.steps.aot_inductor:apply",
    # with the owner's training code, to ONNX
    "prune": "headrace_backends.optimize.steps.prune:apply",
    "sparsify": "headrace_backends.optimize.steps.sparsify:apply",
    "distill": "headrace_backends.optimize.steps.distill:apply",
    "quantization_aware": "headrace_backends.optimize.steps.quantization_aware:apply",
}


def step(kind: str) -> Apply:
    """The function that takes steps of this kind. Importing it imports its framework."""
    module, _, name = _STEPS[kind].partition(":")
    apply: Apply = getattr(import_module(module), name)
    return apply

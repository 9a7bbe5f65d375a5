"""Models on TensorRT and TensorRT-RTX: engines as they are, and ONNX files built to engines."""

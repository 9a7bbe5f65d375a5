"""Models of other frameworks, made ONNX when they are loaded and run by ONNX Runtime from then on."""

"""ncnn: Tencent's inference for convolutional nets, on CPUs."""

"""The model behind BentoML: ``/predict`` takes an array as nested lists and gives one."""

import os

import bentoml
import numpy as np
from onnx_net import OnnxNet


@bentoml.service(
    name="loadtest",
    workers=int(os.environ["LOADTEST_WORKERS"]),
    traffic={"timeout": 300},
    logging={"access": {"enabled": False}},
    metrics={"enabled": False},
)
class Service:
    """A batched method may have one parameter only, so a model's inputs come stacked in their second dimension."""

    def __init__(self):
        self._net = OnnxNet()

    @bentoml.api(batchable=True, max_batch_size=int(os.environ["LOADTEST_MAX_BATCH"]), max_latency_ms=60_000)
    def predict(self, x: np.ndarray) -> np.ndarray:
        inputs = self._net.inputs
        parts = [x] if len(inputs) == 1 else [x[:, index] for index in range(len(inputs))]
        return self._net.run(
            {name: part.astype(dtype) for (name, dtype), part in zip(inputs.items(), parts, strict=True)}
        )

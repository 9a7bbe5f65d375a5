"""The model behind Triton's python backend, as 1/model.py of its repository."""

import sys
from pathlib import Path

import triton_python_backend_utils as pb_utils

sys.path.insert(0, str(Path(__file__).parent))

from onnx_net import OnnxNet


class TritonPythonModel:
    """Triton hands over the requests of a batch one by one; to merge them is the model's business."""

    def initialize(self, args):
        self._net = OnnxNet()

    def execute(self, requests):
        names = list(self._net.inputs)
        rows = [
            {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in names}
            for request in requests
        ]
        output = self._net.run(self._net.join(rows))
        responses, start = [], 0
        for row in rows:
            end = start + len(row[names[0]])
            tensor = pb_utils.Tensor(self._net.output, output[start:end])
            responses.append(pb_utils.InferenceResponse([tensor]))
            start = end
        return responses

"""The model behind LitServe: ``/predict`` takes and gives objects of lists."""

import os

import litserve
from onnx_net import OnnxNet


class Api(litserve.LitAPI):
    """LitServe's four steps; conversion of JSON happens in the worker."""

    def setup(self, device):
        self._net = OnnxNet()

    def decode_request(self, request):
        return self._net.row_of_lists(request)

    def batch(self, inputs):
        return self._net.join(inputs)

    def predict(self, batch):
        return self._net.run(batch)

    def unbatch(self, output):
        return list(output[:, None])

    def encode_response(self, output):
        return {self._net.output: output.tolist()}


if __name__ == "__main__":
    api = Api(max_batch_size=int(os.environ["LOADTEST_MAX_BATCH"]), batch_timeout=0.001)
    server = litserve.LitServer(
        api,
        accelerator="cpu",
        workers_per_device=int(os.environ["LOADTEST_WORKERS"]),
        timeout=300,
        fast_queue=True,
    )
    server.run(
        host="127.0.0.1",
        port=int(os.environ["LOADTEST_PORT"]),
        num_api_servers=1,
        log_level="warning",
        access_log=False,
        generate_client_file=False,
    )

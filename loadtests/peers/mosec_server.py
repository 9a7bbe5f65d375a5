"""The model behind mosec: ``/raw`` takes and gives tensors' bytes, ``/json`` objects of lists."""

import os

from mosec import Server, Worker
from onnx_net import OnnxNet


class RawWorker(Worker):
    """Bytes in, bytes out."""

    resp_mime_type = "application/octet-stream"

    def __init__(self):
        self._net = OnnxNet()

    def deserialize(self, data):
        return self._net.row_of_bytes(data)

    def forward(self, data):
        return self._net.run_rows(data)

    def serialize(self, data):
        return data.tobytes()


class JsonWorker(Worker):
    """JSON in and out, by mosec's own (de)serialisation."""

    def __init__(self):
        self._net = OnnxNet()

    def forward(self, data):
        outputs = self._net.run_rows([self._net.row_of_lists(lists) for lists in data])
        return [{self._net.output: output.tolist()} for output in outputs]


if __name__ == "__main__":
    server = Server()
    for worker, route in ((RawWorker, "/raw"), (JsonWorker, "/json")):
        server.append_worker(
            worker,
            num=int(os.environ["LOADTEST_WORKERS"]),
            max_batch_size=int(os.environ["LOADTEST_MAX_BATCH"]),
            max_wait_time=1,  # ms: the least there is, 0 means the default of 10
            route=route,
        )
    server.run()

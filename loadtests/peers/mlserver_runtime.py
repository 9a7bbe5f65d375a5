"""The model behind MLServer, as a runtime of its own; batches are made by its adaptive batching."""

import asyncio

from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse
from onnx_net import OnnxNet


class OnnxRuntime(MLModel):
    """Runs in a worker process of MLServer's."""

    async def load(self):
        self._net = OnnxNet()
        return True

    async def predict(self, payload):
        batch = {entry.name: NumpyCodec.decode_input(entry) for entry in payload.inputs}
        # In a thread, so that the worker's loop reads requests meanwhile.
        output = await asyncio.get_running_loop().run_in_executor(None, self._net.run, batch)
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output(self._net.output, output)])

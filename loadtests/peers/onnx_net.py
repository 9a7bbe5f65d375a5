"""The model in a peer's worker: ONNX Runtime with the same options in every peer, and rows made into batches."""

import os

import numpy as np
import onnxruntime

_DTYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64}


class OnnxNet:
    """The session of LOADTEST_MODEL_FILE. All load models have one output."""

    def __init__(self):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(os.environ["LOADTEST_THREADS"])
        options.inter_op_num_threads = 1
        # Threads that spin for work would take the CPUs from the server's own processes; Headrace does the same.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(
            os.environ["LOADTEST_MODEL_FILE"], options, providers=["CPUExecutionProvider"]
        )
        self.inputs = {entry.name: _DTYPES[entry.type] for entry in self._session.get_inputs()}
        self._row_shapes = [
            [size if isinstance(size, int) else -1 for size in entry.shape[1:]] for entry in self._session.get_inputs()
        ]
        self.output = self._session.get_outputs()[0].name

    def run(self, batch):
        """The output of a batch, given as an array for each input."""
        return self._session.run([self.output], batch)[0]

    def run_rows(self, rows):
        """The outputs of rows that came one by one, each with a batch dimension of 1."""
        return np.split(self.run(self.join(rows)), len(rows))

    @staticmethod
    def join(rows):
        """One batch of them; a single row is not copied."""
        if len(rows) == 1:
            return rows[0]
        return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}

    def row_of_bytes(self, data):
        """One row out of its inputs' bytes end to end. Of several inputs all have the same size."""
        row, part_bytes = {}, len(data) // len(self.inputs)
        for index, ((name, dtype), shape) in enumerate(zip(self.inputs.items(), self._row_shapes, strict=True)):
            count = part_bytes // np.dtype(dtype).itemsize
            row[name] = np.frombuffer(data, dtype, count, index * part_bytes).reshape(1, *shape)
        return row

    def row_of_lists(self, lists):
        """One row out of nested lists by the inputs' names."""
        return {name: np.array(lists[name], dtype) for name, dtype in self.inputs.items()}

"""Work that goes on until a test says so, and clients whose leaving was noticed: so that a test hopes for no time."""

import threading
from pathlib import Path

import psutil
from running_server import RunningServer
from system.load import infer

# An echo. A request with a ``gate`` is at work until there is that file.
HELD = """
    import os
    import time


    class Model:
        inputs = [{"name": "x", "datatype": "FP32", "shape": [-1, -1]}]
        outputs = [{"name": "y", "datatype": "FP32", "shape": [-1, -1]}]
        max_batch_size = 1

        def infer(self, inputs, requests):
            gate = requests[0].parameters.get("gate") if requests else None
            while gate and not os.path.exists(gate):
                time.sleep(0.01)
            return {"y": inputs["x"]}
"""


class Busy:
    """A HELD model's one worker is at work for a client of its own, until ``end`` or the end of the block."""

    def __init__(self, server: RunningServer, model: str, gate: Path) -> None:
        self.outcomes = []
        self._server, self._model, self._gate = server, model, gate
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self._thread.start()
        try:
            self._server.wait_for(lambda: self._server.metric("headrace_executing_batches", model=self._model) == 1)
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, *_):
        self.end()

    def end(self):
        """Let it have its answer."""
        self._gate.touch()
        self._thread.join()

    def _run(self):
        self.outcomes.append(infer(self._server.http, self._model, [0.0], {"gate": str(self._gate)}))


def connections(server: RunningServer) -> set:
    """The ends of the clients' connections that the server has open: of one who has left it closes its own in turn."""
    held = psutil.Process(server.process.pid).net_connections("tcp")
    return {tuple(one.raddr) for one in held if one.raddr}

"""Workers that are replaced because of their memory, on the real server: nobody who asks meanwhile notices."""

import time

import pytest
from running_server import RunningServer
from system.load import Load, onnx_model, python_model
from system.streams import generate_stream

OFTEN = ("--recycle-interval", "2", "--worker-memory-growth-bytes", str(24 << 20))
SETTLED_S = 3  # a baseline is taken over half of the interval, and looked at a few times a second
GROWTH = ("--worker-memory-growth", "1.2", *OFTEN)

# Keeps what a request's parameter says, for good.
LEAKY = """
    import os

    from headrace_backends.python import Answer

    class Model:
        inputs = [{"name": "x", "datatype": "FP32", "shape": [-1, -1]}]
        outputs = [{"name": "y", "datatype": "FP32", "shape": [-1, -1]}]
        max_batch_size = 8

        def load(self, context):
            self.kept = []

        def infer(self, inputs, requests):
            answers, start = [], 0
            for one in requests:
                if one.parameters.get("leak_mb"):
                    self.kept.append(b"x" * (one.parameters["leak_mb"] << 20))
                rows = slice(start, start + one.rows)
                start += one.rows
                answers.append(Answer({"y": inputs["x"][rows]}, {"pid": os.getpid()}))
            return answers
"""
# The sum of a sequence's rows so far, kept by the model itself.
SUMS = """
    import os

    import numpy as np

    from headrace_backends.python import Answer

    class Model:
        inputs = [{"name": "x", "datatype": "FP32", "shape": [-1, 1]}]
        outputs = [{"name": "y", "datatype": "FP32", "shape": [-1, 1]}]
        max_batch_size = 4

        def load(self, context):
            self.sums, self.kept = {}, []

        def infer(self, inputs, requests):
            return [self.answer(x, one.parameters) for x, one in zip(inputs["x"], requests, strict=True)]

        def answer(self, x, said):
            if "sequence_id" not in said:
                return Answer({"y": np.zeros((1, 1), np.float32)})
            if said.get("leak_mb"):
                self.kept.append(b"x" * (said["leak_mb"] << 20))
            number = said["sequence_id"]
            self.sums[number] = float(x[0]) + (0 if said.get("sequence_start") else self.sums[number])
            return Answer({"y": np.array([[self.sums[number]]], np.float32)}, {"pid": os.getpid()})
"""
COUNTING = """
    import os
    import time

    import numpy as np

    from headrace_backends.python import Answer


    class Model:
        inputs = [{"name": "count", "datatype": "INT32", "shape": [1]}]
        outputs = [{"name": "index", "datatype": "INT32", "shape": [1]}]
        kept = []

        def infer(self, inputs, request):
            if request.parameters.get("leak_mb"):
                self.kept.append(b"x" * (request.parameters["leak_mb"] << 20))
            for number in range(int(inputs["count"][0])):
                yield Answer({"index": np.array([number], np.int32)}, {"pid": os.getpid()})
                time.sleep(request.parameters.get("pause_ms", 0) / 1000)
"""


def ask(server, model, value, **parameters):
    """The answer's first number and its parameters."""
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [value]}], "parameters": parameters}
    status, answer = server.post(f"/v2/models/{model}/infer", body)
    assert status == 200, answer
    return answer["outputs"][0]["data"][0], answer.get("parameters", {})


def recycles(server, reason="growth"):
    return server.metric("headrace_worker_recycles_total", reason=reason)


def settle(server):
    """Let the baseline be taken: by a server that was awake at the end of that time."""
    time.sleep(SETTLED_S - 0.5)
    assert server.get("/v2/health/live")[0] == 200
    time.sleep(0.5)


def test_one_that_leaks_is_replaced_under_load(tmp_path):
    python_model(tmp_path, "leaky", LEAKY)
    with RunningServer(tmp_path, *GROWTH) as server:
        before = ask(server, "leaky", 1)[1]["pid"]
        with Load(server, "leaky", http=3, grpc=1) as load:
            for number in range(200):
                ask(server, "leaky", number)
            settle(server)
            held = server.metric("headrace_worker_memory_bytes", worker="worker-1")
            for _ in range(8):
                ask(server, "leaky", 0, leak_mb=16)
            server.wait_for(lambda: recycles(server) >= 1)
            load.wait_answers(200)
        assert load.failed == []
        assert ask(server, "leaky", 1)[1]["pid"] != before
        server.wait_for(lambda: len(server.workers()) == 1)
        assert server.metric("headrace_worker_memory_bytes", worker="worker-2") < held + (28 << 20)
        assert "is replaced: it has grown from" in server.output
        assert server.stop() == 0


def test_a_sequence_ends_where_it_began(tmp_path):
    python_model(
        tmp_path, "sums", SUMS, config="sequence: {strategy: oldest, max_candidates: 4, max_idle_us: 600000000}\n"
    )
    with RunningServer(tmp_path, *GROWTH) as server:
        before = ask(server, "sums", 1, sequence_id=1, sequence_start=True)[1]["pid"]
        ask(server, "sums", 1, sequence_id=2, sequence_start=True)
        for number in range(20):
            ask(server, "sums", number, sequence_id=1)
        settle(server)
        for _ in range(8):
            ask(server, "sums", 0, sequence_id=1, leak_mb=16)
        server.wait_for(lambda: len(server.workers()) == 2)
        server.wait_for(
            lambda: ask(server, "sums", 5, sequence_id=9, sequence_start=True, sequence_end=True)[1]["pid"] != before
        )
        total, said = ask(server, "sums", 5, sequence_id=1)
        assert (total, said["pid"]) == (196, before)
        assert ask(server, "sums", 1, sequence_id=2, sequence_end=True) == (2, {"pid": before})
        # Begun anew, it may as well go where there is a future.
        total, said = ask(server, "sums", 7, sequence_id=1, sequence_start=True)
        assert total == 7
        assert said["pid"] != before
        server.wait_for(lambda: len(server.workers()) == 1)
        server.wait_for(lambda: recycles(server) == 1)
        assert ask(server, "sums", 1, sequence_id=1, sequence_end=True) == (8, said)


def test_a_sequence_that_does_not_end_in_time_is_broken_off(tmp_path):
    python_model(
        tmp_path, "sums", SUMS, config="sequence: {strategy: oldest, max_candidates: 4, max_idle_us: 600000000}\n"
    )
    with RunningServer(tmp_path, "--recycle-grace", "1", *GROWTH) as server:
        ask(server, "sums", 1, sequence_id=1, sequence_start=True)
        for number in range(20):
            ask(server, "sums", number, sequence_id=1)
        settle(server)
        for _ in range(8):
            ask(server, "sums", 0, sequence_id=1, leak_mb=16)
        server.wait_for(lambda: recycles(server) == 1)
        body = {
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [1]}],
            "parameters": {"sequence_id": 1},
        }
        status, answer = server.post("/v2/models/sums/infer", body)
        assert status == 400
        assert "has ended: its worker died (it is replaced" in answer["error"]
        assert ask(server, "sums", 3, sequence_id=1, sequence_start=True)[0] == 3
        server.wait_for(lambda: len(server.workers()) == 1)


def test_an_open_stream_goes_on_to_its_end(tmp_path):
    python_model(tmp_path, "counting", COUNTING)
    with RunningServer(tmp_path, *GROWTH) as server:
        for _ in range(12):
            list(generate_stream(server, "counting", 2))
        settle(server)
        with_pauses = generate_stream(server, "counting", 100, {"pause_ms": 60})
        assert next(with_pauses).index == 0
        for _ in range(8):
            list(generate_stream(server, "counting", 1, {"leak_mb": 16}))
        server.wait_for(lambda: len(server.workers()) == 2)
        assert [item.index for item in with_pauses] == list(range(1, 100))
        server.wait_for(lambda: recycles(server) == 1)
        server.wait_for(lambda: len(server.workers()) == 1)


def test_a_limit_that_the_model_itself_is_over_is_given_up(tmp_path):
    """A shared worker with several models, over a limit that no worker could keep: all of it goes on serving."""
    for number in range(6):
        onnx_model(tmp_path, f"add_{number}", add=number)
    flags = ("--max-own-workers", "0", "--max-shared-workers", "1", "--worker-memory-limit", "1", *OFTEN)
    with RunningServer(tmp_path, *flags) as server:
        loads = [
            Load(
                server,
                f"add_{number}",
                http=1,
                grpc=1,
                expected=lambda values, _, n=number: [one + n for one in values],
            )
            for number in range(6)
        ]
        for load in loads:
            load.__enter__()
        server.wait_for(lambda: "is not replaced any more for now" in server.output, 180)
        assert recycles(server, "limit") == 3
        for load in loads:
            load.wait_answers(20)
            load.stop()
            assert load.failed == []
        server.wait_for(lambda: len(server.workers()) == 1)


def test_a_models_own_limit(tmp_path):
    python_model(tmp_path, "leaky", LEAKY, config=f"memory_limit_bytes: {200 << 20}")
    with RunningServer(tmp_path, *OFTEN) as server:
        before = ask(server, "leaky", 1)[1]["pid"]
        for _ in range(14):
            ask(server, "leaky", 1, leak_mb=16)
        server.wait_for(lambda: recycles(server, "limit") == 1)
        assert ask(server, "leaky", 1)[1]["pid"] != before


@pytest.mark.parametrize("factor", ["1", "0.5"])
def test_a_factor_that_makes_no_sense(tmp_path, factor):
    with (
        pytest.raises(AssertionError, match="expected 0, or a factor above 1"),
        RunningServer(tmp_path, "--worker-memory-growth", factor),
    ):
        pass

"""Workers that are being replaced, or models that are coming in, while files vanish and processes are killed."""

import contextlib
import threading
import time

import psutil
from running_server import RunningServer
from system.load import Load, fake_model, infer, onnx_model, python_model, wait_for
from system.streams import generate_stream
from system.test_recycling import COUNTING, LEAKY, OFTEN, SETTLED_S, ask, recycles

LIMIT = ("--worker-memory-limit", str(150 << 20), *OFTEN)
MB = 1 << 20
SLOW_START = LEAKY.replace("self.kept = []", "self.kept = []\n            import time; time.sleep(2)")


def leak(server, model, times=8):
    for _ in range(times):
        ask(server, model, 0, leak_mb=16)


def test_a_model_that_cannot_be_loaded_again_stays_where_it_is(tmp_path):
    python_model(tmp_path, "leaky", LEAKY)
    with RunningServer(tmp_path, "--model-control", "none", *LIMIT) as server:
        before = ask(server, "leaky", 1)[1]["pid"]
        (tmp_path / "leaky/1/model.py").rename(tmp_path / "elsewhere")
        with Load(server, "leaky", http=2) as load:
            leak(server, "leaky")
            server.wait_for(lambda: "is not replaced any more for now" in server.output)
            load.wait_answers(50)
        assert load.failed == []
        assert ask(server, "leaky", 1)[1]["pid"] == before
        wait_for(lambda: len(server.workers()) == 1)
        assert recycles(server, "limit") == 0
        assert server.model_ready("leaky")


def test_a_model_that_is_broken_already_holds_up_nobody(tmp_path):
    """It moves along with its neighbours, and is tried again where they are."""
    onnx_model(tmp_path, "good", add=1)
    onnx_model(tmp_path, "bad", add=2)
    sharing = ("--max-own-workers", "0", "--max-shared-workers", "1", "--model-control", "none")
    with RunningServer(tmp_path, *sharing, "--worker-memory-limit", "1", "--recycle-interval", "0.2") as server:
        server.wait_for(lambda: "is not replaced any more for now" in server.output)
        in_vain = recycles(server, "limit")
        assert in_vain >= 3
        file = tmp_path / "bad/1/model.onnx"
        file.rename(tmp_path / "elsewhere")
        (worker,) = server.workers()
        worker.kill()
        server.wait_for(lambda: not server.model_ready("bad") and server.model_ready("good"))
        with Load(server, "good", http=2, expected=lambda values, _: [one + 1 for one in values]) as load:
            server.wait_for(lambda: recycles(server, "limit") > in_vain, 60)
        assert load.failed == []
        (tmp_path / "elsewhere").rename(file)
        server.wait_for(lambda: server.model_ready("bad"), 60)
        assert infer(server.http, "bad", [1.0]).values == [3.0]
        server.wait_for(lambda: len(server.workers()) <= 2)  # one of them may be about to take the other's place


def test_a_successor_that_is_killed_while_it_loads_is_started_again(tmp_path):
    python_model(tmp_path, "leaky", SLOW_START)
    with RunningServer(tmp_path, *LIMIT) as server:
        (old,) = server.workers()
        with Load(server, "leaky", http=2) as load:
            leak(server, "leaky")
            server.wait_for(lambda: len(server.workers()) == 2)
            (successor,) = [one for one in server.workers() if one.pid != old.pid]
            time.sleep(0.7)  # it is loading by now
            successor.kill()
            server.wait_for(lambda: recycles(server, "limit") == 1)
            load.wait_answers(20)
        assert load.failed == []
        server.wait_for(lambda: len(server.workers()) == 1)
        (left,) = server.workers()
        assert left.pid not in (old.pid, successor.pid)


def test_one_that_is_killed_while_it_leaves_ends_what_it_had_and_nothing_else(tmp_path):
    python_model(tmp_path, "counting", COUNTING)
    with RunningServer(tmp_path, *LIMIT) as server:
        (old,) = server.workers()
        stream = generate_stream(server, "counting", 1000, {"pause_ms": 50})
        assert next(stream).index == 0
        for _ in range(8):
            list(generate_stream(server, "counting", 1, {"leak_mb": 16}))
        server.wait_for(lambda: server.post("/v2/models/counting/generate", {"count": 1})[1]["pid"] != old.pid)
        old.kill()
        *_, last = stream
        assert "the worker died (signal SIGKILL)" in last.error
        server.wait_for(lambda: recycles(server, "limit") == 1)
        assert [item.index for item in generate_stream(server, "counting", 3)] == [0, 1, 2]
        server.wait_for(lambda: len(server.workers()) == 1)


def test_killed_again_and_again_while_it_is_replaced(tmp_path):
    """Whichever worker dies and when, every request has its answer."""
    python_model(tmp_path, "leaky", LEAKY)
    with RunningServer(tmp_path, "--worker-memory-growth", "1.2", *OFTEN) as server:
        with Load(server, "leaky", http=3, interval_s=0.005) as load:
            for round_ in range(3):
                time.sleep(SETTLED_S)
                leak(server, "leaky")
                time.sleep(0.3 * round_)
                for worker in server.workers():
                    with contextlib.suppress(psutil.NoSuchProcess):  # it has left by itself
                        worker.kill()
                    psutil.wait_procs([worker], 10)
                    time.sleep(0.4)  # one stroke a worker
                    load.wait_answers(10)  # also from what the stroke has hit, which goes first
            load.wait_answers(50)
        assert load.failed == []
        assert server.stop() == 0


def test_a_worker_that_is_killed_while_a_model_comes_in_is_started_again(tmp_path):
    fake_model(tmp_path, "slow", "parameters: {fake_load_delay_ms: 1000, fake_memory_mb: 60}")
    fake_model(tmp_path, "other", "parameters: {fake_memory_mb: 60}")
    with RunningServer(tmp_path, "--resident-bytes", str(150 * MB)) as server:
        assert infer(server.http, "other", [1.0]).ok
        server.wait_for(lambda: len(server.workers()) == 1)
        (before,) = server.workers()
        outcomes = []
        client = threading.Thread(target=lambda: outcomes.append(infer(server.http, "slow", [3.0])))
        client.start()
        (worker,) = wait_for(lambda: [one for one in server.workers() if one.pid != before.pid])
        time.sleep(0.6)
        worker.kill()
        client.join(30)
        assert [one.values for one in outcomes] == [[3.0]]
        assert infer(server.http, "other", [2.0]).values == [2.0]


def test_a_model_that_crashes_whenever_it_comes_in_refuses_its_requests_and_nobody_elses(tmp_path):
    flag = tmp_path / "crash"
    code = LEAKY.replace(
        "self.kept = []", f"self.kept = [b'x' * {60 * MB}]\n            if os.path.exists({str(flag)!r}): os._exit(3)"
    )
    python_model(tmp_path / "models", "crashing", code)
    python_model(tmp_path / "models", "other", code.replace(str(flag), str(flag) + "-never"))
    with RunningServer(tmp_path / "models", "--resident-bytes", str(150 * MB)) as server:
        assert infer(server.http, "other", [1.0]).ok
        flag.touch()
        outcome = infer(server.http, "crashing", [1.0])
        assert outcome.status == 503
        assert "the worker died while it loaded the model: exit status 3" in outcome.detail
        assert infer(server.http, "other", [1.0]).ok
        flag.unlink()
        wait_for(lambda: infer(server.http, "crashing", [4.0]).values == [4.0], 60)


TWO_OF_WHICH_ONE_FAILS = """
    import os
    import time
    from pathlib import Path

    class Model:
        inputs = [{"name": "x", "datatype": "FP32", "shape": [-1, -1]}]
        outputs = [{"name": "y", "datatype": "FP32", "shape": [-1, -1]}]

        def load(self, context):
            self.kept = b"x" * %d
            folder = Path(%r)
            if not (folder / "fail").exists():
                return
            try:
                os.close(os.open(folder / "first", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                while not (folder / "runs").exists():
                    time.sleep(0.01)
                (folder / "failed").touch()
                raise RuntimeError("not today")

        def infer(self, inputs):
            folder = Path(%r)
            (folder / "runs").touch()
            while (folder / "fail").exists() and not (folder / "failed").exists():
                time.sleep(0.01)
            time.sleep(1)  # by then the server knows
            return {"y": inputs["x"]}
"""


def test_what_one_instance_has_taken_is_answered_though_the_other_cannot_come(tmp_path):
    code = TWO_OF_WHICH_ONE_FAILS % (60 * MB, str(tmp_path), str(tmp_path))
    python_model(tmp_path / "models", "pair", code, config="instances: [{count: 2}]")
    fake_model(tmp_path / "models", "other", "parameters: {fake_memory_mb: 120}")
    with RunningServer(tmp_path / "models", "--resident-bytes", str(260 * MB)) as server:
        assert infer(server.http, "other", [1.0]).ok
        server.wait_for(lambda: server.metric("headrace_model_resident", model="pair") == 0)
        (tmp_path / "fail").touch()
        outcome = infer(server.http, "pair", [5.0])
        assert outcome.values == [5.0]
        refused = infer(server.http, "pair", [5.0])
        assert refused.status == 503
        assert "not today" in refused.detail
        server.wait_for(lambda: server.metric("headrace_model_resident", model="pair") == 0)
        server.wait_for(lambda: server.metric("headrace_resident_models") == 0)
        (tmp_path / "fail").unlink()
        wait_for(lambda: infer(server.http, "pair", [6.0]).values == [6.0], 60)

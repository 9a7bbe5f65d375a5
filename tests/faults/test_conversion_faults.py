"""Conversions that crash, hang with their worker, or are asked for twice at once."""

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import joblib
import numpy as np
import psutil
import pytest

pytest.importorskip("skl2onnx", reason="skl2onnx is not installed: pip install 'headrace[sklearn]'")

from running_server import RunningServer
from sklearn.linear_model import LinearRegression

X = np.arange(12.0).reshape(6, 2)
LOADER = """
import sys
from pathlib import Path
from headrace_backends.base import ModelSource
from headrace_backends.importers.backend import SklearnBackend
given = {"allow_pickle": True, "conversion_cache": sys.argv[2]}
SklearnBackend.load(ModelSource("m", "1", Path(sys.argv[1]), parameters=given))
print("loaded", flush=True)
"""


class Does:
    """Pickled, it is what the expression gives where it is opened."""

    def __init__(self, expression):
        self.expression = expression

    def __reduce__(self):
        return eval, (self.expression,)


def model_that(folder, expression):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.pkl").write_bytes(pickle.dumps(Does(expression)))
    return folder / "model.pkl"


def loader(path, cache):
    command = [sys.executable, "-c", LOADER, str(path), str(cache)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "waited two minutes in vain"
        time.sleep(0.02)


def test_a_converter_that_crashes_is_a_reason_and_no_worker_dies(tmp_path):
    for name, expression in (
        ("killed", "__import__('os').kill(__import__('os').getpid(), 11)"),
        ("exits", "(print('so it goes'), __import__('os')._exit(3))"),
    ):
        model_that(tmp_path / f"repository/{name}/1", expression)
        (tmp_path / f"repository/{name}/config.yaml").write_text("parameters: {allow_pickle: true}")
    with RunningServer(tmp_path / "repository", env={"XDG_CACHE_HOME": str(tmp_path / "cache")}) as server:
        status, index = server.post("/v2/repository/index", {})
        assert status == 200
        told = {one["name"]: (one["state"], one["reason"]) for one in index}
        assert told["killed"][0] == told["exits"][0] == "UNAVAILABLE"
        assert "the process that converts 'model.pkl' was killed by SIGSEGV" in told["killed"][1]
        assert "ended with status 3" in told["exits"][1]
        assert "worker" not in told["killed"][1]
        kept = list((tmp_path / "cache/headrace/conversions").iterdir())
        assert {path.suffix for path in kept} == {".lock"}


def test_a_worker_that_is_killed_takes_its_conversion_along_and_leaves_nothing_half(tmp_path):
    pid_file, cache = tmp_path / "pid", tmp_path / "cache"
    joblib.dump(LinearRegression().fit(X, X[:, 0]), tmp_path / "good.joblib")
    hangs = f"(open({str(pid_file)!r}, 'w').write(str(__import__('os').getpid())), __import__('time').sleep(999))"
    path = model_that(tmp_path / "hangs", hangs)
    worker = loader(path, cache)
    try:
        wait_for(lambda: pid_file.exists() and pid_file.read_text())
        converting = psutil.Process(int(pid_file.read_text()))
        assert converting.ppid() == worker.pid
        os.kill(worker.pid, signal.SIGKILL)
        wait_for(lambda: not converting.is_running() or converting.status() == psutil.STATUS_ZOMBIE)
    finally:
        worker.kill()
        worker.communicate()
    assert [path for path in cache.glob("*/model.onnx") if not path.parent.name.startswith(".new-")] == []
    again = loader(tmp_path / "good.joblib", cache)
    told, errors = again.communicate(timeout=120)
    assert told == "loaded\n", errors
    assert len(list(cache.glob("*/model.onnx"))) == 1


def test_two_workers_that_come_at_once_convert_once(tmp_path):
    log, cache = tmp_path / "log", tmp_path / "cache"
    joblib.dump(LinearRegression().fit(X, X[:, 0]), tmp_path / "good.joblib")
    opened = f"open({str(log)!r}, 'a').write('x')"
    path = model_that(tmp_path / "m", f"({opened}, __import__('joblib').load({str(tmp_path / 'good.joblib')!r}))[1]")
    workers = [loader(path, cache) for _ in range(2)]
    for worker in workers:
        told, errors = worker.communicate(timeout=120)
        assert told == "loaded\n", errors
    assert Path(log).read_text() == "x"
    assert len(list(cache.glob("*/model.onnx"))) == 1

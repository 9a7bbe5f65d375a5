"""Models on made-up GPUs: who sees which of them, and who has room there. The driver and NVML are the tests' own."""

import os
import textwrap

import pytest
from fake_libcuda import make_libcuda
from running_server import RunningServer
from system.load import fake_model, infer

UUIDS = [f"GPU-{digits * 4}-{digits * 2}-{digits * 2}-{digits * 2}-{digits * 6}" for digits in ("28", "29")]
LIMIT_MIB = 100

# A process's memory on a GPU is its memory on the host: that is what a fake model can take.
NVML = """
import os
from types import SimpleNamespace

class NVMLError(Exception):
    pass

def nvmlInit():
    pass

def nvmlDeviceGetCount():
    return 0

def nvmlDeviceGetHandleByUUID(uuid):
    return uuid

def nvmlDeviceGetMemoryInfo(handle):
    return SimpleNamespace(used=0)

def nvmlDeviceGetComputeRunningProcesses(handle):
    pages = int(open("/proc/self/statm").read().split()[1])
    return [SimpleNamespace(pid=os.getpid(), usedGpuMemory=pages * os.sysconf("SC_PAGE_SIZE"))]
"""


def on_gpu(repository, name, device, mib, parameters=""):
    fake_model(
        repository,
        name,
        f"""
        instances: [{{device: "{device}", gpu_memory_bytes: {mib << 20}}}]
        parameters: {{{parameters}}}
        """,
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    libraries = tmp_path_factory.mktemp("libraries")
    make_libcuda(libraries)
    (libraries / "pynvml.py").write_text(textwrap.dedent(NVML))
    environment = {
        "LD_LIBRARY_PATH": str(libraries),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(libraries), os.environ.get("PYTHONPATH")])),
    }
    environment |= {"CUDA_VISIBLE_DEVICES": ",".join(UUIDS)}
    repository = tmp_path_factory.mktemp("repository")
    flags = ["--gpu-memory-bytes", str(LIMIT_MIB << 20), "--model-control", "explicit"]
    with RunningServer(repository, *flags, env=environment) as running:
        yield running


def load(server, name):
    status, answer = server.post(f"/v2/repository/models/{name}/load")
    return "" if status == 200 else answer["error"]


def unload(server, *names):
    for name in names:
        assert server.post(f"/v2/repository/models/{name}/unload")[0] == 200
    server.wait_for(lambda: not any(server.model_ready(name) for name in names))


def test_a_gpu_named_by_its_uuid_is_all_that_its_worker_sees(server):
    on_gpu(server.repository, "by_uuid", f"gpu:{UUIDS[1]}", 10)
    before = {worker.pid for worker in server.workers()}
    assert load(server, "by_uuid") == ""
    assert infer(server.http, "by_uuid", [1.0]).values == [1.0]
    shown = [worker.environ()["CUDA_VISIBLE_DEVICES"] for worker in server.workers() if worker.pid not in before]
    assert shown == [UUIDS[1]]
    on_gpu(server.repository, "foreign", "gpu:GPU-77777777-7777-7777-7777-777777777777", 10)
    assert "is not among the GPUs that this server may use: CUDA_VISIBLE_DEVICES is" in load(server, "foreign")
    unload(server, "by_uuid")


def test_a_gpu_has_one_room_under_all_its_names_and_a_worker_that_dies_keeps_its_own(server):
    on_gpu(server.repository, "first", "gpu:0", 60)
    on_gpu(server.repository, "second", f"gpu:{UUIDS[0]}", 60)
    before = {worker.pid for worker in server.workers()}
    assert load(server, "first") == ""
    reason = load(server, "second")
    assert f"model 'second' needs about 60 MiB of the memory of gpu:{UUIDS[0]} (Fake 40), and 40 MiB are free" in reason
    assert "'first' has 60 MiB" in reason
    for worker in server.workers():
        if worker.pid not in before:
            worker.kill()
    assert "'first' has 60 MiB" in load(server, "second")
    server.wait_for(lambda: infer(server.http, "first", [2.0]).status == 200)
    unload(server, "first")
    assert load(server, "second") == ""
    unload(server, "second")


def test_what_a_load_takes_is_measured(server):
    on_gpu(server.repository, "grows", "gpu:0", 1, "fake_memory_mb: 80")
    on_gpu(server.repository, "too_large", "gpu:1", 1, "fake_memory_mb: 130")
    on_gpu(server.repository, "late", "gpu:0", 30)
    assert load(server, "grows") == ""
    assert "'grows' has 8" in load(server, "late")
    assert "model 'too_large' takes 13" in load(server, "too_large")
    assert infer(server.http, "grows", [3.0]).values == [3.0]
    unload(server, "grows")

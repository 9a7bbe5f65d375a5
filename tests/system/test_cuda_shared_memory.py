"""CUDA shared memory through tritonclient over both protocols: a libcuda of our own, and all else as it is."""

import base64
import json
import queue
import threading
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import tritonclient.grpc
import tritonclient.http
from fake_libcuda import LentFile, make_libcuda
from running_server import RunningServer
from system.load import onnx_model, python_model
from tritonclient.utils import InferenceServerException

GPU = 1  # of the two that there are, the one that works
MODULES = {"http": tritonclient.http, "grpc": tritonclient.grpc}
STATUS = {
    "http": {"INVALID": "400", "NOT_FOUND": "404", "UNSUPPORTED": "501", "NOT_READY": "503"},
    "grpc": {
        "INVALID": "StatusCode.INVALID_ARGUMENT",
        "NOT_FOUND": "StatusCode.NOT_FOUND",
        "UNSUPPORTED": "StatusCode.UNIMPLEMENTED",
        "NOT_READY": "StatusCode.UNAVAILABLE",
    },
}
HAS_ENDED = "the process that holds clients' GPU memory has ended"
X = np.array([[1.5, -2, 3]], np.float32)

# Says that it has begun, and waits until it may go on.
WAITING = """
    import time
    from pathlib import Path


    class Model:
        inputs = [{"name": "x", "datatype": "FP32", "shape": [-1, -1]}]
        outputs = [{"name": "y", "datatype": "FP32", "shape": [-1, -1]}]

        def infer(self, inputs):
            Path("FOLDER/begun").touch()
            while not Path("FOLDER/go").exists():
                time.sleep(0.01)
            return {"y": inputs["x"]}
"""
COUNTING = """
    class Model:
        inputs = [{"name": "x", "datatype": "FP32", "shape": [-1, -1]}]
        outputs = [{"name": "y", "datatype": "FP32", "shape": [-1, -1]}]
        decoupled = True

        def infer(self, inputs):
            for number in range(1, 4):
                yield {"y": inputs["x"] * number}
"""


class Client:
    """One of the two clients, for one server."""

    def __init__(self, name, server):
        self.name = name
        self.server = server
        self.module = MODULES[name]
        self.real = self.module.InferenceServerClient(server.http if name == "http" else server.grpc)

    def register(self, name, memory, byte_size=None, device=GPU):

        raw_handle = base64.b64encode(memory.handle)
        self.real.register_cuda_shared_memory(name, raw_handle, device, byte_size or memory.byte_size)

    def regions(self, name=""):
        found = self.real.get_cuda_shared_memory_status(name)
        if self.name == "http":
            return {one["name"]: (one["device_id"], one["byte_size"]) for one in found}
        return {name: (one.device_id, one.byte_size) for name, one in found.regions.items()}

    def given(self, region="", byte_size=X.nbytes, offset=0):
        x = self.module.InferInput("x", list(X.shape), "FP32")
        return x.set_shared_memory(region, byte_size, offset=offset) if region else x.set_data_from_numpy(X)

    def wanted(self, region, byte_size=X.nbytes, offset=0):
        y = self.module.InferRequestedOutput("y")
        y.set_shared_memory(region, byte_size, offset=offset)
        return y

    def infer(self, given, wanted=None, model="plus_one"):
        return self.real.infer(model, [given], outputs=None if wanted is None else [wanted])

    def parameters(self, result):
        output = result.get_output("y")
        if self.name == "http":
            assert "data" not in output
            return output["parameters"]
        return {key: getattr(one, one.WhichOneof("parameter_choice")) for key, one in output.parameters.items()}

    def refused(self, kind, call):
        with pytest.raises(InferenceServerException) as caught:
            call()
        assert caught.value.status() == STATUS[self.name][kind], caught.value
        return str(caught.value.message())

    def still_serves(self):
        np.testing.assert_array_equal(self.infer(self.given()).as_numpy("y"), X + 1)


@pytest.fixture(scope="module")
def driver_says(tmp_path_factory):
    """The file that has the status of one of the driver's calls."""
    return tmp_path_factory.mktemp("driver") / "says"


@pytest.fixture(scope="module")
def server(tmp_path_factory, driver_says):
    libraries = tmp_path_factory.mktemp("libraries")
    make_libcuda(libraries)
    repository = tmp_path_factory.mktemp("repository")
    onnx_model(repository, "plus_one")
    python_model(repository, "waiting", WAITING.replace("FOLDER", str(repository.parent)))
    python_model(repository, "counting", COUNTING)
    environment = {"LD_LIBRARY_PATH": str(libraries), "FAKE_CUDA": f"@{driver_says}"}
    with RunningServer(repository, "--allow-client-shm", env=environment) as running:
        assert holders(running) == []
        yield running


@pytest.fixture(params=MODULES)
def client(request, server, driver_says):
    driver_says.unlink(missing_ok=True)
    made = Client(request.param, server)
    yield made
    driver_says.unlink(missing_ok=True)
    made.real.unregister_cuda_shared_memory()
    made.still_serves()
    made.real.close()


@pytest.fixture
def memory():
    with LentFile(64) as lent:
        yield lent


def holders(server):
    """The processes that hold the memory of GPUs."""
    found = []
    for process in server.workers():
        try:
            if "headrace.cuda_memory.copier" in process.cmdline():
                found.append(process)
        except psutil.Error:  # it has ended meanwhile
            continue
    return found


def maps_libcuda(process):
    return "libcuda.so" in Path(f"/proc/{process.pid}/maps").read_text()


def test_one_process_alone_uses_the_driver(client, server, memory):
    client.register("a", memory)
    client.register("b", memory)
    (holder,) = holders(server)
    assert maps_libcuda(holder)
    assert not maps_libcuda(psutil.Process(server.process.pid))


def test_regions_come_and_go(client, memory):
    assert client.regions() == {}
    client.register("a", memory)
    client.register("b", memory, byte_size=10)
    assert client.regions() == {"a": (GPU, 64), "b": (GPU, 10)}
    assert client.regions("b") == {"b": (GPU, 10)}
    assert "already in manager" in client.refused("INVALID", lambda: client.register("a", memory))
    system = partial(client.real.register_system_shared_memory, "a", memory.path.name, 64)
    assert "already in manager" in client.refused("INVALID", system)
    client.real.unregister_cuda_shared_memory("a")
    client.real.unregister_cuda_shared_memory("a")
    assert "'a'" in client.refused("NOT_FOUND", lambda: client.regions("a"))
    client.real.unregister_cuda_shared_memory()
    assert client.regions() == {}


def test_a_request_goes_through_memory_of_a_gpu_alone(client, memory):
    with LentFile(100) as other:
        client.register("in", memory)
        client.register("out", other)
        for number in range(5):
            memory.write(8, (X * number).tobytes())
            result = client.infer(client.given("in", offset=8), client.wanted("out", 50, offset=40))
            assert client.parameters(result) == {
                "shared_memory_region": "out",
                "shared_memory_byte_size": X.nbytes,
                "shared_memory_offset": 40,
            }
            assert other.read(0, 100) == bytes(40) + (X * number + 1).tobytes() + bytes(48)


def test_memory_of_both_kinds_and_messages_may_be_mixed(client, memory):
    with LentFile(64) as system:
        client.real.register_system_shared_memory("system", system.path.name, 64)
        client.register("cuda", memory)
        try:
            system.write(0, X.tobytes())
            client.infer(client.given("system"), client.wanted("cuda"))
            assert memory.read(0, 12) == (X + 1).tobytes()
            client.infer(client.given("cuda"), client.wanted("system", offset=20))
            assert system.read(20, 12) == (X + 2).tobytes()
            np.testing.assert_array_equal(client.infer(client.given("cuda")).as_numpy("y"), X + 2)
            client.infer(client.given(), client.wanted("cuda", offset=30))
            assert memory.read(30, 12) == (X + 1).tobytes()
        finally:
            client.real.unregister_system_shared_memory("system")


def test_large_tensors_pass(client):
    rows = np.arange(3_000_000, dtype=np.float32).reshape(1, -1)
    with LentFile(2 * rows.nbytes) as memory:
        memory.write(0, rows.tobytes())
        client.register("r", memory)
        x = client.module.InferInput("x", list(rows.shape), "FP32").set_shared_memory("r", rows.nbytes)
        client.infer(x, client.wanted("r", rows.nbytes, rows.nbytes))
        received = np.frombuffer(memory.read(rows.nbytes, rows.nbytes), np.float32)
    np.testing.assert_array_equal(received, rows[0] + 1)


def stream(client, requests):
    """What comes back on one stream for (model, input, output) each."""
    answers = queue.Queue()
    client.real.start_stream(lambda result, error: answers.put(error or result))
    for model, given, wanted in requests:
        client.real.async_stream_infer(model, [given], outputs=[wanted], enable_empty_final_response=True)
    client.real.stop_stream()
    return [answers.get_nowait() for _ in range(answers.qsize())]


@pytest.mark.parametrize("client", ["grpc"], indirect=True)
def test_streams_have_their_tensors_there_too(client, memory):
    client.register("r", memory)
    memory.write(0, X.tobytes())
    requests = [
        ("plus_one", client.given("r"), client.wanted("r", offset=12)),
        ("plus_one", client.given("r"), client.wanted("r", offset=60)),
        ("counting", client.given("r"), client.wanted("r", offset=24)),
    ]
    answers = stream(client, requests)
    errors = [one for one in answers if isinstance(one, InferenceServerException)]
    assert len(answers) == 1 + 1 + 4  # three responses, and an empty one that says that they were all
    assert "output 'y': shared memory region 'r' has 64 bytes" in str(errors[0].message())
    assert memory.read(12, 24) == (X + 1).tobytes() + (X * 3).tobytes()


@pytest.mark.parametrize("client", ["http"], indirect=True)
def test_the_inputs_of_event_streams_may_be_there(client, server, memory):
    client.register("r", memory)
    memory.write(0, X.tobytes())
    place = {"shared_memory_region": "r", "shared_memory_byte_size": X.nbytes}
    x = {"name": "x", "datatype": "FP32", "shape": list(X.shape), "parameters": place}
    status, _, body = server.request("POST", "/v2/models/counting/infer_stream", {"inputs": [x]})
    events = [json.loads(line.removeprefix(b"data: ")) for line in body.splitlines() if line]
    assert status == 200
    assert [event["outputs"][0]["data"] for event in events] == [(X * n).ravel().tolist() for n in (1, 2, 3)]


@pytest.mark.parametrize(
    ("region", "byte_size", "offset", "kind", "said"),
    [
        ("nobody", 12, 0, "NOT_FOUND", "region: 'nobody' is not registered"),
        ("r", 65, 0, "INVALID", "region 'r' has 64 bytes"),
        ("r", 12, 53, "INVALID", "region 'r' has 64 bytes"),
        ("r", 12, 2**62, "INVALID", "region 'r' has 64 bytes"),
        ("r", 11, 0, "INVALID", ""),
    ],
)
@pytest.mark.parametrize("of", ["input", "output"])
def test_a_tensor_has_its_place_in_a_region(client, memory, of, region, byte_size, offset, kind, said):
    client.register("r", memory)
    if of == "input":
        given, wanted = client.given(region, byte_size, offset), None
    else:
        given, wanted = client.given(), client.wanted(region, byte_size, offset)
    message = client.refused(kind, lambda: client.infer(given, wanted))
    assert said in message
    assert f"model 'plus_one': {of} '{'x' if of == 'input' else 'y'}'" in message
    assert memory.read(0, 64) == bytes(64)


@pytest.mark.parametrize(
    ("status", "device", "byte_size", "kind", "said"),
    [
        ("", 5, 64, "INVALID", "device 'gpu:5' is not here; the driver sees gpu:0 Fake 40, gpu:1 Fake 41"),
        ("", 0, 64, "INVALID", "cuCtxSetCurrent says error (1)"),
        ("", GPU, 65, "INVALID", "byte_size is 65, and the handle stands for 64 bytes"),
        ("cuIpcOpenMemHandle_v2=201", GPU, 64, "INVALID", "cuIpcOpenMemHandle_v2 says error (201)"),
        ("cuIpcOpenMemHandle_v2=46", GPU, 64, "NOT_READY", "CUDA_ERROR_DEVICE_UNAVAILABLE"),
    ],
)
def test_what_cannot_be_registered_is_refused(client, memory, driver_says, status, device, byte_size, kind, said):
    driver_says.write_text(status)
    message = client.refused(kind, lambda: client.register("r", memory, byte_size, device))
    assert "cannot register shared memory region 'r': " in message
    assert said in message
    assert client.regions() == {}
    driver_says.write_text("")
    client.register("r", memory)


def test_a_driver_that_does_not_work_is_told(client, server, memory, driver_says):
    ends = server.output.count(HAS_ENDED)
    for holder in holders(server):  # which has it loaded
        holder.kill()
        server.wait_for(lambda: server.output.count(HAS_ENDED) > ends)
    driver_says.write_text("cuInit=100")
    message = client.refused("UNSUPPORTED", lambda: client.register("r", memory))
    assert "the NVIDIA driver does not work here: cuInit says CUDA_ERROR_NO_DEVICE (100)" in message
    driver_says.write_text("")
    client.register("r", memory)


@pytest.mark.parametrize("direction", ["DtoH", "HtoD"])
def test_a_copy_that_fails_is_one_request_s(client, memory, driver_says, direction):
    client.register("r", memory)
    driver_says.write_text(f"cuMemcpy{direction}Async_v2=1")
    given, wanted = (client.given("r"), None) if direction == "DtoH" else (client.given(), client.wanted("r"))
    message = client.refused("INVALID", lambda: client.infer(given, wanted))
    assert f"shared memory region 'r' cannot be {'read' if direction == 'DtoH' else 'written'}: cuMemcpy" in message
    driver_says.write_text("")
    client.infer(given, wanted)


def test_a_gpu_that_is_lost_takes_the_regions_and_nothing_else(client, server, memory, driver_says):
    client.register("r", memory)
    (holder,) = holders(server)
    driver_says.write_text("cuMemcpyDtoHAsync_v2=700")
    message = client.refused("NOT_READY", lambda: client.infer(client.given("r")))
    assert "model 'plus_one': input 'x': shared memory region 'r' cannot be read" in message
    assert "CUDA_ERROR_ILLEGAL_ADDRESS (700)" in message
    server.wait_for(lambda: holder not in holders(server))
    message = gone(client)
    assert "'r' is gone, because the process that held it ended: the GPU is lost to this process" in message
    assert client.regions() == {}
    client.still_serves()
    driver_says.write_text("")
    client.register("r", memory)
    client.infer(client.given("r"), client.wanted("r"))


def gone(client):
    """What a request is told that names the region, once it is gone."""
    try:
        client.infer(client.given(), client.wanted("r"))
    except InferenceServerException as error:
        return str(error.message())
    return ""


@pytest.mark.parametrize("how", ["shortened", "killed"])
def test_the_process_that_holds_the_memory_may_end(client, server, memory, how):
    client.register("r", memory)
    (holder,) = holders(server)
    if how == "killed":
        holder.kill()
    else:
        memory.path.write_bytes(b"")  # of the fake driver's memory that is a SIGBUS for whoever touches it
        client.refused("NOT_READY", lambda: client.infer(client.given("r")))
    message = server.wait_for(lambda: gone(client))
    assert f"ended: signal {'SIGKILL' if how == 'killed' else 'SIGBUS'}" in message
    memory.path.write_bytes(bytes(64))
    client.register("r", memory)
    client.infer(client.given("r"), client.wanted("r"))


def test_a_region_may_be_unregistered_while_it_is_in_use(client, server, memory):
    folder = server.repository.parent
    client.register("r", memory)
    errors = []

    def ask():
        mine = Client(client.name, server)
        try:
            mine.infer(mine.given("r"), mine.wanted("r", offset=30), "waiting")
        except InferenceServerException as error:
            errors.append(error)
        mine.real.close()

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        server.wait_for((folder / "begun").exists)
        client.real.unregister_cuda_shared_memory("r")
    finally:
        (folder / "go").touch()
        asking.join()
        for name in ("begun", "go"):
            (folder / name).unlink(missing_ok=True)
    (error,) = errors
    assert error.status() == STATUS[client.name]["NOT_FOUND"]
    assert "model 'waiting': output 'y': Unable to find shared memory region: 'r' is not registered" in str(error)
    assert memory.read(0, 64) == bytes(64)

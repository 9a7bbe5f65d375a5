"""Shared memory and classification, through tritonclient over both protocols."""

import base64
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import echo_repository
import ml_dtypes
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from running_server import RunningServer
from tritonclient.utils import InferenceServerException, serialize_byte_tensor
from tritonclient.utils import shared_memory as shm

MODULES: dict[str, ModuleType] = {"http": tritonclient.http, "grpc": tritonclient.grpc}
STATUS = {
    "http": {"INVALID": "400", "NOT_FOUND": "404", "UNSUPPORTED": "501"},
    "grpc": {
        "INVALID": "StatusCode.INVALID_ARGUMENT",
        "NOT_FOUND": "StatusCode.NOT_FOUND",
        "UNSUPPORTED": "StatusCode.UNIMPLEMENTED",
    },
}
ARRAYS = {
    "BOOL": np.array([[True, False, True]]),
    "UINT8": np.array([[0, 1, 255]], np.uint8),
    "INT64": np.array([[-(2**63), 0, 2**63 - 1]], np.int64),
    "FP16": np.array([[0.5, -65504, 1]], np.float16),
    "FP32": np.array([[0.1, -np.inf, 2]], np.float32),
    "FP64": np.array([[0.1, 5e-324, 3]], np.float64),
}
X = np.array([[1.5, -2, 3]], np.float32)


class Client:
    """One of the two clients, for one server."""

    def __init__(self, name: str, server: RunningServer) -> None:
        self.name = name
        self.module = MODULES[name]
        self.real = self.module.InferenceServerClient(server.http if name == "http" else server.grpc)

    def regions(self, name: str = "") -> list[dict[str, Any]]:
        """What the server says is registered."""
        if self.name == "http":
            return self.real.get_system_shared_memory_status(name)
        regions = self.real.get_system_shared_memory_status(name).regions
        return [
            {"name": one.name, "key": one.key, "offset": one.offset, "byte_size": one.byte_size}
            for _, one in sorted(regions.items())
        ]

    def input(self, name: str, shape: tuple[int, ...], datatype: str) -> Any:
        return self.module.InferInput(name, list(shape), datatype)

    def output(self, name: str, **how: Any) -> Any:
        return self.module.InferRequestedOutput(name, **how)

    def parameters(self, result: Any, name: str) -> dict[str, Any]:
        """What a response says of an output beside its data."""
        output = result.get_output(name)
        if self.name == "http":
            assert "data" not in output
            return output["parameters"]
        return {key: getattr(one, one.WhichOneof("parameter_choice")) for key, one in output.parameters.items()}

    def refuses(self, kind: str, call: Callable[[], Any]) -> str:
        """The message of the error that the server answers with."""
        with pytest.raises(InferenceServerException) as caught:
            call()
        assert caught.value.status() == STATUS[self.name][kind], caught.value
        return str(caught.value.message())


class Memory:
    """One object that the tests share with a server, registered under its own name; a context manager."""

    _numbers = itertools.count()

    def __init__(self, client: Client, byte_size: int, register: bool = True) -> None:
        self.name = f"region {next(self._numbers):04}"
        self.key = f"headrace-test-{os.getpid()}-{self.name.replace(' ', '-')}"
        self.path = Path("/dev/shm") / self.key
        self.byte_size = byte_size
        self._client = client
        self._register = register

    def __enter__(self) -> Self:
        self.handle = shm.create_shared_memory_region(self.name, self.key, self.byte_size, create_only=True)
        if self._register:
            self._client.real.register_system_shared_memory(self.name, f"/{self.key}", self.byte_size)
        return self

    def __exit__(self, *_: object) -> None:
        self._client.real.unregister_system_shared_memory(self.name)
        if not self.path.exists():
            self.path.touch()  # a test has unlinked it; the library wants to do so too
        shm.destroy_shared_memory_region(self.handle)


@pytest.fixture(scope="module")
def sharing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with whom memory can be shared."""
    repository = echo_repository.write_small(tmp_path_factory.mktemp("sharing"))
    echo_repository.onnx_echo(repository, "onnx_int32", "INT32", ["rows", 3])
    echo_repository.onnx_echo(repository, "onnx_bytes", "BYTES", ["rows", 3])
    echo_repository.onnx_echo(repository, "fixed", "FP32", [2, 3])
    with RunningServer(repository, "--allow-client-shm") as running:
        yield running


@pytest.fixture(params=MODULES)
def client(request: pytest.FixtureRequest, sharing: RunningServer) -> Iterator[Client]:
    made = Client(request.param, sharing)
    yield made
    assert made.regions() == []
    made.real.close()


def echo(client: Client, given: Any, wanted: Any = None) -> Any:
    """A request to the model that gives back what it gets."""
    return client.real.infer("onnx_fp32", [given], outputs=None if wanted is None else [wanted])


def still_serves(client: Client) -> None:
    given = client.input("x", X.shape, "FP32").set_data_from_numpy(X)
    np.testing.assert_array_equal(echo(client, given).as_numpy("y"), X)


def test_regions_come_and_go(client: Client):
    with Memory(client, 64) as first, Memory(client, 64, register=False) as second:
        client.real.register_system_shared_memory(second.name, second.key, 16, offset=32)
        expected = [
            {"name": first.name, "key": f"/{first.key}", "offset": 0, "byte_size": 64},
            {"name": second.name, "key": second.key, "offset": 32, "byte_size": 16},
        ]
        assert sorted(client.regions(), key=lambda one: one["name"]) == expected
        assert client.regions(second.name) == expected[1:]
        client.real.unregister_system_shared_memory(first.name)
        assert client.regions() == expected[1:]
        message = client.refuses("NOT_FOUND", lambda: client.regions(first.name))
        assert first.name in message
        client.real.unregister_system_shared_memory(first.name)  # once more is no error
        client.real.unregister_system_shared_memory()
        assert client.regions() == []


@pytest.mark.parametrize("datatype", ARRAYS)
def test_a_tensor_goes_through_memory_alone(client: Client, datatype: str):
    array = ARRAYS[datatype]
    with Memory(client, 256) as memory:
        shm.set_shared_memory_region(memory.handle, [array], offset=8)
        given = client.input(f"x_{datatype}", array.shape, datatype)
        given.set_shared_memory(memory.name, array.nbytes, offset=8)
        wanted = client.output(f"y_{datatype}")
        wanted.set_shared_memory(memory.name, 100, offset=128)
        result = client.real.infer("any", [given], outputs=[wanted])
        assert client.parameters(result, f"y_{datatype}") == {
            "shared_memory_region": memory.name,
            "shared_memory_byte_size": array.nbytes,
            "shared_memory_offset": 128,
        }
        received = shm.get_contents_as_numpy(memory.handle, array.dtype, array.shape, offset=128).copy()
    np.testing.assert_array_equal(received, array)


def test_bfloat16_goes_through_memory(client: Client):
    raw = np.array([1.0, -0.5, 3.0], ml_dtypes.bfloat16).tobytes()
    with Memory(client, 64) as memory:
        memory.handle._mpsm_handle.buf[:6] = raw
        given = client.input("x_BF16", (1, 3), "BF16")
        given.set_shared_memory(memory.name, 6)
        wanted = client.output("y_BF16")
        wanted.set_shared_memory(memory.name, 6, offset=32)
        client.real.infer("any", [given], outputs=[wanted])
        received = bytes(memory.handle._mpsm_handle.buf[32:38])
    assert np.frombuffer(received, ml_dtypes.bfloat16).tolist() == [1.0, -0.5, 3.0]


def test_bytes_are_in_memory_as_on_the_wire(client: Client):
    array = np.array([[b"", "caf\u00e9".encode(), b"a\0b"]], np.object_)
    packed = serialize_byte_tensor(array)
    size = len(packed.item())
    with Memory(client, 256) as memory:
        shm.set_shared_memory_region(memory.handle, [packed])
        given = client.input("x", array.shape, "BYTES")
        given.set_shared_memory(memory.name, size)
        wanted = client.output("y")
        wanted.set_shared_memory(memory.name, 128, offset=128)
        result = client.real.infer("onnx_bytes", [given], outputs=[wanted])
        assert client.parameters(result, "y")["shared_memory_byte_size"] == size
        received = shm.get_contents_as_numpy(memory.handle, np.object_, array.shape, offset=128)
    assert received.tolist() == array.tolist()


def test_memory_and_messages_may_be_mixed(client: Client):
    numbers = np.array([[1, 2], [3, 4]], np.int32)
    texts = np.array([[b"a"], [b""]], np.object_)
    with Memory(client, 64) as memory:
        shm.set_shared_memory_region(memory.handle, [numbers])
        inputs = [
            client.input("texts", (2, 1), "BYTES").set_data_from_numpy(texts),
            client.input("numbers", (2, 2), "INT32").set_shared_memory(memory.name, numbers.nbytes),
            client.input("offset", (2, 1), "INT32").set_data_from_numpy(np.array([[10], [20]], np.int32)),
        ]
        outputs = [client.output("texts_out"), client.output("sums"), client.output("numbers_out")]
        outputs[1].set_shared_memory(memory.name, 8, offset=32)
        result = client.real.infer("rows", inputs, outputs=outputs)
        np.testing.assert_array_equal(result.as_numpy("texts_out"), texts)
        np.testing.assert_array_equal(result.as_numpy("numbers_out"), numbers)
        received = shm.get_contents_as_numpy(memory.handle, np.int32, (2, 1), offset=32).copy()
    np.testing.assert_array_equal(received, [[13], [27]])


def test_each_request_reads_what_is_there_then(client: Client):
    with Memory(client, 64) as memory:
        given = client.input("x", (1, 3), "FP32").set_shared_memory(memory.name, 12)
        for number in range(5):
            array = np.full((1, 3), number, np.float32)
            shm.set_shared_memory_region(memory.handle, [array])
            np.testing.assert_array_equal(echo(client, given).as_numpy("y"), array)


@pytest.mark.parametrize(
    ("key", "byte_size", "offset"),
    [
        ("headrace-nobody-has-this", 4, 0),
        ("", 4, 0),
        ("/", 4, 0),
        ("../etc/passwd", 4, 0),
        ("/../../etc/passwd", 4, 0),
        ("a/b", 4, 0),
        ("..", 4, 0),
        ("{key}", 65, 0),
        ("{key}", 1, 64),
        ("{key}", 0, 0),
        ("{key}", 2**63 - 1, 2**63 - 1),
    ],
)
def test_what_cannot_be_registered_is_the_client_s_fault(client: Client, key: str, byte_size: int, offset: int):
    with Memory(client, 64, register=False) as memory:
        message = client.refuses(
            "INVALID",
            lambda: client.real.register_system_shared_memory(
                "r", key.format(key=memory.key), byte_size, offset=offset
            ),
        )
    assert "'r'" in message


def test_links_and_pipes_are_no_objects(client: Client):
    with Memory(client, 64, register=False) as memory:
        others = [memory.path.with_name(f"{memory.key}-{kind}") for kind in ("link", "pipe")]
        try:
            others[0].symlink_to(memory.path)
            os.mkfifo(others[1])
            for other in others:
                client.refuses(
                    "INVALID", lambda other=other: client.real.register_system_shared_memory("r", other.name, 4)
                )
        finally:
            for other in others:
                other.unlink(missing_ok=True)


def test_a_name_is_taken_once(client: Client):
    with Memory(client, 64) as memory:
        message = client.refuses(
            "INVALID", lambda: client.real.register_system_shared_memory(memory.name, memory.key, 64)
        )
        assert "already in manager" in message


@pytest.mark.parametrize(
    ("region", "byte_size", "offset", "kind"),
    [
        ("nobody", 12, 0, "NOT_FOUND"),
        ("{name}", 65, 0, "INVALID"),
        ("{name}", 12, 53, "INVALID"),
        ("{name}", 12, 2**62, "INVALID"),
        ("{name}", -12, 0, "INVALID"),
        ("{name}", 11, 0, "INVALID"),
    ],
)
@pytest.mark.parametrize("of", ["input", "output"])
def test_a_tensor_has_its_place_in_a_region(
    client: Client, of: str, region: str, byte_size: int, offset: int, kind: str
):
    with Memory(client, 64) as memory:
        given, wanted = client.input("x", X.shape, "FP32"), client.output("y")
        if of == "input":
            given.set_shared_memory(region.format(name=memory.name), byte_size, offset=offset)
        else:
            given.set_data_from_numpy(X)
            wanted.set_shared_memory(region.format(name=memory.name), byte_size, offset=offset)
        message = client.refuses(kind, lambda: echo(client, given, wanted))
        assert "onnx_fp32" in message
        assert f"{of} '{'x' if of == 'input' else 'y'}'" in message
        assert bytes(memory.handle._mpsm_handle.buf[:64]) == bytes(64)
    still_serves(client)


def test_an_object_may_be_shortened_at_any_time(client: Client):
    with Memory(client, 8192) as memory:
        given = client.input("x", X.shape, "FP32").set_shared_memory(memory.name, 12, offset=4096)
        wanted = client.output("y")
        wanted.set_shared_memory(memory.name, 12, offset=6000)
        echo(client, given, wanted)
        os.truncate(memory.path, 100)
        message = client.refuses("INVALID", lambda: echo(client, given))
        assert "shortened" in message
        direct = client.input("x", X.shape, "FP32").set_data_from_numpy(X)
        client.refuses("INVALID", lambda: echo(client, direct, wanted))
        assert memory.path.stat().st_size == 100
        still_serves(client)
        os.truncate(memory.path, 8192)
        echo(client, given, wanted)


def test_a_region_whose_object_is_unlinked_is_gone(client: Client):
    with Memory(client, 64) as memory:
        given = client.input("x", X.shape, "FP32").set_shared_memory(memory.name, 12)
        echo(client, given)
        memory.path.unlink()
        message = client.refuses("NOT_FOUND", lambda: echo(client, given))
        assert "unlinked" in message
        assert client.regions() == []


def test_memory_of_a_dead_owner_is_given_back_though_nobody_asks(client: Client, sharing: RunningServer):
    with Memory(client, 64) as memory:
        assert held_objects(sharing) == [memory.key]
        memory.path.unlink()
        assert sharing.wait_for(lambda: held_objects(sharing) == []) is True


def held_objects(server: RunningServer) -> list[str]:
    """The shared memory objects that the server process has open."""
    found = []
    for link in Path(f"/proc/{server.process.pid}/fd").iterdir():
        try:
            target = str(link.readlink())
        except FileNotFoundError:  # closed meanwhile
            continue
        if target.startswith("/dev/shm/headrace-test-"):
            found.append(Path(target).name.removesuffix(" (deleted)"))
    return found


def test_no_descriptor_is_left_behind(client: Client, sharing: RunningServer):
    with Memory(client, 64) as memory:
        for _ in range(20):
            client.real.unregister_system_shared_memory(memory.name)
            client.real.register_system_shared_memory(memory.name, memory.key, 64)
            client.refuses("INVALID", lambda: client.real.register_system_shared_memory("r", memory.key, 65))
    assert held_objects(sharing) == []


def test_regions_may_come_and_go_among_requests(sharing: RunningServer, client: Client):
    """Every answer is right, or says that the region is not there."""
    done = threading.Event()
    failures: list[str] = []
    answers = {"right": 0, "gone": 0}

    def ask(memory: Memory) -> None:
        mine = Client(client.name, sharing)
        given = mine.input("x", X.shape, "FP32").set_shared_memory(memory.name, 12)
        wanted = mine.output("y")
        wanted.set_shared_memory(memory.name, 12, offset=32)
        while not done.is_set():
            try:
                echo(mine, given, wanted)
            except InferenceServerException as error:
                answers["gone"] += 1
                if error.status() != STATUS[mine.name]["NOT_FOUND"]:
                    failures.append(str(error))
            else:
                answers["right"] += 1
                received = shm.get_contents_as_numpy(memory.handle, np.float32, X.shape, offset=32)
                if received.tolist() != X.tolist():
                    failures.append(str(received))
        mine.real.close()

    with Memory(client, 64) as memory:
        shm.set_shared_memory_region(memory.handle, [X])
        askers = [threading.Thread(target=ask, args=(memory,)) for _ in range(3)]
        for asker in askers:
            asker.start()
        try:
            for number in range(5000):
                client.real.unregister_system_shared_memory(memory.name)
                client.real.register_system_shared_memory(memory.name, memory.key, 64)
                if number > 100 and all(answers.values()):
                    break
        finally:
            done.set()
            for asker in askers:
                asker.join()
    assert failures == []
    assert all(answers.values()), answers
    still_serves(client)


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is an NVIDIA driver here")
def test_without_a_driver_there_is_no_memory_of_gpus(client: Client):
    handle = base64.b64encode(bytes(64))
    message = client.refuses(
        "UNSUPPORTED", lambda: client.real.register_cuda_shared_memory("r", handle, device_id=0, byte_size=4)
    )
    assert "cannot register shared memory region 'r': there is no NVIDIA driver here" in message
    metadata = client.real.get_server_metadata()
    extensions = metadata["extensions"] if client.name == "http" else metadata.extensions
    assert "system_shared_memory" in extensions
    assert "cuda_shared_memory" not in extensions
    status = client.real.get_cuda_shared_memory_status()
    assert (status if client.name == "http" else list(status.regions)) == []
    client.real.unregister_cuda_shared_memory("r")
    client.real.unregister_cuda_shared_memory()


@pytest.mark.parametrize("name", MODULES)
def test_without_leave_nothing_is_shared(server: RunningServer, name: str):
    client = Client(name, server)
    given = client.input("x", X.shape, "FP32").set_shared_memory("r", 12)
    direct = client.input("x", X.shape, "FP32").set_data_from_numpy(X)
    wanted = client.output("y")
    wanted.set_shared_memory("r", 12)
    for call in (
        lambda: client.real.register_system_shared_memory("r", "key", 4),
        lambda: client.real.register_cuda_shared_memory("r", base64.b64encode(bytes(64)), 0, 4),
        client.regions,
        lambda: client.regions("r"),
        lambda: client.real.unregister_system_shared_memory("r"),
        client.real.unregister_system_shared_memory,
        lambda: echo(client, given),
        lambda: echo(client, direct, wanted),
    ):
        assert "--allow-client-shm" in client.refuses("UNSUPPORTED", call)
    client.real.close()


def classified(client: Client, model: str, array: np.ndarray, datatype: str, count: int, **how: Any) -> Any:
    given = client.input("x", array.shape, datatype).set_data_from_numpy(array)
    wanted = client.output("y", class_count=count, **how)
    return client.real.infer(model, [given], outputs=[wanted]).as_numpy("y")


def test_each_row_is_classified(client: Client):
    array = np.array([[1.5, 7, -3], [2, 2, 1e6]], np.float32)
    expected = [[b"7.000000:1", b"1.500000:0"], [b"1000000.000000:2", b"2.000000:0"]]
    assert classified(client, "onnx_fp32", array, "FP32", 2).tolist() == expected
    assert classified(client, "onnx_fp32", array, "FP32", 100).shape == (2, 3)
    integers = np.array([[-5, 9, 0]], np.int32)
    assert classified(client, "onnx_int32", integers, "INT32", 2).tolist() == [[b"9:1", b"0:2"]]


def test_a_model_without_batches_is_classified_as_one(client: Client):
    array = np.array([[1, 2, 3], [6, 5, 4]], np.float32)
    assert classified(client, "fixed", array, "FP32", 2).tolist() == [b"6.000000:3", b"5.000000:4"]


def test_classes_are_strings_in_json(sharing: RunningServer):
    client = Client("http", sharing)
    got = classified(client, "onnx_fp32", X, "FP32", 2, binary_data=False)
    assert got.tolist() == [["3.000000:2", "1.500000:0"]]
    client.real.close()


def test_what_cannot_be_classified_is_the_client_s_fault(client: Client):
    texts = np.array([[b"a", b"b", b"c"]], np.object_)
    message = client.refuses("INVALID", lambda: classified(client, "onnx_bytes", texts, "BYTES", 1))
    assert "'y' is BYTES" in message
    message = client.refuses("INVALID", lambda: classified(client, "onnx_fp32", X, "FP32", -1))
    assert "classification -1" in message

"""Names, bounds and lives of CUDA shared memory, and the requests that use it; the copier is the test's own."""

import asyncio
import os
from types import SimpleNamespace

import pytest

import headrace.app
import headrace.cuda_memory.regions
from headrace.batching.response_stream import single_response
from headrace.client_memory import ClientMemory
from headrace.core.errors import HeadraceError, InvalidRequest, Kind, NotFound, NotReady, Overloaded, Unsupported
from headrace.core.request import InferRequest, InferResponse, Place, RequestedOutput
from headrace.core.tensor import DataType, Tensor
from headrace.cuda_memory import frames
from headrace.cuda_memory.regions import LARGE_BYTES, CudaRegion, CudaRegions
from headrace.frontends.device_tensors import DeviceTensors
from headrace.frontends.grpc_stream import StreamService
from headrace.shared_memory import MAX_NAME_CHARACTERS, SharedMemoryRegions
from headrace.wire import pb

HANDLE = bytes(range(64))


class MadeUpCopier:
    """Does at once what it is asked, on a bytearray for each region; ``hold`` has it wait, ``fail`` refuse."""

    def __init__(self):
        self.memory = {}
        self.handles = []
        self.fail = None
        self.hold = None
        self.turns = asyncio.Lock()
        self.ended = 0
        self.busy = False

    def ask(self, frame, descriptor=-1):
        return asyncio.shield(self._do(frame, descriptor))  # whoever asked may leave; it is done all the same

    async def _do(self, frame, descriptor):
        try:
            async with self.turns:
                if self.hold is not None:
                    await self.hold.wait()
            if self.fail is not None:
                raise self.fail
            match frame:
                case frames.Open():
                    self.memory[frame.region] = bytearray(frame.nbytes)
                    self.handles.append((frame.device, frame.handle))
                case frames.Close():
                    del self.memory[frame.region]
                case frames.Read():
                    os.pwrite(descriptor, self.memory[frame.region][frame.offset :][: frame.nbytes], 0)
                case frames.Write():
                    data = os.pread(descriptor, frame.nbytes, 0)
                    self.memory[frame.region][frame.offset : frame.offset + frame.nbytes] = data
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def end(self):
        self.ended += 1


def made(allowed=True, taken=lambda _: False):
    regions = CudaRegions(allowed, taken=taken)
    regions.copier = MadeUpCopier()
    return regions


@pytest.fixture
def regions():
    return made()


async def read(regions, *place):
    return bytes(await regions.read(Place(*place)))


async def test_regions_come_and_go(regions):
    await regions.register("a", HANDLE, 0, 10)
    await regions.register("b", HANDLE, 1, 20)
    assert regions.copier.handles == [(0, HANDLE), (1, HANDLE)]
    assert regions.status() == [CudaRegion("a", 0, 10), CudaRegion("b", 1, 20)]
    assert regions.status("b") == [CudaRegion("b", 1, 20)]
    await regions.unregister("a")
    await regions.unregister("a")
    with pytest.raises(NotFound, match="cuda shared memory region: 'a' is not registered"):
        regions.status("a")
    await regions.unregister()
    assert regions.status() == []
    assert regions.copier.memory == {}


async def test_bytes_are_written_and_read(regions):
    await regions.register("r", HANDLE, 0, LARGE_BYTES + 10)
    await regions.write(Place("r", 2, 8), memoryview(b"abc"))
    assert await read(regions, "r", 0, 6) == b"\0\0abc\0"
    large = os.urandom(LARGE_BYTES)
    await regions.write(Place("r", 10, LARGE_BYTES), large)
    assert await read(regions, "r", 10, LARGE_BYTES) == large
    await regions.write(Place("r", 0, 0), b"")
    assert await read(regions, "r", LARGE_BYTES + 10, 0) == b""


@pytest.mark.parametrize(("offset", "byte_size"), [(0, 11), (10, 1), (11, 0), (-1, 2), (3, -1), (2**63, 1), (0, 2**63)])
async def test_a_tensor_lies_within_its_region(regions, offset, byte_size):
    await regions.register("r", HANDLE, 0, 10)
    said = f"region 'r' has 10 bytes, which shared_memory_offset {offset}"
    with pytest.raises(InvalidRequest, match=said):
        regions.check("r", offset, byte_size)
    with pytest.raises(InvalidRequest, match=said):
        await read(regions, "r", offset, byte_size)
    with pytest.raises(InvalidRequest, match=said):
        await regions.write(Place("r", offset, byte_size), b"")


async def test_data_longer_than_its_place_is_not_written(regions):
    await regions.register("r", HANDLE, 0, 10)
    with pytest.raises(InvalidRequest, match="4 bytes are needed, and shared_memory_byte_size gives 3"):
        await regions.write(Place("r", 0, 3), b"abcd")
    assert await read(regions, "r", 0, 10) == bytes(10)


@pytest.mark.parametrize(
    ("name", "handle", "device_id", "byte_size", "said"),
    [
        ("r", bytes(63), 0, 1, "raw_handle has 63 bytes, expected 64"),
        ("r", b"", 0, 1, "raw_handle has 0 bytes, expected 64"),
        ("r", HANDLE, -1, 1, "device_id is -1"),
        ("r", HANDLE, 2**31, 1, "device_id is 2147483648"),
        ("r", HANDLE, 0, 0, "byte_size 0"),
        ("r", HANDLE, 0, -1, "byte_size -1"),
        ("r", HANDLE, 0, 2**64, "byte_size 18446744073709551616"),
        ("", HANDLE, 0, 1, "has 0 characters"),
        ("x" * (MAX_NAME_CHARACTERS + 1), HANDLE, 0, 1, "characters, expected 1 to"),
    ],
)
async def test_what_cannot_be_registered_is_not_asked_for(regions, name, handle, device_id, byte_size, said):
    with pytest.raises(InvalidRequest, match=said):
        await regions.register(name, handle, device_id, byte_size)
    assert regions.copier.handles == []


async def test_a_name_is_taken_once_among_both_kinds(tmp_path):
    (tmp_path / "object").write_bytes(bytes(4))
    cuda = made(taken=lambda name: name in system)
    system = SharedMemoryRegions(True, tmp_path, taken=cuda.holds)
    cuda.copier.hold = asyncio.Event()
    system.register("system", "object", 0, 4)
    opening = asyncio.ensure_future(cuda.register("cuda", HANDLE, 0, 4))
    await asyncio.sleep(0)
    with pytest.raises(InvalidRequest, match="already in manager"):
        await cuda.register("cuda", HANDLE, 0, 4)
    with pytest.raises(InvalidRequest, match="already in manager"):
        system.register("cuda", "object", 0, 4)
    with pytest.raises(InvalidRequest, match="already in manager"):
        await cuda.register("system", HANDLE, 0, 4)
    with pytest.raises(NotFound):
        cuda.check("cuda", 0, 1)  # it is not open yet
    cuda.copier.hold.set()
    await opening
    with pytest.raises(InvalidRequest, match="already in manager"):
        await cuda.register("cuda", HANDLE, 0, 4)
    system.unregister()


async def test_the_number_of_regions_is_bounded(regions, monkeypatch):
    monkeypatch.setattr(headrace.cuda_memory.regions, "MAX_REGIONS", 2)
    await regions.register("a", HANDLE, 0, 4)
    await regions.register("b", HANDLE, 0, 4)
    with pytest.raises(Overloaded, match="region 'c': 2 regions are registered"):
        await regions.register("c", HANDLE, 0, 4)


async def test_a_refusal_says_what_and_why(regions):
    regions.copier.fail = Unsupported("there is no driver")
    with pytest.raises(Unsupported, match="cannot register shared memory region 'r': there is no driver"):
        await regions.register("r", HANDLE, 0, 4)
    regions.copier.fail = None
    await regions.register("r", HANDLE, 0, 4)
    regions.copier.fail = InvalidRequest("it is broken")
    with pytest.raises(InvalidRequest, match="shared memory region 'r' cannot be read: it is broken"):
        await read(regions, "r", 0, 1)
    with pytest.raises(InvalidRequest, match="shared memory region 'r' cannot be written: it is broken"):
        await regions.write(Place("r", 0, 1), b"a")
    await regions.unregister("r")  # forgotten, though it could not be closed
    assert regions.status() == []


async def test_without_leave_there_is_none():
    regions = made(allowed=False)
    with pytest.raises(Unsupported, match="--allow-client-shm"):
        await regions.register("r", HANDLE, 0, 4)
    assert regions.status() == []
    await regions.unregister("r")
    await regions.unregister()


async def test_a_client_that_leaves_while_it_registers_leaves_nothing(regions):
    regions.copier.hold = asyncio.Event()
    opening = asyncio.ensure_future(regions.register("r", HANDLE, 0, 4))
    await asyncio.sleep(0)
    opening.cancel()
    await asyncio.sleep(0)
    regions.copier.hold.set()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert regions.copier.memory == {}
    await regions.register("r", HANDLE, 0, 4)


async def test_what_goes_with_its_process_is_told_until_it_is_registered_again(regions, tmp_path):
    await regions.register("r", HANDLE, 0, 4)
    regions._on_end("signal SIGBUS")
    assert regions.status() == []
    memory = ClientMemory(SharedMemoryRegions(True, tmp_path), regions)
    for use in (lambda: memory.check("r", 0, 1), lambda: memory.read("r", 0, 1), lambda: regions.status("r")):
        with pytest.raises(NotFound, match="'r' is gone, because the process that held it ended: signal SIGBUS"):
            use()
    regions.copier.memory.clear()
    await regions.register("r", HANDLE, 0, 4)
    assert await read(regions, "r", 0, 4) == bytes(4)
    regions._on_end("exit status 75")
    await regions.unregister("r")
    with pytest.raises(NotFound, match="'r' is not registered"):
        memory.read("r", 0, 1)


async def test_the_process_is_ended_when_it_holds_nothing(regions):
    await regions.register("r", HANDLE, 0, 4)
    regions.sweep()
    await regions.unregister("r")
    regions.copier.busy = True
    regions.sweep()
    assert regions.copier.ended == 0
    regions.copier.busy = False
    regions.sweep()
    assert regions.copier.ended == 1


async def test_the_server_looks_for_that_now_and_then(regions, tmp_path, monkeypatch):
    monkeypatch.setattr(headrace.app, "SWEEP_INTERVAL_S", 0)
    app = SimpleNamespace(regions=SharedMemoryRegions(True, tmp_path), cuda_regions=regions)
    sweeping = asyncio.ensure_future(headrace.app.App._sweep(app))
    while not regions.copier.ended:
        await asyncio.sleep(0)
    sweeping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sweeping


class Engine:
    """Answers each request with its inputs, as outputs of the names that are asked for."""

    def __init__(self):
        self.unreadable = []

    def infer(self, request):
        assert not request.to_fetch
        answer = asyncio.get_running_loop().create_future()
        outputs = tuple(
            Tensor(output.name, one.datatype, one.shape, bytes(one.data))
            for output, one in zip(request.outputs, request.inputs, strict=True)
        )
        answer.set_result(InferResponse(request.model, "1", request.id, outputs))
        return answer

    def count_unreadable(self, model, version):
        self.unreadable.append((model, version))


@pytest.fixture
def device_tensors(regions, tmp_path):
    system = SharedMemoryRegions(True, tmp_path, taken=regions.holds)
    return SimpleNamespace(
        engine=(engine := Engine()),
        memory=(memory := ClientMemory(system, regions)),
        tensors=DeviceTensors(engine, memory, regions),
    )


def wanted(name, region, offset, byte_size):
    return RequestedOutput(
        name,
        {"shared_memory_region": region, "shared_memory_offset": offset, "shared_memory_byte_size": byte_size},
    )


def asked(outputs=()):
    inputs = (Tensor("a", DataType.UINT8, (3,), b""), Tensor("b", DataType.UINT8, (2,), b"de"))
    return InferRequest("m", "1", "", inputs, outputs, to_fetch=((0, Place("r", 1, 3)),))


async def test_inputs_are_fetched_and_outputs_delivered(regions, device_tensors):
    await regions.register("r", HANDLE, 0, 20)
    await regions.write(Place("r", 1, 3), b"abc")
    request = asked((wanted("x", "r", 10, 5), RequestedOutput("y")))
    response = await device_tensors.tensors.infer(request)
    assert [bytes(tensor.data) for tensor in response.outputs] == [b"abc", b"de"]
    assert response.delivered == {"x"}
    assert await read(regions, "r", 0, 20) == b"\0abc" + bytes(6) + b"abc" + bytes(7)


async def test_an_error_says_which_tensor_it_is_about(regions, device_tensors):
    await regions.register("r", HANDLE, 0, 20)
    request = asked((RequestedOutput("x"), wanted("y", "r", 0, 1)))
    with pytest.raises(InvalidRequest, match="model 'm': output 'y': shared memory region 'r' has too little room"):
        await device_tensors.tensors.infer(request)
    assert device_tensors.engine.unreadable == []
    await regions.unregister("r")
    with pytest.raises(NotFound, match="model 'm': input 'a': Unable to find cuda shared memory region: 'r'"):
        await device_tensors.tensors.infer(request)
    assert device_tensors.engine.unreadable == [("m", "1")]


async def test_a_request_without_tensors_on_gpus_is_the_engine_s(device_tensors):
    plain = InferRequest("m", "1", "", (), ())
    assert device_tensors.tensors.infer(plain).done()
    elsewhere = InferRequest("m", "1", "", (), (wanted("x", "system", 0, 1),))
    device_tensors.engine.infer = lambda request: request
    assert device_tensors.tensors.infer(elsewhere) is elsewhere


async def test_a_request_that_is_taken_back_stops_waiting(regions, device_tensors):
    await regions.register("r", HANDLE, 0, 20)
    regions.copier.hold = asyncio.Event()
    answer = device_tensors.tensors.infer(asked((RequestedOutput("x"), RequestedOutput("y"))))
    await asyncio.sleep(0)
    answer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await answer
    regions.copier.hold.set()


async def test_a_process_that_ends_fails_what_waits_for_it(regions, device_tensors):
    await regions.register("r", HANDLE, 0, 20)
    regions.copier.fail = NotReady("it has ended")
    with pytest.raises(HeadraceError, match="input 'a': shared memory region 'r' cannot be read: it has ended") as got:
        await device_tensors.tensors.infer(asked((RequestedOutput("x"), RequestedOutput("y"))))
    assert got.value.kind is Kind.NOT_READY


async def test_a_region_that_changes_its_kind_while_it_is_in_use_is_told(regions, device_tensors):
    await regions.register("r", HANDLE, 0, 20)
    with pytest.raises(NotFound, match="'r' was registered anew while it was in use"):
        device_tensors.memory.write("r", 0, 4, b"abcd")


async def test_a_stream_is_not_ended_while_a_request_on_it_is_fetched(regions, device_tensors):
    """A server that stops ends a stream once everything on it is answered: what was read belongs to that."""
    await regions.register("r", HANDLE, 0, 20)
    await regions.write(Place("r", 1, 3), b"abc")
    written, regions.copier.hold, read_all = [], asyncio.Event(), asyncio.Event()
    engine = SimpleNamespace(stream=lambda request: single_response(device_tensors.engine.infer(request)))
    reader = SimpleNamespace(
        decode=lambda *_: (asked((RequestedOutput("x"), RequestedOutput("y"))), False),
        message=lambda response, _: pb.ModelInferResponse(id=bytes(response.outputs[0].data).decode()),
    )

    async def requests():
        yield b"one"
        await read_all.wait()

    async def write(message):
        written.append(message.infer_response.id)

    service = StreamService(engine, reader, device_tensors.tensors)
    failures = []
    call = SimpleNamespace(metadata=(), write=write, fail=failures.append)
    serving = asyncio.ensure_future(service.ModelStreamInfer(requests(), call))
    while not regions.copier.turns.locked():
        await asyncio.sleep(0)
    service.leave()
    await asyncio.sleep(0)
    assert not serving.done()
    regions.copier.hold.set()
    await serving
    (failure,) = failures
    assert isinstance(failure, NotReady)
    assert str(failure) == "the server is stopping"
    assert written == ["abc"]

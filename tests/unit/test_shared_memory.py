"""Clients' shared memory: what is registered, what is refused, and what its owners can do to us meanwhile."""

import asyncio
import base64
import errno
import json
import os
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI, Request, Response
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import headrace.shared_memory
from headrace.core.errors import HeadraceError, InvalidRequest, NotFound, Overloaded, TooLarge, Unsupported
from headrace.core.regions import MAX_READ_BYTES, Place, check_read_bytes, place_of
from headrace.cuda_memory import frames
from headrace.cuda_memory.regions import CudaRegions
from headrace.frontends.grpc_shared_memory import SharedMemoryService
from headrace.frontends.http_shared_memory import add_shared_memory
from headrace.frontends.server_state import ServerState
from headrace.frontends.status import http_status
from headrace.shared_memory import MAX_NAME_CHARACTERS, Region, SharedMemoryRegions
from headrace.wire import pb


def open_files(folder):
    """What below ``folder`` this process has open, also where it was unlinked since."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            target = str(link.readlink())
        except FileNotFoundError:  # the descriptor that listed them
            continue
        if target.startswith(f"{folder}/"):
            found.append(Path(target).name)
    return sorted(found)


@pytest.fixture
def folder(tmp_path):
    yield tmp_path
    assert open_files(tmp_path) == [], "no descriptor is left behind"


@pytest.fixture
def regions(folder):
    made = SharedMemoryRegions(True, folder)
    yield made
    made.unregister()


@pytest.fixture
def digits(folder):
    """An object of ten bytes."""
    path = folder / "digits"
    path.write_bytes(b"0123456789")
    return path


@pytest.mark.parametrize("key", ["digits", "/digits"])
def test_a_region_is_a_part_of_an_object(regions, digits, key):
    regions.register("r", key, 2, 6)
    assert regions.status("r") == regions.status() == [Region("r", key, 2, 6)]
    assert regions.read("r", 0, 6) == b"234567"
    assert regions.read("r", 4, 2) == b"67"
    assert regions.read("r", 6, 0) == b""
    regions.write("r", 1, 3, memoryview(b"ab"))
    assert digits.read_bytes() == b"012ab56789"
    regions.write("r", 5, 1, bytearray(b"z"))
    assert digits.read_bytes() == b"012ab56z89"


def test_what_the_owner_writes_is_seen_at_the_next_read(regions, digits):
    regions.register("r", "digits", 0, 10)
    assert regions.read("r", 0, 2) == b"01"
    digits.write_bytes(b"ab")
    assert regions.read("r", 0, 2) == b"ab"


def test_an_object_may_be_in_several_regions(regions, digits):
    regions.register("low", "digits", 0, 5)
    regions.register("high", "/digits", 5, 5)
    regions.write("low", 0, 5, b"aaaaa")
    assert regions.read("high", 0, 5) == b"56789"
    regions.unregister("low")
    assert [one.name for one in regions.status()] == ["high"]


def test_a_name_is_taken_until_it_is_unregistered(regions, digits):
    regions.register("r", "digits", 0, 5)
    with pytest.raises(InvalidRequest, match="shared memory region 'r' already in manager"):
        regions.register("r", "digits", 5, 5)
    assert regions.read("r", 0, 1) == b"0"
    regions.unregister("r")
    regions.register("r", "digits", 5, 5)
    assert regions.read("r", 0, 1) == b"5"


def test_what_is_not_registered_is_not_found(regions, digits):
    regions.register("other", "digits", 0, 5)
    for use in (
        lambda: regions.status("r"),
        lambda: regions.check("r", 0, 1),
        lambda: regions.read("r", 0, 1),
        lambda: regions.write("r", 0, 1, b"a"),
    ):
        with pytest.raises(NotFound, match="Unable to find shared memory region: 'r' is not registered"):
            use()


def test_unregistering_what_is_not_registered_is_no_error(regions, digits):
    regions.register("other", "digits", 0, 5)
    regions.unregister("r")
    assert [one.name for one in regions.status()] == ["other"]
    regions.unregister()
    regions.unregister()
    assert regions.status() == []


def test_without_leave_nothing_is_offered(folder, digits):
    regions = SharedMemoryRegions(False, folder)
    for use in (
        lambda: regions.register("r", "digits", 0, 5),
        lambda: regions.unregister("r"),
        regions.unregister,
        regions.status,
        lambda: regions.status("r"),
        lambda: regions.check("r", 0, 1),
        lambda: regions.read("r", 0, 1),
        lambda: regions.write("r", 0, 1, b"a"),
    ):
        with pytest.raises(Unsupported, match="--allow-client-shm"):
            use()
    assert regions.sweep() == []


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/",
        ".",
        "..",
        "/..",
        "../digits",
        "/../digits",
        "a/b",
        "/a/b",
        "//digits",
        "digits/",
        "./digits",
        "digits\0",
    ],
)
def test_a_key_is_one_plain_name(regions, digits, key):
    (digits.parent / "a").mkdir()
    (digits.parent / "a/b").write_bytes(bytes(10))
    with pytest.raises(InvalidRequest, match=r"region 'r': the key .* expected '/NAME' or 'NAME'"):
        regions.register("r", key, 0, 5)
    assert regions.status() == []


@pytest.mark.parametrize("key", ["nothing", "/nothing", "\u00e9\u4e2d", "long" * 1000])
def test_a_key_that_no_object_has_cannot_be_opened(regions, key):
    with pytest.raises(InvalidRequest, match="region 'r': cannot open the object") as caught:
        regions.register("r", key, 0, 5)
    assert len(str(caught.value)) < 200


def test_a_key_may_be_any_text(regions, folder):
    (folder / "\u00e9\u4e2d %41").write_bytes(b"abc")
    regions.register("r", "/\u00e9\u4e2d %41", 0, 3)
    assert regions.read("r", 0, 3) == b"abc"


def test_links_are_not_followed(regions, folder, digits):
    (folder / "link").symlink_to(digits)
    with pytest.raises(InvalidRequest, match="cannot open the object 'link'"):
        regions.register("r", "link", 0, 5)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["fifo", "folder"])
def test_only_regular_files_are_objects_and_opening_others_does_not_wait(regions, folder, make):
    make(folder / "thing")
    with pytest.raises(InvalidRequest, match="'thing'"):
        regions.register("r", "thing", 0, 5)
    assert open_files(folder) == []


@pytest.mark.parametrize(
    ("offset", "byte_size"),
    [
        (0, 11),
        (10, 1),
        (5, 6),
        (11, 1),
        (0, 0),
        (0, -1),
        (-1, 5),
        (0, 2**63),
        (2**64, 1),
        (2**64 - 1, 2),
        (1, 10**4000),
    ],
)
def test_a_region_lies_within_its_object(regions, folder, digits, offset, byte_size):
    with pytest.raises(InvalidRequest, match="cannot register shared memory region 'r'") as caught:
        regions.register("r", "digits", offset, byte_size)
    assert str(byte_size) in str(caught.value)
    assert open_files(folder) == []


@pytest.mark.parametrize(
    ("offset", "byte_size"), [(0, 6), (5, 1), (6, 0), (-1, 2), (3, -1), (2**63, 1), (0, 2**63), (2**63, 2**63)]
)
def test_a_tensor_lies_within_its_region(regions, digits, offset, byte_size):
    regions.register("r", "digits", 2, 5)
    for use in (
        lambda: regions.check("r", offset, byte_size),
        lambda: regions.read("r", offset, byte_size),
        lambda: regions.write("r", offset, byte_size, b""),
    ):
        with pytest.raises(InvalidRequest, match=f"region 'r' has 5 bytes, which shared_memory_offset {offset}"):
            use()
    assert digits.read_bytes() == b"0123456789"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(start=st.integers(0, 12), size=st.integers(0, 12), offset=st.integers(-2, 12), length=st.integers(-2, 12))
def test_nothing_outside_a_region_is_ever_read_or_written(regions, digits, start, size, offset, length):
    whole = b"0123456789"
    digits.write_bytes(whole)
    regions.unregister()
    within = offset >= 0 and length >= 0 and offset + length <= size and size > 0 and start + size <= len(whole)
    try:
        regions.register("r", "digits", start, size)
        read = regions.read("r", offset, length)
        regions.write("r", offset, length, b"x" * max(0, length))
    except InvalidRequest:
        assert not within
        assert digits.read_bytes() == whole
    else:
        assert within
        position = start + offset
        assert read == whole[position : position + length]
        assert digits.read_bytes() == whole[:position] + b"x" * length + whole[position + length :]


def test_data_longer_than_its_place_is_not_written(regions, digits):
    regions.register("r", "digits", 0, 10)
    with pytest.raises(InvalidRequest, match=r"region 'r' .* 4 bytes are needed, and shared_memory_byte_size gives 3"):
        regions.write("r", 0, 3, b"abcd")
    assert digits.read_bytes() == b"0123456789"


def test_an_object_that_its_owner_shortened_is_an_error_and_never_grows(regions, digits):
    regions.register("r", "digits", 2, 8)
    os.truncate(digits, 5)
    for use in (
        lambda: regions.read("r", 0, 8),
        lambda: regions.check("r", 0, 8),
        lambda: regions.write("r", 0, 8, b"abcdefgh"),
        lambda: regions.write("r", 3, 1, b"a"),
    ):
        with pytest.raises(InvalidRequest, match="region 'r': its object 'digits' was shortened to 5 bytes"):
            use()
    assert digits.read_bytes() == b"01234"
    assert regions.read("r", 0, 3) == b"234"
    os.truncate(digits, 0)
    with pytest.raises(InvalidRequest, match="shortened to 0 bytes"):
        regions.read("r", 0, 1)
    os.truncate(digits, 10)
    assert regions.read("r", 0, 8) == bytes(8)


def test_an_object_may_be_shortened_after_its_size_was_looked_at(regions, digits, monkeypatch):
    regions.register("r", "digits", 2, 8)
    look = os.fstat

    def look_and_shorten(descriptor):
        state = look(descriptor)
        os.truncate(digits, 5)
        return state

    with monkeypatch.context() as patched:
        patched.setattr(os, "fstat", look_and_shorten)
        with pytest.raises(InvalidRequest, match="region 'r': its object 'digits' was shortened to 5 bytes"):
            regions.read("r", 1, 7)


@pytest.mark.parametrize("how", ["read", "write", "check", "status"])
def test_a_region_whose_object_was_unlinked_is_gone_with_its_memory(regions, folder, digits, how):
    regions.register("r", "digits", 0, 10)
    digits.unlink()
    digits.write_bytes(b"a new one!")
    use = {
        "read": lambda: regions.read("r", 0, 1),
        "write": lambda: regions.write("r", 0, 1, b"a"),
        "check": lambda: regions.check("r", 0, 1),
        "status": lambda: regions.status("r"),
    }
    with pytest.raises(NotFound, match="region: 'r' is gone, because its object 'digits' was unlinked"):
        use[how]()
    assert open_files(folder) == []
    with pytest.raises(NotFound, match="'r' is not registered"):
        use[how]()


@pytest.mark.parametrize("look", ["status", "sweep"])
def test_every_region_that_is_gone_is_dropped(regions, folder, digits, look):
    (folder / "kept").write_bytes(bytes(4))
    for name, key in (("a", "digits"), ("b", "kept"), ("c", "digits")):
        regions.register(name, key, 0, 4)
    assert regions.sweep() == []
    digits.unlink()
    if look == "sweep":
        assert regions.sweep() == ["a", "c"]
    assert regions.status() == [Region("b", "kept", 0, 4)]
    assert open_files(folder) == ["kept"]


def test_a_client_that_died_can_come_back_under_its_names(regions, digits):
    regions.register("r", "digits", 0, 10)
    digits.unlink()
    digits.write_bytes(b"again")
    regions.register("r", "digits", 0, 5)
    assert regions.read("r", 0, 5) == b"again"


def test_the_number_of_regions_is_bounded(regions, folder, digits, monkeypatch):
    monkeypatch.setattr(headrace.shared_memory, "MAX_REGIONS", 2)
    (folder / "other").write_bytes(bytes(4))
    regions.register("a", "digits", 0, 4)
    regions.register("b", "other", 0, 4)
    with pytest.raises(Overloaded, match="region 'c': 2 regions are registered"):
        regions.register("c", "other", 0, 4)
    digits.unlink()
    regions.register("c", "other", 0, 4)
    assert [one.name for one in regions.status()] == ["b", "c"]


@pytest.mark.parametrize("name", ["", "x" * (MAX_NAME_CHARACTERS + 1)])
def test_a_name_has_a_length(regions, digits, name):
    with pytest.raises(InvalidRequest, match=f"has {len(name)} characters, expected 1 to {MAX_NAME_CHARACTERS}"):
        regions.register(name, "digits", 0, 4)


def test_without_descriptors_left_a_client_is_to_come_again(regions, digits, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse)
        with pytest.raises(Overloaded, match="region 'r'"):
            regions.register("r", "digits", 0, 4)


def test_a_file_system_that_fails_is_told_and_nothing_more(regions, digits, monkeypatch):
    regions.register("r", "digits", 0, 10)

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for call in ("pread", "pwrite"):
        monkeypatch.setattr(os, call, fail)
    with pytest.raises(InvalidRequest, match="region 'r': its object 'digits' cannot be written: No space left"):
        regions.write("r", 0, 4, b"abcd")
    with pytest.raises(InvalidRequest, match="cannot be read"):
        regions.read("r", 0, 4)


def test_data_that_is_taken_in_pieces_arrives_whole(regions, digits, monkeypatch):
    regions.register("r", "digits", 0, 10)
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, position: write(descriptor, data[:3], position))
    regions.write("r", 1, 8, b"abcdefgh")
    assert digits.read_bytes() == b"0abcdefgh9"


def test_a_place_is_read_from_parameters():
    given_parameters = {"shared_memory_region": "r", "shared_memory_byte_size": 8, "binary_data": False}
    assert place_of(given_parameters, "here") == Place("r", 0, 8)
    assert place_of({**given_parameters, "shared_memory_offset": 2**62}, "here") == Place("r", 2**62, 8)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"shared_memory_region": 1}, "has shared_memory_region 1"),
        ({"shared_memory_region": True}, "has shared_memory_region True"),
        ({"shared_memory_byte_size": None}, "without shared_memory_byte_size"),
        *(
            ({f"shared_memory_{name}": value}, f"has shared_memory_{name} {value!r}, expected a number of bytes")
            for name in ("byte_size", "offset")
            for value in (-1, True, 1.0, "8", 2**63, 10**4000)
        ),
    ],
)
def test_a_place_that_is_none_is_refused(changed, said):
    parameters = {"shared_memory_region": "r", "shared_memory_byte_size": 8, **changed}
    parameters = {name: value for name, value in parameters.items() if value is not None}
    with pytest.raises(InvalidRequest) as caught:
        place_of(parameters, "model 'm': input 'x'")
    assert str(caught.value).startswith("model 'm': input 'x' ")
    assert said in str(caught.value)


def test_what_a_request_reads_is_bounded():
    check_read_bytes(MAX_READ_BYTES, "m")
    with pytest.raises(TooLarge, match=f"model 'm': the request has {MAX_READ_BYTES + 1} bytes"):
        check_read_bytes(MAX_READ_BYTES + 1, "m")


@pytest.fixture
def cuda():
    """Regions whose memory is on no GPU: the copier believes every handle."""
    made = CudaRegions(True)
    made.copier = Believing()
    return made


class Believing:
    """A copier that does nothing of what it is asked."""

    def __init__(self):
        self.asked = []

    def ask(self, frame, descriptor=-1):
        assert descriptor == -1
        self.asked.append(frame)
        done = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done


@pytest.fixture
async def http(regions, cuda):
    app = FastAPI()

    @app.exception_handler(HeadraceError)
    async def expected(_: Request, error: HeadraceError) -> Response:
        return Response(str(error), http_status(error)[0])

    add_shared_memory(app, regions, cuda)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://unit") as client:
        yield client


async def test_regions_over_http(http, digits):
    body = {"key": "/digits", "offset": 2, "byte_size": 4}
    assert (await http.get("/v2/systemsharedmemory/status")).json() == []
    made = await http.post("/v2/systemsharedmemory/region/my%20r/register", json=body)
    assert (made.status_code, made.content) == (200, b"")
    expected = [{"name": "my r", **body}]
    assert (await http.get("/v2/systemsharedmemory/region/my%20r/status")).json() == expected
    await http.post("/v2/systemsharedmemory/region/b/register", json={"key": "digits", "byte_size": 1})
    both = [*expected, {"name": "b", "key": "digits", "offset": 0, "byte_size": 1}]
    assert (await http.get("/v2/systemsharedmemory/status?name=b")).json() == both
    assert (await http.post("/v2/systemsharedmemory/region/my%20r/unregister")).status_code == 200
    assert (await http.get("/v2/systemsharedmemory/region/my%20r/status")).status_code == 404
    assert (await http.post("/v2/systemsharedmemory/unregister")).status_code == 200
    assert (await http.get("/v2/systemsharedmemory/status")).json() == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff",
        b'{"key": "digits"}',
        b'{"byte_size": 4}',
        b'{"key": 1, "byte_size": 4}',
        b'{"key": "digits", "byte_size": "4"}',
        b'{"key": "digits", "byte_size": 4.5}',
        b'{"key": "digits", "byte_size": true}',
        b'{"key": "digits", "byte_size": null}',
        b'{"key": "digits", "byte_size": -4}',
        b'{"key": "digits", "byte_size": 99}',
        b'{"key": "digits", "byte_size": 4, "offset": -1}',
        b'{"key": "digits", "byte_size": 4, "offset": "0"}',
        b'{"key": "../digits", "byte_size": 4}',
        b'{"key": "\\ud800", "byte_size": 4}',
        b'{"key": "digits", "byte_size": 1' + b"0" * 4000 + b"}",
        b'{"key": "digits", "byte_size": 1' + b"0" * 9000 + b"}",
        b'{"a": ' + b"[" * 100_000,
    ],
)
async def test_a_body_that_is_none_is_the_client_s_fault(http, digits, body):
    refused = await http.post("/v2/systemsharedmemory/region/r/register", content=body)
    assert refused.status_code == 400
    assert "cannot register shared memory region 'r': " in refused.text
    assert (await http.get("/v2/systemsharedmemory/status")).json() == []


HANDLE = bytes(range(192, 256))
CUDA_BODY = {"raw_handle": {"b64": base64.b64encode(HANDLE).decode()}, "device_id": 3, "byte_size": 4}


async def test_cuda_over_http(http, cuda):
    assert (await http.get("/v2/cudasharedmemory/status")).json() == []
    assert (await http.get("/v2/cudasharedmemory/region/my%20r/status")).status_code == 404
    made = await http.post("/v2/cudasharedmemory/region/my%20r/register", json=CUDA_BODY)
    assert (made.status_code, made.content) == (200, b"")
    assert cuda.copier.asked == [frames.Open(1, 3, HANDLE, 4)]
    expected = [{"name": "my r", "device_id": 3, "byte_size": 4}]
    assert (await http.get("/v2/cudasharedmemory/region/my%20r/status")).json() == expected
    assert (await http.get("/v2/cudasharedmemory/status")).json() == expected
    assert (await http.get("/v2/systemsharedmemory/status")).json() == []
    assert (await http.post("/v2/cudasharedmemory/region/my%20r/unregister")).status_code == 200
    assert (await http.get("/v2/cudasharedmemory/status")).json() == []
    await http.post("/v2/cudasharedmemory/region/r/register", json=CUDA_BODY)
    assert (await http.post("/v2/cudasharedmemory/unregister")).status_code == 200
    assert (await http.get("/v2/cudasharedmemory/status")).json() == []
    assert cuda.copier.asked[-1] == frames.Close(2)


@pytest.mark.parametrize(
    "change",
    [
        {"device_id": "0"},
        {"device_id": -1},
        {"device_id": None},
        {"byte_size": 0},
        {"byte_size": 2**70},
        {"raw_handle": CUDA_BODY["raw_handle"]["b64"]},
        {"raw_handle": {}},
        {"raw_handle": {"b64": 1}},
        {"raw_handle": {"b64": "AAAA"}},
        {"raw_handle": {"b64": "not base64!" * 8}},
        {"raw_handle": {"b64": "\u00e9" * 88}},
    ],
)
async def test_a_body_that_is_no_cuda_region_is_the_client_s_fault(http, cuda, change):
    refused = await http.post("/v2/cudasharedmemory/region/r/register", json={**CUDA_BODY, **change})
    assert refused.status_code == 400
    assert "cannot register shared memory region 'r': " in refused.text
    assert cuda.copier.asked == []


async def test_the_paths_are_in_the_openapi_document(http):
    document = (await http.get("/openapi.json")).json()
    paths = document["paths"]
    for kind in ("system", "cuda"):
        prefix = f"/v2/{kind}sharedmemory"
        for path in ("/status", "/region/{name}/status"):
            content = paths[prefix + path]["get"]["responses"]["200"]["content"]["application/json"]
            assert content["schema"]["items"]["$ref"].endswith(f"/{kind.capitalize()}RegionBody")
        assert "requestBody" in paths[f"{prefix}/region/{{name}}/register"]["post"]
        assert "post" in paths[f"{prefix}/region/{{name}}/unregister"]
        assert "post" in paths[f"{prefix}/unregister"]
    assert "$defs" not in json.dumps(document)


async def test_regions_over_grpc(regions, digits, cuda):
    service = SharedMemoryService(regions, cuda)
    for name, offset in (("a", 0), ("b", 5)):
        request = pb.SystemSharedMemoryRegisterRequest(name=name, key="/digits", offset=offset, byte_size=5)
        assert await service.SystemSharedMemoryRegister(request, None) == pb.SystemSharedMemoryRegisterResponse()
    everything = await service.SystemSharedMemoryStatus(pb.SystemSharedMemoryStatusRequest(), None)
    assert set(everything.regions) == {"a", "b"}
    one = await service.SystemSharedMemoryStatus(pb.SystemSharedMemoryStatusRequest(name="b"), None)
    assert set(one.regions) == {"b"}
    b = one.regions["b"]
    assert (b.name, b.key, b.offset, b.byte_size) == ("b", "/digits", 5, 5)
    with pytest.raises(NotFound):
        await service.SystemSharedMemoryStatus(pb.SystemSharedMemoryStatusRequest(name="c"), None)
    await service.SystemSharedMemoryUnregister(pb.SystemSharedMemoryUnregisterRequest(name="b"), None)
    assert [one.name for one in regions.status()] == ["a"]
    await service.SystemSharedMemoryUnregister(pb.SystemSharedMemoryUnregisterRequest(), None)
    assert regions.status() == []
    with pytest.raises(InvalidRequest, match="name"):
        await service.SystemSharedMemoryRegister(pb.SystemSharedMemoryRegisterRequest(key="/digits"), None)
    request = pb.SystemSharedMemoryRegisterRequest(name="r", key="digits", offset=2**64 - 1, byte_size=2**64 - 1)
    with pytest.raises(InvalidRequest, match="reach beyond"):
        await service.SystemSharedMemoryRegister(request, None)


async def test_cuda_over_grpc(regions, cuda):
    service = SharedMemoryService(regions, cuda)
    for name, device in (("a", 0), ("b", 3)):
        request = pb.CudaSharedMemoryRegisterRequest(name=name, raw_handle=HANDLE, device_id=device, byte_size=4)
        assert await service.CudaSharedMemoryRegister(request, None) == pb.CudaSharedMemoryRegisterResponse()
    assert cuda.copier.asked == [frames.Open(1, 0, HANDLE, 4), frames.Open(2, 3, HANDLE, 4)]
    everything = await service.CudaSharedMemoryStatus(pb.CudaSharedMemoryStatusRequest(), None)
    assert set(everything.regions) == {"a", "b"}
    one = await service.CudaSharedMemoryStatus(pb.CudaSharedMemoryStatusRequest(name="b"), None)
    assert set(one.regions) == {"b"}
    b = one.regions["b"]
    assert (b.name, b.device_id, b.byte_size) == ("b", 3, 4)
    with pytest.raises(NotFound):
        await service.CudaSharedMemoryStatus(pb.CudaSharedMemoryStatusRequest(name="r"), None)
    for name, left in (("r", 2), ("b", 1), ("", 0)):
        answer = await service.CudaSharedMemoryUnregister(pb.CudaSharedMemoryUnregisterRequest(name=name), None)
        assert answer == pb.CudaSharedMemoryUnregisterResponse()
        assert len(cuda.status()) == left
    for handle in (b"", HANDLE[:63], HANDLE + b"x"):
        request = pb.CudaSharedMemoryRegisterRequest(name="r", raw_handle=handle, device_id=0, byte_size=4)
        with pytest.raises(InvalidRequest, match=f"region 'r': raw_handle has {len(handle)} bytes, expected 64"):
            await service.CudaSharedMemoryRegister(request, None)


@pytest.mark.parametrize("shares", [False, True])
def test_memory_of_gpus_is_among_the_extensions_where_there_may_be_any(shares):
    state = ServerState("headrace", None, strict_readiness=False, shares_gpu_memory=shares)
    assert ("cuda_shared_memory" in state.extensions) is shares
    assert state.extensions == sorted(state.extensions)


def test_the_service_has_every_rpc_of_the_extension():
    assert {name for name in pb.RPCS if "SharedMemory" in name} == {
        name for name in vars(SharedMemoryService) if not name.startswith("_")
    }

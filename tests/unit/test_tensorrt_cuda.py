"""The driver's calls, against a libcuda of our own: what is passed, and what is made of the answers."""

import ctypes
import shutil
import subprocess

import pytest
from fake_libcuda import LentFile, make_libcuda

from headrace_backends.base import BackendUnavailable, DeviceLost, LoadError
from headrace_backends.tensorrt.cuda import _FUNCTIONS, CudaDriver, CudaError, context_is_well, hardware
from headrace_backends.tensorrt.cuda_lent import LentMemory, TooShort


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return str(make_libcuda(tmp_path_factory.mktemp("cuda")))


def test_the_driver_tells_of_its_gpus(library):
    driver = CudaDriver(library)
    assert driver.version == (13, 0)
    assert hardware(driver.gpus()) == "gpu:0 Fake 40 (8.9, 40 GiB), gpu:1 Fake 41 (8.9, 41 GiB)"
    assert [gpu.uuid for gpu in driver.gpus()] == [
        "GPU-28282828-2828-2828-2828-282828282828",
        "GPU-29292929-2929-2929-2929-292929292929",
    ]
    with pytest.raises(LoadError, match=r"device 'gpu:2' is not here; the driver sees gpu:0 Fake 40, gpu:1 Fake 41"):
        driver.open(2)


def test_memory_goes_there_and_back(library):
    device = CudaDriver(library).open(1)
    stream = device.make_stream()
    there, pinned, back = device.allocate(100), device.allocate_pinned(100), device.allocate_pinned(100)
    pinned.data[:] = range(100)
    device.copy_in(there, pinned, 100, stream)
    device.copy_out(back, there, 100, stream)
    device.wait(stream)
    assert back.data.tolist() == list(range(100))
    assert device.memory() == (3, 5_000_000_000)
    device.free(there)
    for one in (pinned, back):
        device.free_pinned(one)
    device.end_stream(stream)
    device.close()


def test_graphs(library):
    device = CudaDriver(library).open(1)
    stream = device.make_stream()
    device.begin_capture(stream)
    graph = device.end_capture(stream)
    device.launch(graph, stream)
    device.end_graph(graph)


def test_what_the_driver_says_becomes_what_happened(library, monkeypatch):
    device = CudaDriver(library).open(1)
    stream = device.make_stream()
    monkeypatch.setenv("FAKE_CUDA", "cuMemAlloc_v2=2")
    with pytest.raises(MemoryError, match=r"the GPU is out of memory: cuMemAlloc_v2 says .*\(2\)"):
        device.allocate(1)
    monkeypatch.setenv("FAKE_CUDA", "cuStreamSynchronize=719")
    with pytest.raises(
        DeviceLost, match=r"lost to this process: cuStreamSynchronize says CUDA_ERROR_LAUNCH_FAILED \(719\)"
    ):
        device.wait(stream)
    monkeypatch.setenv("FAKE_CUDA", "cuStreamSynchronize=100")
    with pytest.raises(CudaError, match=r"cuStreamSynchronize says CUDA_ERROR_NO_DEVICE \(100\)"):
        device.wait(stream)


def test_no_driver_and_a_driver_that_does_not_work_are_told_apart(library, monkeypatch):
    with pytest.raises(BackendUnavailable, match=r"there is no NVIDIA driver here .*--gpus all"):
        CudaDriver("libcuda-that-is-not-here.so.1")
    monkeypatch.setenv("FAKE_CUDA", "cuInit=100")
    with pytest.raises(BackendUnavailable, match=r"does not work here: cuInit says CUDA_ERROR_NO_DEVICE \(100\)"):
        CudaDriver(library)


def test_a_driver_that_is_too_old_is_told(tmp_path):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to make a libcuda with")
    (tmp_path / "old.c").write_text("int cuInit(unsigned flags) { return flags; }")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", tmp_path / "old.so", tmp_path / "old.c"], check=True, timeout=60
    )
    missing = list(_FUNCTIONS)[1]
    with pytest.raises(BackendUnavailable, match=f"too old: it has no {missing}"):
        CudaDriver(str(tmp_path / "old.so"))


@pytest.mark.parametrize(
    ("status", "expected"),
    [(0, True), (700, False), (719, False), (226, False), (721, False), (999, False), (201, None), (2, None)],
)
def test_whether_the_context_is_well(library, monkeypatch, status, expected):
    monkeypatch.setenv("FAKE_CUDA", f"cuCtxSynchronize={status}")
    assert context_is_well(library) is expected


def test_without_a_driver_there_is_no_gpu_to_lose():
    assert context_is_well("libcuda-that-is-not-here.so") is True


@pytest.fixture
def lent(library):
    driver = CudaDriver(library)
    return LentMemory(driver, driver.open(1))


def host(data):
    memory = ctypes.create_string_buffer(data, len(data))
    return memory, ctypes.addressof(memory)


def test_memory_that_another_process_lends_is_read_and_written(lent):
    with LentFile(100) as first, LentFile(10) as second:
        first.write(3, b"abc")
        here, there = lent.open(first.handle, 100), lent.open(second.handle, 10)
        memory, address = host(bytes(3))
        lent.read(here + 3, address, 3)
        assert memory.raw == b"abc"
        memory, address = host(b"xyz")
        lent.write(there + 7, address, 3)
        assert second.read(0, 10) == bytes(7) + b"xyz"
        lent.close(here)
        with pytest.raises(CudaError, match="cuIpcCloseMemHandle says"):
            lent.close(here)
        lent.close(there)


def test_no_more_is_lent_than_there_is(lent, monkeypatch):
    with LentFile(100) as memory:
        for _ in range(20):  # what was refused is closed
            with pytest.raises(TooShort, match="byte_size is 101, and the handle stands for 100 bytes"):
                lent.open(memory.handle, 101)
        monkeypatch.setenv("FAKE_CUDA", "cuMemGetAddressRange_v2=1")
        lent.close(lent.open(memory.handle, 101))  # a driver that does not tell is believed in its other answers


def test_a_handle_that_stands_for_nothing_is_told(lent):
    with pytest.raises(CudaError, match="cuIpcOpenMemHandle_v2 says"):
        lent.open(bytes(64), 1)

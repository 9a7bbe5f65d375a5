"""The driver's calls, against a libcuda of our own: what is passed, and what is made of the answers."""

import shutil
import subprocess

import pytest

from headrace_backends.base import BackendUnavailable, DeviceLost, LoadError
from headrace_backends.tensorrt.cuda import _FUNCTIONS, CudaDriver, CudaError, hardware

# It has 2 GPUs, and memory that is the host's. Its status is what the environment says for the function.
SOURCE = r"""
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
typedef void *handle;
static int at_work[8];
static int status(const char *name) {
  const char *wanted = getenv("FAKE_CUDA");
  size_t length = strlen(name);
  return wanted && !strncmp(wanted, name, length) && wanted[length] == '=' ? atoi(wanted + length + 1) : 0;
}
#define SAY(name) do { int failed = status(name); if (failed) return failed; } while (0)
int cuInit(unsigned flags) { SAY("cuInit"); return flags; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int index) { *device = index + 40; return 0; }
int cuDeviceGetName(char *name, int size, int device) { snprintf(name, size, "Fake %d", device); return 0; }
int cuDeviceGetAttribute(int *value, int what, int device) {
  *value = what == 75 ? 8 : what == 76 ? 9 : -1; return device < 40; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = (size_t)device << 30; return 0; }
int cuDevicePrimaryCtxRetain(handle *context, int device) { *context = &at_work[device - 40]; return 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { return device < 40; }
int cuCtxSetCurrent(handle context) { return context != &at_work[1]; }
int cuMemGetInfo_v2(size_t *free, size_t *total) { *free = 3; *total = 5000000000; return 0; }
int cuMemAlloc_v2(uint64_t *address, size_t bytes) {
  SAY("cuMemAlloc_v2"); *address = (uint64_t)malloc(bytes); return 0; }
int cuMemFree_v2(uint64_t address) { free((void *)address); return 0; }
int cuMemHostAlloc(handle *address, size_t bytes, unsigned flags) { *address = calloc(bytes, 1); return flags; }
int cuMemFreeHost(handle address) { free(address); return 0; }
int cuMemcpyHtoDAsync_v2(uint64_t to, handle from, size_t bytes, handle stream) {
  memcpy((void *)to, from, bytes); return stream != &at_work[2]; }
int cuMemcpyDtoHAsync_v2(handle to, uint64_t from, size_t bytes, handle stream) {
  memcpy(to, (void *)from, bytes); return stream != &at_work[2]; }
int cuStreamCreate(handle *stream, unsigned flags) { *stream = &at_work[2]; return flags != 1; }
int cuStreamDestroy_v2(handle stream) { return stream != &at_work[2]; }
int cuStreamSynchronize(handle stream) { SAY("cuStreamSynchronize"); return stream != &at_work[2]; }
int cuStreamBeginCapture_v2(handle stream, int mode) { return mode != 1 || stream != &at_work[2]; }
int cuStreamEndCapture(handle stream, handle *graph) { *graph = &at_work[3]; return stream != &at_work[2]; }
int cuGraphInstantiateWithFlags(handle *made, handle graph, unsigned long long flags) {
  *made = &at_work[4]; return graph != &at_work[3] || flags; }
int cuGraphLaunch(handle made, handle stream) { return made != &at_work[4] || stream != &at_work[2]; }
int cuGraphExecDestroy(handle made) { return made != &at_work[4]; }
int cuGraphDestroy(handle graph) { return graph != &at_work[3]; }
int cuGetErrorName(int status, const char **name) {
  if (status == 100) { *name = "CUDA_ERROR_NO_DEVICE"; return 0; }
  *name = 0; return 1; }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to make a libcuda with")
    folder = tmp_path_factory.mktemp("cuda")
    (folder / "cuda.c").write_text(SOURCE)
    made = folder / "libcuda-fake.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", made, folder / "cuda.c"], check=True, timeout=60)
    return str(made)


def test_the_driver_tells_of_its_gpus(library):
    driver = CudaDriver(library)
    assert driver.version == (13, 0)
    assert hardware(driver.gpus()) == "gpu:0 Fake 40 (8.9, 40 GiB), gpu:1 Fake 41 (8.9, 41 GiB)"
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

"""A libcuda of our own: calls of the driver are checked, and answered as a machine with GPUs would."""

import itertools
import os
import shutil
import subprocess
from pathlib import Path
from typing import Self

import pytest

# It has 2 GPUs, and memory that is the host's. A call's status is what FAKE_CUDA says for the function (NAME=STATUS, -1
# for a call that does not come back), or what the file says that FAKE_CUDA names as @PATH. Memory that processes share
# is a file, and its handle the file's path: see LentFile.
SOURCE = r"""
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
typedef void *handle;
static int at_work[8];
static int status(const char *name) {
  const char *wanted = getenv("FAKE_CUDA");
  size_t length = strlen(name);
  char line[256] = "";
  if (wanted && *wanted == '@') {
    FILE *file = fopen(wanted + 1, "r");
    wanted = file ? fgets(line, sizeof line, file) : 0;
    if (file) fclose(file);
  }
  int found = wanted && !strncmp(wanted, name, length) && wanted[length] == '=' ? atoi(wanted + length + 1) : 0;
  while (found == -1) pause();
  return found;
}
#define SAY(name) do { int failed = status(name); if (failed) return failed; } while (0)
int cuInit(unsigned flags) { SAY("cuInit"); return flags; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
/* Which of them CUDA_VISIBLE_DEVICES shows, if it names one by its UUID: all of a UUID's digits are its number's. */
static int only(void) {
  const char *shown = getenv("CUDA_VISIBLE_DEVICES");
  return !shown || strchr(shown, ',') ? 0 : strstr(shown, "-28282828-") ? 40 : strstr(shown, "-29292929-") ? 41 : -1;
}
int cuDeviceGetCount(int *count) { *count = !only() ? 2 : only() > 0; return 0; }
int cuDeviceGet(int *device, int index) { *device = only() > 0 ? only() : index + 40; return 0; }
int cuDeviceGetName(char *name, int size, int device) { snprintf(name, size, "Fake %d", device); return 0; }
int cuDeviceGetAttribute(int *value, int what, int device) {
  *value = what == 75 ? 8 : what == 76 ? 9 : -1; return device < 40; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = (size_t)device << 30; return 0; }
int cuDeviceGetUuid_v2(char *uuid, int device) { memset(uuid, device, 16); return device < 40; }
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
  SAY("cuMemcpyHtoDAsync_v2"); memcpy((void *)to, from, bytes); return stream != &at_work[2]; }
int cuMemcpyDtoHAsync_v2(handle to, uint64_t from, size_t bytes, handle stream) {
  SAY("cuMemcpyDtoHAsync_v2"); memcpy(to, (void *)from, bytes); return stream != &at_work[2]; }
typedef struct { char path[64]; } lent;
static struct { char *start; size_t bytes; } opened[16];
static int slot(uint64_t address) {
  for (int index = 0; index < 16; index++) if (opened[index].start == (char *)address) return index;
  return -1; }
int cuIpcGetMemHandle(lent *handle, uint64_t address) { memset(handle, 0, sizeof *handle); return !address; }
int cuIpcOpenMemHandle_v2(uint64_t *address, lent handle, unsigned flags) {
  SAY("cuIpcOpenMemHandle_v2");
  struct stat state;
  int file = open(handle.path, O_RDWR), free_slot = slot(0);
  if (file < 0 || fstat(file, &state) || free_slot < 0) return 1;
  opened[free_slot].bytes = state.st_size;
  opened[free_slot].start = mmap(0, state.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  *address = (uint64_t)opened[free_slot].start;
  return flags != 1; }
int cuIpcCloseMemHandle(uint64_t address) {
  SAY("cuIpcCloseMemHandle");
  int index = slot(address);
  if (index < 0 || munmap(opened[index].start, opened[index].bytes)) return 1;
  opened[index].start = 0;
  return 0; }
int cuMemGetAddressRange_v2(uint64_t *start, size_t *bytes, uint64_t address) {
  SAY("cuMemGetAddressRange_v2");
  int index = slot(address);
  if (index < 0) return 1;
  *start = address; *bytes = opened[index].bytes;
  return 0; }
int cuCtxSynchronize(void) { SAY("cuCtxSynchronize"); return 0; }
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


class LentFile:
    """Memory of a GPU that this process lends; a context manager that frees it."""

    _numbers = itertools.count()

    def __init__(self, byte_size: int) -> None:
        self.path = Path(f"/dev/shm/headrace-test-{os.getpid()}-cuda-{next(self._numbers)}")
        self.byte_size = byte_size

    def __enter__(self) -> Self:
        self.path.write_bytes(bytes(self.byte_size))
        return self

    def __exit__(self, *_: object) -> None:
        self.path.unlink(missing_ok=True)

    @property
    def handle(self) -> bytes:
        """What its cudaIpcMemHandle_t is."""
        return str(self.path).encode().ljust(64, b"\0")

    def write(self, offset: int, data: bytes) -> None:
        """Put data into it, as its owner."""
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    def read(self, offset: int, nbytes: int) -> bytes:
        """What is in it."""
        return self.path.read_bytes()[offset : offset + nbytes]


def make_libcuda(folder: Path) -> Path:
    """The library in the folder, by the driver's name; the test is skipped where there is no C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to make a libcuda with")
    (folder / "cuda.c").write_text(SOURCE)
    made = folder / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", made, folder / "cuda.c"], check=True, timeout=60)
    return made

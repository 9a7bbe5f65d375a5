"""What the process does that holds clients' GPU memory, in this one, against a libcuda of our own."""

import os
import socket

import pytest
from fake_libcuda import LentFile, make_libcuda

from headrace.core.errors import Kind
from headrace.cuda_memory import frames
from headrace.cuda_memory.copier import Copier, serve
from headrace.workers import channel
from headrace.workers.arena import Segment
from headrace_backends.base import DeviceLost
from headrace_backends.tensorrt.cuda import CudaDriver

GPU = 1  # the other one does not work


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return str(make_libcuda(tmp_path_factory.mktemp("cuda")))


@pytest.fixture
def copier(library):
    return Copier(lambda: CudaDriver(library))


@pytest.fixture
def lent():
    with LentFile(100) as memory:
        yield memory


def copy(copier, frame, data=None):
    """The answer, and what the memory has that came along."""
    segment, descriptor = Segment.create(frame.nbytes)
    try:
        if data is not None:
            segment.view[:] = data
        return copier.do(frame, [descriptor]), bytes(segment.view)
    finally:
        os.close(descriptor)


def test_regions_are_opened_read_written_and_closed(copier, lent):
    done = frames.Answer()
    assert copier.do(frames.Open(7, GPU, lent.handle, 100), []) == done
    lent.write(10, b"hello")
    assert copy(copier, frames.Read(7, 10, 5)) == (done, b"hello")
    assert copy(copier, frames.Write(7, 95, 5), b"world") == (done, b"world")
    assert lent.read(94, 6) == b"\0world"
    assert copier.do(frames.Close(7), []) == done
    assert copier.do(frames.Close(7), []) == done
    with pytest.raises(KeyError):
        copy(copier, frames.Read(7, 0, 1))


@pytest.mark.parametrize(
    ("status", "device", "nbytes", "kind", "said"),
    [
        ("cuInit=100", GPU, 100, Kind.UNSUPPORTED, "the NVIDIA driver does not work here: cuInit says CUDA_ERROR_NO_D"),
        ("", 5, 100, Kind.INVALID, "device 'gpu:5' is not here; the driver sees gpu:0 Fake 40, gpu:1 Fake 41"),
        ("", 0, 100, Kind.INVALID, "cuCtxSetCurrent says error (1)"),
        ("", GPU, 101, Kind.INVALID, "byte_size is 101, and the handle stands for 100 bytes"),
        ("cuIpcOpenMemHandle_v2=201", GPU, 100, Kind.INVALID, "cuIpcOpenMemHandle_v2 says error (201)"),
        ("cuIpcOpenMemHandle_v2=2", GPU, 100, Kind.OVERLOADED, "the GPU is out of memory: cuIpcOpenMemHandle_v2 says"),
    ],
)
def test_what_cannot_be_opened_is_told_and_may_be_tried_again(
    copier, lent, monkeypatch, status, device, nbytes, kind, said
):
    monkeypatch.setenv("FAKE_CUDA", status)
    answer = copier.do(frames.Open(1, device, lent.handle, nbytes), [])
    assert answer.kind == kind.value
    assert answer.message.startswith(said)
    monkeypatch.delenv("FAKE_CUDA")
    assert copier.do(frames.Open(1, GPU, lent.handle, 100), []) == frames.Answer()


def test_a_machine_without_a_driver_is_told():
    copier = Copier(lambda: CudaDriver("libcuda-that-is-not-here.so.1"))
    answer = copier.do(frames.Open(1, 0, bytes(64), 1), [])
    assert answer.kind == Kind.UNSUPPORTED.value
    assert answer.message.startswith("there is no NVIDIA driver here")


def test_copies_that_fail_leave_the_rest_as_it_is(copier, lent, monkeypatch):
    copier.do(frames.Open(1, GPU, lent.handle, 100), [])
    for call, frame in (
        ("cuMemcpyDtoHAsync_v2", frames.Read(1, 0, 4)),
        ("cuMemcpyHtoDAsync_v2", frames.Write(1, 0, 4)),
        ("cuStreamSynchronize", frames.Read(1, 0, 4)),
    ):
        monkeypatch.setenv("FAKE_CUDA", f"{call}=1")
        answer, _ = copy(copier, frame)
        assert answer == frames.Answer(Kind.INVALID.value, f"{call} says error (1)")
        monkeypatch.delenv("FAKE_CUDA")
        assert copy(copier, frame)[0] == frames.Answer()
    monkeypatch.setenv("FAKE_CUDA", "cuMemcpyDtoHAsync_v2=700")
    with pytest.raises(DeviceLost, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        copy(copier, frames.Read(1, 0, 4))


def test_a_descriptor_that_did_not_arrive_is_told(copier, lent):
    copier.do(frames.Open(1, GPU, lent.handle, 100), [])
    answer = copier.do(frames.Read(1, 0, 4), [])
    assert answer == frames.Answer(Kind.OVERLOADED.value, "the process that copies is out of file descriptors")


def test_everything_asked_is_answered_in_order_and_the_end_is_noticed(copier, lent, monkeypatch):
    ours, theirs = channel.pair()
    with ours, theirs:
        for frame in (frames.Open(1, GPU, lent.handle, 100), frames.Open(2, GPU, lent.handle, 101), frames.Close(1)):
            ours.send(frames.encode(frame))
        ours.shutdown(socket.SHUT_WR)
        serve(theirs, copier)
        answers = [frames.decode_answer(channel.receive(ours)[0]) for _ in range(3)]
        assert [answer.kind for answer in answers] == ["", Kind.INVALID.value, ""]
    ours, theirs = channel.pair()
    with ours, theirs:
        monkeypatch.setenv("FAKE_CUDA", "cuIpcOpenMemHandle_v2=700")
        ours.send(frames.encode(frames.Open(1, GPU, lent.handle, 100)))
        with pytest.raises(DeviceLost):
            serve(theirs, copier)
        assert frames.decode_answer(channel.receive(ours)[0]).kind == Kind.NOT_READY.value

"""Frames and memory descriptors over a socket pair, both ends in this process."""

import asyncio
import errno
import gc
import os
from pathlib import Path

import pytest

from headrace.workers import channel
from headrace.workers.arena import Segment
from headrace.workers.channel import INLINE_BYTES, Channel, receive, send_blocking


def open_descriptors():
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture(autouse=True)
def no_descriptor_leaks():
    before = open_descriptors()
    yield
    assert open_descriptors() == before


@pytest.fixture
def ends(no_descriptor_leaks):
    ours, theirs = channel.pair()
    with ours, theirs:
        yield ours, theirs


class Front:
    """A channel that keeps what comes."""

    def __init__(self, sock):
        self.frames = []
        self.came = asyncio.Event()
        self.channel = Channel(sock, self._on_frame)

    def _on_frame(self, frame, descriptors):
        self.frames.append((frame, descriptors))
        self.came.set()

    async def wait_for(self, count):
        async with asyncio.timeout(60):
            while len(self.frames) < count:
                self.came.clear()
                await self.came.wait()
        return self.frames


@pytest.fixture
async def front(ends):
    made = Front(ends[0])
    yield made
    made.channel.close()


async def test_frames_keep_their_borders_and_their_order(ends, front):
    for frame in (b"one", b"t", b"three" * 100):
        send_blocking(ends[1], frame)
    assert [frame for frame, _ in await front.wait_for(3)] == [b"one", b"t", b"three" * 100]


async def test_the_worker_reads_what_the_front_sends(ends, front):
    front.channel.send(b"one")
    front.channel.send(b"two")
    assert [receive(ends[1]) for _ in range(2)] == [(b"one", []), (b"two", [])]


async def test_memory_travels_along_and_its_descriptor_is_closed_here_once_it_is_sent(ends, front):
    segment, descriptor = Segment.create(65536)
    front.channel.send(b"run", [descriptor])
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    frame, (passed,) = receive(ends[1])
    theirs = Segment(passed, 65536)
    assert frame == b"run"
    assert not os.get_inheritable(passed)
    os.close(passed)
    theirs.view[:5] = b"hello"
    assert bytes(segment.view[:5]) == b"hello"


async def test_the_workers_descriptors_stay_its_own(ends, front):
    _, descriptor = Segment.create(65536)
    send_blocking(ends[1], b"done", [descriptor])
    os.fstat(descriptor)
    os.close(descriptor)
    ((_, (passed,)),) = await front.wait_for(1)
    os.close(passed)


@pytest.mark.parametrize("nbytes", [INLINE_BYTES, INLINE_BYTES + 1, 3_000_000])
async def test_frames_of_any_size_arrive_whole_both_ways(ends, front, nbytes):
    frame = os.urandom(nbytes)
    front.channel.send(frame)
    assert receive(ends[1]) == (frame, [])
    send_blocking(ends[1], frame)
    assert await front.wait_for(1) == [(frame, [])]


async def test_a_large_frame_can_bring_memory_as_well(ends, front):
    _, descriptor = Segment.create(65536)
    front.channel.send(b"x" * 100_000, [descriptor])
    frame, (passed,) = receive(ends[1])
    assert (len(frame), os.fstat(passed).st_size) == (100_000, 65536)
    os.close(passed)


async def test_a_worker_that_does_not_read_does_not_stop_the_front(ends, front):
    count = 2000
    descriptors = [Segment.create(65536)[1] if number % 500 == 0 else None for number in range(count)]
    for number, descriptor in enumerate(descriptors):
        front.channel.send(b"%d" % number + b"." * 1000, [] if descriptor is None else [descriptor])
    ends[1].setblocking(False)
    received = []
    async with asyncio.timeout(60):
        while len(received) < count:
            try:
                received.append(receive(ends[1]))
            except BlockingIOError:
                await asyncio.sleep(0)
    assert [int(frame.split(b".")[0]) for frame, _ in received] == list(range(count))
    for number, (_, passed) in enumerate(received):
        assert len(passed) == (number % 500 == 0)
        for descriptor in passed:
            os.close(descriptor)
    front.channel.send(b"after")
    assert receive(ends[1]) == (b"after", [])


async def test_closing_drops_what_was_not_sent_and_leaks_nothing(ends, front):
    for _ in range(2000):
        front.channel.send(b"." * 1000)
    front.channel.send(b"last", [Segment.create(65536)[1]])
    front.channel.send(b"x" * 100_000)
    front.channel.close()
    front.channel.close()
    front.channel.send(b"late", [Segment.create(65536)[1]])
    front.channel.send(b"x" * 100_000)


async def test_sending_to_one_that_has_gone_is_no_error_and_leaks_nothing(ends, front):
    ends[1].close()
    for _ in range(3):
        front.channel.send(b"run", [Segment.create(65536)[1]])
        front.channel.send(b"x" * 100_000)
    await asyncio.sleep(0)


async def test_what_a_worker_said_before_it_went_is_still_heard(ends, front):
    send_blocking(ends[1], b"one")
    send_blocking(ends[1], b"two")
    ends[1].close()
    front.channel.read()
    assert [frame for frame, _ in front.frames] == [b"one", b"two"]
    front.channel.read()
    assert len(front.frames) == 2


async def test_a_backlog_to_one_that_went_is_thrown_away(ends, front):
    for _ in range(2000):
        front.channel.send(b"." * 1000)
    assert front.channel._unsent
    ends[1].close()
    async with asyncio.timeout(60):
        while front.channel._unsent:
            await asyncio.sleep(0)


async def test_a_frame_may_close_the_channel(ends):
    def on_frame(frame, descriptors):
        heard.append(frame)
        made.close()

    heard = []
    made = Channel(ends[0], on_frame)
    send_blocking(ends[1], b"one")
    send_blocking(ends[1], b"two")
    made.read()
    assert heard == [b"one"]


def test_the_worker_sees_the_end(ends):
    ends[0].close()
    assert receive(ends[1]) == (b"", [])


def out_of_descriptors(*_, **__):
    raise OSError(errno.EMFILE, "Too many open files")


@pytest.mark.parametrize("call", ["memfd_create", "fdopen"])
async def test_a_large_frame_that_cannot_be_written_leaves_nothing_and_its_memory_to_whoever_sends_it(
    ends, front, monkeypatch, call
):
    _, descriptor = Segment.create(65536)
    with monkeypatch.context() as patch:
        patch.setattr(channel.os, call, out_of_descriptors)
        with pytest.raises(OSError, match="Too many open files"):
            front.channel.send(b"x" * 100_000, [descriptor])
    os.close(descriptor)
    front.channel.send(b"after")
    assert receive(ends[1]) == (b"after", [])


async def test_a_large_frame_whose_reader_is_gone_leaves_nothing_at_the_worker(ends):
    ends[0].close()
    with pytest.raises(OSError, match="Broken pipe"):
        send_blocking(ends[1], b"x" * 100_000)


async def test_a_large_frame_that_cannot_be_mapped_is_one_that_cannot_be_read(ends, front, monkeypatch):
    """Whoever expects it is told so then. It was taken for the end of all frames, of a worker that is there."""
    _, descriptor = Segment.create(65536)
    with monkeypatch.context() as patch:
        patch.setattr(channel.mmap, "mmap", out_of_descriptors)
        send_blocking(ends[1], b"x" * 100_000, [descriptor])
        os.close(descriptor)
        await front.wait_for(1)
    send_blocking(ends[1], b"after")
    assert await front.wait_for(2) == [(b"\xc1", []), (b"after", [])]

"""The worker's end of its socket, used by several threads over a real socket pair."""

import contextlib
import gc
import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from headrace.workers import channel, conversation
from headrace.workers.arena import Segment
from headrace.workers.channel import receive, send_blocking
from headrace.workers.conversation import Conversation, ConversationEnded
from headrace.workers.frames import CallAnswer, Cancel, Credit, Ended, Run, Stop, Unload, decode_from_worker, encode

WAIT_S = 60


def open_descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def leaked(before):
    """How many descriptors more than ``before`` are open that no garbage holds."""
    if open_descriptors() > before:
        gc.collect()
    return max(0, open_descriptors() - before)


@pytest.fixture(autouse=True)
def no_descriptor_leaks():
    before = open_descriptors()
    yield
    assert leaked(before) == 0


class Ends:
    """Both ends of a socket, and what was dealt with at once: credits and answers of calls."""

    def __init__(self):
        self.front, theirs = channel.pair()
        self.worker = theirs
        self.taken = []
        self.fails_on = None
        self.conversation = Conversation(theirs, self._on_message)
        self.changed = threading.Event()

    def _on_message(self, frame, descriptors):
        if self.fails_on is type(frame):
            raise RuntimeError("no room for it")
        if isinstance(frame, Credit | Cancel | CallAnswer):
            self.taken.append(frame)
            return True
        return False

    def tell(self, frame, descriptors=()):
        send_blocking(self.front, encode(frame), descriptors)

    def heard(self):
        return decode_from_worker(receive(self.front)[0])

    def came(self, number):
        """Whether credit for this sequence has come."""
        return lambda: any(isinstance(one, Credit) and one.sequence == number for one in self.taken)


@pytest.fixture
def ends(no_descriptor_leaks):
    made = Ends()
    yield made
    made.front.close()
    made.worker.close()


@pytest.fixture
def pool(ends):
    with ThreadPoolExecutor(8) as made:
        yield made
        # So that a thread that waits in vain fails its test, and does not hang it.
        ends.front.close()
        with contextlib.suppress(ConversationEnded):
            ends.conversation.wait_until(lambda: False)


def blocked(ends, monkeypatch):
    """An event that is set as soon as somebody is about to block in reading."""
    reading = threading.Event()
    original = channel.receive

    def watched(sock, flags=0):
        if not flags:
            reading.set()
        return original(sock, flags)

    monkeypatch.setattr(conversation.channel, "receive", watched)
    return reading


def nothing():
    return False


def test_who_looks_out_gets_what_comes_and_sleeps_when_nothing_does(ends, pool, monkeypatch):
    ends.tell(Unload(1))
    assert ends.conversation.take(nothing, look_ns=60 * 10**9)[0] == Unload(1)
    reading = blocked(ends, monkeypatch)
    later = pool.submit(ends.conversation.take, nothing, 60 * 10**9)
    ends.tell(Unload(2))
    assert later.result(WAIT_S)[0] == Unload(2)
    assert not reading.is_set()
    later = pool.submit(ends.conversation.take, nothing, 1000)
    assert reading.wait(WAIT_S)
    ends.tell(Unload(3))
    assert later.result(WAIT_S)[0] == Unload(3)


def test_frames_come_in_their_order_and_what_is_dealt_with_at_once_is_not_among_them(ends):
    for frame in (Unload(1), Credit(5, 2), Unload(2), Cancel(5), Stop()):
        ends.tell(frame)
    got = [ends.conversation.take(nothing)[0] for _ in range(3)]
    assert got == [Unload(1), Unload(2), Stop()]
    assert ends.taken == [Credit(5, 2), Cancel(5)]


def test_the_main_loop_does_not_wait_while_there_is_other_work(ends):
    assert ends.conversation.take(lambda: True) is None
    ends.tell(Unload(1))
    assert ends.conversation.take(lambda: True) == (Unload(1), [])


def test_what_is_dealt_with_at_once_may_make_other_work(ends):
    ends.tell(Credit(1, 16))
    assert ends.conversation.take(ends.came(1)) is None


def test_descriptors_go_with_frames_that_are_taken_and_are_closed_with_the_others(ends):
    _, descriptor = Segment.create(4096)
    ends.tell(CallAnswer(1, True), [descriptor])
    ends.tell(Run(0, 1, 0, 4096, (), ()), [descriptor])
    os.close(descriptor)
    frame, (passed,) = ends.conversation.take(nothing)
    assert isinstance(frame, Run)
    assert os.fstat(passed).st_size == 4096
    os.close(passed)


def test_a_thread_waits_for_its_own_and_leaves_the_rest_for_the_main_loop(ends, pool):
    waiting = pool.submit(ends.conversation.wait_until, ends.came(7))
    for frame in (Unload(1), Credit(6, 1), Unload(2), Credit(7, 1)):
        ends.tell(frame)
    waiting.result(WAIT_S)
    assert [ends.conversation.take(nothing)[0] for _ in range(2)] == [Unload(1), Unload(2)]


def test_whoever_reads_hands_out_what_others_wait_for(ends, pool):
    numbers = list(range(8))
    waiting = {number: pool.submit(ends.conversation.wait_until, ends.came(number)) for number in numbers}
    for number in reversed(numbers):  # the first to wait reads, and has its own last
        ends.tell(Credit(number, 1))
        waiting.pop(number).result(WAIT_S)


def test_every_one_of_many_threads_has_all_that_it_waits_for(ends, pool):
    rounds, threads = 50, 6
    ready = threading.Barrier(threads + 1)

    def wait(number):
        for turn in range(rounds):
            ready.wait(WAIT_S)
            ends.conversation.wait_until(ends.came(turn * threads + number))

    working = [pool.submit(wait, number) for number in range(threads)]
    for turn in range(rounds):
        ready.wait(WAIT_S)
        for number in range(threads):
            ends.tell(Credit(turn * threads + number, 1))
    for one in working:
        one.result(WAIT_S)


def test_main_loop_and_threads_at_once_lose_nothing(ends, pool):
    count = 300

    def wait(number):
        for sequence in range(number, count, 3):
            ends.conversation.wait_until(ends.came(sequence))

    def main():
        return [ends.conversation.take(nothing)[0].instance for _ in range(count)]

    working = [pool.submit(wait, number) for number in range(3)]
    loop = pool.submit(main)
    for number in range(count):
        ends.tell(Unload(number))
        ends.tell(Credit(number, 1))
    assert loop.result(WAIT_S) == list(range(count))
    for one in working:
        one.result(WAIT_S)


def test_a_look_at_the_socket_that_finds_nothing_does_not_leave_anybody_without_a_reader(ends, pool, monkeypatch):
    """Who begins to wait while the main loop looks must read by itself when that has found nothing."""
    follower = threading.Event()
    original = channel.receive

    def looked_at(sock, flags=0):
        if flags:
            waiting.append(pool.submit(ends.conversation.wait_until, happened))
            assert follower.wait(WAIT_S)
            # It has seen that there is a reader, and has let go of the conversation: it waits.
            with ends.conversation._changed:
                pass
            raise BlockingIOError
        return original(sock, flags)

    def happened():
        follower.set()
        return ends.came(1)()

    waiting = []
    monkeypatch.setattr(conversation.channel, "receive", looked_at)
    assert ends.conversation.take(lambda: True) is None
    ends.tell(Credit(1, 1))
    waiting[0].result(WAIT_S)


def test_whoever_waits_hears_of_the_end(ends, pool):
    waiting = [pool.submit(ends.conversation.wait_until, nothing) for _ in range(4)]
    ends.tell(Unload(1))
    ends.front.close()
    for one in waiting:
        with pytest.raises(ConversationEnded):
            one.result(WAIT_S)
    assert ends.conversation.take(nothing)[0] == Unload(1), "what was said before is still heard"
    for otherwise in (nothing, lambda: True):
        with pytest.raises(ConversationEnded):
            ends.conversation.take(otherwise)


def test_what_has_happened_already_does_not_need_anybody_at_the_other_end(ends):
    ends.front.close()
    with pytest.raises(ConversationEnded):
        ends.conversation.poll()
    ends.conversation.wait_until(lambda: True)


@pytest.mark.parametrize("how", ["no frame", "a failing reader", "a broken socket"])
def test_what_cannot_be_dealt_with_ends_the_conversation_for_everybody(ends, pool, monkeypatch, caplog, how):
    reading = blocked(ends, monkeypatch)
    first = pool.submit(ends.conversation.wait_until, nothing)
    assert reading.wait(WAIT_S)
    others = [pool.submit(ends.conversation.wait_until, nothing) for _ in range(2)]
    _, descriptor = Segment.create(4096)
    if how == "no frame":
        send_blocking(ends.front, b"\x93\x63", [descriptor])
    elif how == "a failing reader":
        ends.fails_on = CallAnswer
        ends.tell(CallAnswer(1, True), [descriptor])
    else:

        def broken(sock, flags=0):
            raise OSError(12, "Cannot allocate memory")

        monkeypatch.setattr(conversation.channel, "receive", broken)
        ends.tell(Credit(1, 1))  # the reader has it, and reads on
    os.close(descriptor)
    error = first.exception(WAIT_S)
    assert error is not None
    assert not isinstance(error, ConversationEnded)
    for one in others:
        assert isinstance(one.exception(WAIT_S), ConversationEnded | OSError)
    with pytest.raises(ConversationEnded):
        ends.conversation.take(nothing)
    assert ("cannot be dealt with" in caplog.text) == (how != "a broken socket")


def test_threads_may_send_while_another_waits(ends, pool):
    waiting = pool.submit(ends.conversation.wait_until, ends.came(1))
    sending = [pool.submit(ends.conversation.send, Ended(number)) for number in range(20)]
    assert sorted(ends.heard().sequence for _ in range(20)) == list(range(20))
    for one in sending:
        one.result(WAIT_S)
    ends.tell(Credit(1, 1))
    waiting.result(WAIT_S)


def test_sent_descriptors_stay_the_senders(ends):
    _, descriptor = Segment.create(4096)
    ends.conversation.send(Ended(1), [descriptor])
    os.fstat(descriptor)
    os.close(descriptor)
    data, (passed,) = receive(ends.front)
    assert decode_from_worker(data) == Ended(1)
    os.close(passed)


def test_the_other_end_may_be_gone_in_the_middle_of_a_wait(ends, pool, monkeypatch):
    reading = blocked(ends, monkeypatch)
    waiting = pool.submit(ends.conversation.wait_until, nothing)
    assert reading.wait(WAIT_S)
    ends.front.shutdown(socket.SHUT_RDWR)
    with pytest.raises(ConversationEnded):
        waiting.result(WAIT_S)

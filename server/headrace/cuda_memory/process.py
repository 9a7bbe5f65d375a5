"""The front's side of the copier: started when it is first asked for something, ended when it holds nothing."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from functools import partial

from headrace.core.errors import Kind, NotReady, Overloaded, of_kind
from headrace.cuda_memory import frames
from headrace.workers import channel
from headrace.workers.spawn import Spawned, cause_of_end, spawn

log = logging.getLogger(__name__)

MODULE = "headrace.cuda_memory.copier"
MAX_ASKED = 1024  # copies and the like that are not done yet; each holds a descriptor
ANSWER_TIMEOUT_S = 60.0  # for one thing; the first includes that the driver wakes its GPUs


class CopierProcess:
    """Asks the process one thing after the other, and is told of its end. Used on the event loop only.

    ``on_end`` is given the reason when it has ended without having been told to, with all that it held; the next
    thing that is asked starts another one.
    """

    def __init__(self, log_format: str, on_end: Callable[[str], None]) -> None:
        self.answer_timeout_s = ANSWER_TIMEOUT_S
        self._log_format = log_format
        self._on_end = on_end
        self._spawned: Spawned | None = None
        self._channel: channel.Channel | None = None
        self._exits: set[asyncio.Future[None]] = set()  # of every process that has not ended yet
        self._asked: deque[asyncio.Future[None]] = deque()  # in the order in which they will be answered
        self._timer: asyncio.TimerHandle | None = None

    @property
    def busy(self) -> bool:
        """Whether something is not answered yet."""
        return bool(self._asked)

    def ask(self, frame: frames.ToCopier, descriptor: int = -1) -> asyncio.Future[None]:
        """Have something done; the future fails with why it is not. The descriptor is taken over.

        Raises:
            Overloaded: too much was asked already, or there can be no process now.
        """
        descriptors = [descriptor] if descriptor >= 0 else []
        try:
            running = self._room_for(frame)
        except BaseException:
            channel.close_all(descriptors)
            raise
        running.send(frames.encode(frame), descriptors)
        answer = asyncio.get_running_loop().create_future()
        answer.add_done_callback(_look)
        self._asked.append(answer)
        if self._timer is None:
            self._watch()
        return answer

    def end(self) -> None:
        """End the process, which holds nothing any more."""
        if self._spawned is not None:
            self._spawned.process.kill()  # what it had of the GPU goes with it; nothing has to be tidied up
            self._forget("it was ended")

    async def close(self, grace_s: float = 5.0) -> None:
        """End the process, and wait a little until it has ended: a driver may keep it from that."""
        self.end()
        if self._exits:
            await asyncio.wait(self._exits, timeout=grace_s)

    def _room_for(self, frame: frames.ToCopier) -> channel.Channel:
        """Where to send it."""
        if len(self._asked) >= MAX_ASKED and not isinstance(frame, frames.Close):  # there are no more than regions
            raise Overloaded(f"{MAX_ASKED} copies from and to GPUs are waiting, which is the most")
        return self._channel or self._start()

    def _start(self) -> channel.Channel:
        try:
            spawned = spawn("cuda-memory", shared=True, threads=1, log_format=self._log_format, module=MODULE)
        except OSError as error:
            raise Overloaded(f"no process for the memory of GPUs can be started now: {error}") from error
        self._exits.add(spawned.exited)
        spawned.exited.add_done_callback(partial(self._on_exit, spawned))
        self._spawned = spawned
        self._channel = channel.Channel(spawned.socket, self._on_frame)
        return self._channel

    def _on_frame(self, data: bytes, descriptors: list[int]) -> None:
        channel.close_all(descriptors)
        answer = frames.decode_answer(data)
        future = self._asked.popleft()
        if not future.done():
            if answer.kind:
                future.set_exception(of_kind(Kind(answer.kind), answer.message))
            else:
                future.set_result(None)
        if answer.kind == Kind.NOT_READY.value:  # its last word: a GPU is lost to it
            self._kill(answer.message)
        else:
            self._watch()

    def _watch(self) -> None:
        """Give the process its time for what is to be answered next."""
        if self._timer is not None:
            self._timer.cancel()
        waits = bool(self._asked)
        self._timer = asyncio.get_running_loop().call_later(self.answer_timeout_s, self._overdue) if waits else None

    def _overdue(self) -> None:
        self._kill(f"it gave no answer within {self.answer_timeout_s:g} s")

    def _kill(self, cause: str) -> None:
        """End a process that can do nothing more, and do not wait for that: a driver may keep it from ending."""
        assert self._spawned is not None, "nobody waits for no process"
        self._spawned.process.kill()
        self._lose(cause)

    def _on_exit(self, spawned: Spawned, exited: asyncio.Future[None]) -> None:
        self._exits.discard(exited)
        status = spawned.process.wait()
        if spawned is self._spawned and self._channel is not None:  # else it was told to end
            self._channel.read()  # what it still said
            self._lose(cause_of_end(status))

    def _lose(self, cause: str) -> None:
        log.warning("the process that holds clients' GPU memory has ended: %s", cause)
        self._forget(cause)
        self._on_end(cause)

    def _forget(self, cause: str) -> None:
        assert self._channel is not None, "there is one for as long as there is a process"
        self._channel.close()
        self._spawned = self._channel = None
        asked, self._asked = self._asked, deque()
        self._watch()
        for future in asked:
            if not future.done():
                future.set_exception(NotReady(f"the process that holds the memory of GPUs has ended: {cause}"))


def _look(answer: asyncio.Future[None]) -> None:
    """An error that nobody waits for any more is not worth a line in the log."""
    if not answer.cancelled():
        answer.exception()

"""The bounded queue of one version of a stateful model: requests go in, each instance takes those of its sequences."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from time import monotonic_ns

from headrace.batching.drain import Drain
from headrace.batching.pending import Pending
from headrace.batching.policy import BatchLimits
from headrace.batching.queue import BatchQueue
from headrace.batching.sequence_backlog import SequenceBacklog
from headrace.batching.sequence_marks import id_control
from headrace.batching.sequences import Sequences
from headrace.batching.sweep import Sweep
from headrace.core.errors import InvalidRequest, Kind, Overloaded, of_kind
from headrace.core.sequence import SequenceSpec

MAX_TIMER_S = 3600.0  # no timer runs longer; whoever idles longer is looked at again


class SequenceQueue:
    """The async shell round ``Sequences``: to the engine a queue as any other. One event loop owns it.

    ``max_size`` bounds the requests that wait, with a place for their sequence or for one. Each instance has to
    take from its own part, ``for_instance``: with its first ``take`` it is up and gets sequences, with ``lose`` it
    is not any more.
    """

    def __init__(
        self,
        model: str,
        spec: SequenceSpec,
        max_size: int,
        *,
        preserve_order: bool = False,
        clock: Callable[[], int] = monotonic_ns,
    ) -> None:
        self.objective = None  # what waits for its sequence is not foreseen
        self._model = model
        self._spec = spec
        self._max_size = max_size
        self._preserve_order = preserve_order
        self._clock = clock
        self._limits = BatchLimits()
        self._rows = self._limits.max_rows
        self._sequences = Sequences(model, spec.max_idle_us * 1000, self._places(), id_control(spec))
        self._parts: dict[int, InstanceQueue] = {}
        self._refusal: tuple[Kind, str] | None = None
        self._sweep = Sweep()
        self._timer: asyncio.TimerHandle | None = None
        self._drain = Drain()

    def __len__(self) -> int:
        return len(self._sequences)

    @property
    def executing(self) -> int:
        """Batches that were taken and are not finished."""
        return sum(part.executing for part in self._parts.values())

    @property
    def active_sequences(self) -> int:
        """Sequences that have a place in an instance."""
        return self._sequences.active

    def for_instance(self, index: int) -> "InstanceQueue":
        """Where that instance takes its batches."""
        part = self._parts.get(index)
        if part is None:
            part = self._parts[index] = InstanceQueue(
                self, index, self._model, preserve_order=self._preserve_order, clock=self._clock
            )
            part.set_limits(self._limits)
        return part

    def set_limits(self, limits: BatchLimits, places: int = 0) -> None:
        """What batches may be, once the model file has told; only while there are no sequences.

        ``places`` are the sequences that an instance holds, where its owner has not said; 0 for as many as a batch
        has rows.
        """
        self._limits = limits
        self._rows = places or limits.max_rows
        self._sequences.set_places(self._places())
        for part in self._parts.values():
            part.set_limits(limits)

    def put(self, pending: Pending) -> None:
        """Accept one request.

        Raises:
            Overloaded: ``max_size`` requests wait already.
            HeadraceError: the queue refuses everything for now.
        """
        self.make_room()
        self.put_part(pending)

    def put_part(self, pending: Pending) -> None:
        """Accept a request for which ``make_room`` was called. One that fits no sequence is answered at once."""
        try:
            heads = self._sequences.accept(pending, self._clock())
        except InvalidRequest as error:
            pending.fail(error)
        else:
            self._hand_out(heads)

    def levels(self) -> dict[int, int]:
        """Requests that wait, by priority level: there are none."""
        return {}

    def make_room(self, priority: int = 0, deadline_ns: int = 0, rows: int = 1, late_ns: int = 0) -> None:  # noqa: ARG002
        """See that one more request fits. When its turn would come depends on its sequence, which nobody can foretell.

        Raises:
            Overloaded: ``max_size`` requests wait already.
            HeadraceError: the queue refuses everything for now.
        """
        if self._refusal is not None:
            raise of_kind(*self._refusal)
        if len(self._sequences) < self._max_size:
            return
        if self._sweep.due(self._clock()):
            for part in self._parts.values():
                part.drop_dead()
            self._sequences.drop_dead()
        if len(self._sequences) >= self._max_size:
            raise Overloaded(
                f"Exceeds maximum queue size: model '{self._model}' has {self._max_size} requests waiting", "queue_full"
            )

    def lose(self, index: int, cause: str) -> None:
        """The instance's worker has died: every sequence that was begun there ends, with an error that says so."""
        self.for_instance(index).clear()
        self._hand_out(self._sequences.lose(index, cause))
        self.notice_idle()

    def refuse(self, kind: Kind, message: str) -> None:
        """Answer everything that waits, and whatever comes until ``accept``, with this error."""
        self._refusal = (kind, message)
        for part in self._parts.values():
            part.clear()
        self._sequences.refuse(kind, message)
        self.notice_idle()

    def accept(self) -> None:
        """Take requests again."""
        self._refusal = None

    async def drained(self) -> None:
        """Return once nothing waits and nothing executes. No more requests may come, so that idle sequences end."""
        self._hand_out(self._sequences.close())
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._sequences or self.executing:
            await self._drain.wait()

    def another(self) -> "InstanceQueue":
        """Where an instance takes its batches that comes beside those that there are."""
        return self.for_instance(max(self._parts, default=-1) + 1)

    # -- what the instances' parts tell -------------------------------------------------------------------

    def opened(self, index: int) -> None:
        """The instance asks for work, so it is up."""
        self._hand_out(self._sequences.open(index))

    def leave(self, index: int) -> None:
        """The instance gets no further sequences."""
        self._hand_out(self._sequences.leave(index))

    def held_by(self, index: int) -> int:
        """Sequences that the instance has."""
        return self._sequences.held_by(index)

    def forget(self, index: int) -> None:
        """The instance is gone, and holds nothing."""
        self._sequences.forget(index)
        del self._parts[index]

    def backlog(self, limits: BatchLimits) -> SequenceBacklog:
        """A backlog for an instance's heads."""
        return SequenceBacklog(
            limits, self._spec, take=self._sequences.take, put_back=self._sequences.put_back, skip=self._skip
        )

    def answered(self, batch: Sequence[Pending]) -> None:
        """A batch is finished: what comes next of its sequences may be run."""
        now_ns = self._clock()
        for pending in batch:
            self._hand_out(self._sequences.finish(pending, now_ns))
        self._watch_idleness()

    def notice_idle(self) -> None:
        """Something has come to an end: perhaps it was the last."""
        if self._drain.waiting and not self._sequences and not self.executing:
            self._drain.tell()

    # -- the shell ----------------------------------------------------------------------------------------

    def _places(self) -> int:
        if self._spec.strategy == "oldest" and self._spec.max_candidates:
            return self._spec.max_candidates
        return self._rows

    def _hand_out(self, heads: Iterable[Pending]) -> None:
        for head in heads:
            self._parts[self._sequences.instance_of(head)].put_part(head)

    def _skip(self, dead: Pending) -> list[Pending]:
        heads = self._sequences.skip(dead, self._clock())
        self._watch_idleness()
        return heads

    def _watch_idleness(self) -> None:
        due_ns = self._sequences.next_expiry_ns
        if self._timer is None and due_ns is not None:
            delay_s = min(max(0.0, (due_ns - self._clock()) * 1e-9), MAX_TIMER_S)
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._expire)

    def _expire(self) -> None:
        self._timer = None
        self._hand_out(self._sequences.expire(self._clock()))
        self._watch_idleness()


class InstanceQueue(BatchQueue):
    """The part of a ``SequenceQueue`` that one instance takes from: it holds the heads of the instance's sequences."""

    def __init__(
        self, whole: SequenceQueue, index: int, model: str, *, preserve_order: bool, clock: Callable[[], int]
    ) -> None:
        super().__init__(model, BatchLimits(), 0, preserve_order=preserve_order, clock=clock)
        self._whole = whole
        self._index = index

    def set_limits(self, limits: BatchLimits, places: int = 1) -> None:  # noqa: ARG002 - the whole has the places
        """What batches may be; only while the part is empty."""
        assert not self._backlog, "limits are set before the first request"
        self._backlog = self._whole.backlog(limits)

    async def take(self) -> list[Pending]:
        """The next batch, as soon as the policy closes one. The caller owes one ``finished`` call for it."""
        self._whole.opened(self._index)
        return await super().take()

    async def ready(self) -> None:
        """Return when the policy would close a batch; whether it still does is for ``take_now`` to say."""
        self._whole.opened(self._index)
        await super().ready()

    def finished(self, batch: Sequence[Pending]) -> None:
        """A batch that was taken is answered, failed or put back."""
        self._whole.answered(batch)
        super().finished(batch)

    def ran(self, batch: Sequence[Pending], rows: int, took_ns: int, now_ns: int) -> None:
        """A batch has run: nothing is foreseen of sequences, so nothing is learned."""

    def lose(self, cause: str) -> None:
        """The instance's worker has died, and the sequences that were begun there with it."""
        self._whole.lose(self._index, cause)

    def successor(self) -> "InstanceQueue":
        """Where another instance takes its batches that is to take the place of this part's."""
        return self._whole.another()

    def leave(self) -> None:
        """Its instance is to keep the sequences that it has and get no more."""
        self._whole.leave(self._index)

    @property
    def held(self) -> int:
        """Sequences that its instance alone can go on with."""
        return self._whole.held_by(self._index)

    def close(self) -> None:
        """Its instance is gone, and nothing is held."""
        self._whole.forget(self._index)

    def drop_dead(self) -> None:
        """Forget heads that nobody waits for."""
        self._backlog.drop_dead()
        self.nudge()

    def clear(self) -> None:
        """Let go of the heads: somebody else has dealt with them."""
        self._backlog.clear()

    def _notice_idle(self) -> None:
        self._whole.notice_idle()

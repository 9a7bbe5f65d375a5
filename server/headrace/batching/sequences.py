"""The sequences of one model: where each is served, and what waits of it. Pure: times are handed in."""

from collections import OrderedDict, deque
from heapq import heappop, heappush
from itertools import count

from headrace.batching.pending import Pending
from headrace.batching.sequence_marks import SequenceId, begins, read_marks
from headrace.core.errors import InternalError, InvalidRequest, Kind, of_kind
from headrace.core.sequence import ControlSpec

MAX_REMEMBERED = 4096  # sequences that were broken off, whose clients are told why


class LiveSequence:
    """One sequence. Of its requests one runs at a time, and ``waiting`` are those that come after.

    It has a place (``instance`` and ``slot``) or waits for one (then both are -1). Requests that begin it anew wait
    in line with the others. ``begun``: a request of the present one was taken. ``ended``: the last request that
    was accepted ends it, so that only one that begins it anew may follow.
    """

    __slots__ = ("begun", "ended", "id", "instance", "number", "running", "slot", "waiting")

    def __init__(self, number: int, identity: SequenceId) -> None:
        self.number = number
        self.id = identity
        self.instance = -1
        self.slot = -1
        self.waiting: deque[Pending] = deque()
        self.running: Pending | None = None
        self.begun = False
        self.ended = False


class _Places:
    """Those of one instance. A closed one, whose worker is down, is given no sequences; nor is a ``leaving`` one."""

    __slots__ = ("free", "held", "is_open", "leaving")

    def __init__(self, places: int) -> None:
        self.is_open = False
        self.leaving = False
        self.held: dict[int, LiveSequence] = {}
        self.free = list(range(places))  # a heap: low slots make small batches where each is a fixed row


class Sequences:
    """Every live sequence of a model, by id.

    A sequence has one of the places of an instance until it ends; one that finds none free waits, and its requests
    with it. Many methods return heads: first waiting requests that may be run now, because nothing of their
    sequence runs and it has a place. A head is handed out once, and ``take`` or ``skip`` is called for it then.
    """

    def __init__(self, model: str, max_idle_ns: int, places: int = 1, told: ControlSpec | None = None) -> None:
        self._model = model
        self._told = told  # where the model is told of ids
        self._max_idle_ns = max_idle_ns
        self._places = places  # that each instance has
        self._instances: dict[int, _Places] = {}
        self._by_id: dict[SequenceId, LiveSequence] = {}
        self._by_number: dict[int, LiveSequence] = {}
        self._unplaced: OrderedDict[int, LiveSequence] = OrderedDict()  # as long as it has some, no place is free
        self._idle_since: OrderedDict[int, int] = OrderedDict()  # of those of which nothing waits or runs
        self._broken_off: OrderedDict[SequenceId, str] = OrderedDict()  # why
        self._numbers = count(1)
        self._waiting = 0
        self._closed = False

    def __len__(self) -> int:
        """Requests that wait, with a place or for one."""
        return self._waiting

    @property
    def active(self) -> int:
        """Sequences that have a place."""
        return len(self._by_number) - len(self._unplaced)

    @property
    def next_expiry_ns(self) -> int | None:
        """When the next sequence will have idled too long; None while none idles."""
        if not self._idle_since:
            return None
        return next(iter(self._idle_since.values())) + self._max_idle_ns

    def set_places(self, places: int) -> None:
        """How many sequences an instance may have; only while there are none."""
        assert not self._by_number, "places are set before the first request"
        self._places = places
        for instance in self._instances.values():
            instance.free = list(range(places))

    def instance_of(self, head: Pending) -> int:
        """Where the request is to run."""
        return self._by_number[head.sequence].instance

    # -- requests come and go -----------------------------------------------------------------------------

    def accept(self, pending: Pending, now_ns: int) -> list[Pending]:
        """One more request; gives back heads.

        Raises:
            InvalidRequest: it is not one of a sequence, or its sequence was not begun, or the model cannot take its id.
        """
        marks = read_marks(self._model, pending.request.parameters, self._told)
        if pending.rows != 1:
            raise InvalidRequest(
                f"model '{self._model}': a request of a sequence has {pending.rows} rows, expected 1: "
                "every row would be a sequence of its own"
            )
        sequence = self._find(marks.id)
        if marks.start:
            self._broken_off.pop(marks.id, None)
        elif sequence is None or sequence.ended:
            raise self._not_begun(marks.id)
        if sequence is None:
            sequence = self._make(marks.id)
        sequence.ended = marks.end
        sequence.waiting.append(pending)
        self._waiting += 1
        pending.sequence = sequence.number
        self._idle_since.pop(sequence.number, None)
        if len(sequence.waiting) > 1 or sequence.running is not None or sequence.instance < 0:
            return []
        return self._advance(sequence, now_ns)

    def take(self, head: Pending) -> None:
        """The head goes into a batch. ``finish`` is owed for it."""
        sequence = self._by_number[head.sequence]
        assert sequence.running is None, "one request of a sequence runs at a time"
        assert sequence.waiting[0] is head, "the requests of a sequence run in their order"
        sequence.waiting.popleft()
        self._waiting -= 1
        sequence.running = head
        sequence.begun = True
        head.slot = sequence.slot

    def put_back(self, pending: Pending) -> bool:
        """One that was taken has not run and is its sequence's head again; false where that is lost meanwhile."""
        sequence = self._by_number.get(pending.sequence)
        if sequence is None or sequence.running is not pending:
            return False
        sequence.running = None
        sequence.waiting.appendleft(pending)
        self._waiting += 1
        return True

    def finish(self, pending: Pending, now_ns: int) -> list[Pending]:
        """One that was taken is answered, if it was not put back or lost; gives back heads."""
        sequence = self._by_number.get(pending.sequence)
        if sequence is None or sequence.running is not pending:
            return []
        sequence.running = None
        return self._advance(sequence, now_ns)

    def skip(self, head: Pending, now_ns: int) -> list[Pending]:
        """Nobody waits for the head any more; gives back heads, all of the same instance."""
        assert head.dead, "only what nobody waits for is skipped"
        return self._advance(self._by_number[head.sequence], now_ns)

    def drop_dead(self) -> None:
        """Forget every request that nobody waits for. Dead heads that were handed out must have been skipped."""
        for sequence in list(self._by_number.values()):
            if sequence.waiting:
                self._drop_dead_of(sequence)
                if not sequence.waiting and sequence.instance < 0:
                    self._forget(sequence)

    # -- the world changes --------------------------------------------------------------------------------

    def open(self, index: int) -> list[Pending]:
        """An instance is up and can have sequences; gives back heads."""
        instance = self._instances.get(index)
        if instance is None:
            instance = self._instances[index] = _Places(self._places)
        instance.is_open = not instance.leaving
        return self._fill()

    def leave(self, index: int) -> list[Pending]:
        """An instance is to keep the sequences that it has and get no more; gives back heads.

        Those that have a place there and were not begun go elsewhere only when the instance is lost.
        """
        instance = self._instances.setdefault(index, _Places(self._places))
        instance.is_open, instance.leaving = False, True
        return self._fill()

    def held_by(self, index: int) -> int:
        """Sequences that have a place in an instance."""
        instance = self._instances.get(index)
        return len(instance.held) if instance is not None else 0

    def forget(self, index: int) -> None:
        """An instance that holds nothing is not there any more."""
        instance = self._instances.pop(index, None)
        assert instance is None or not instance.held, "an instance goes when its sequences have"

    def lose(self, index: int, cause: str) -> list[Pending]:
        """An instance's worker has died, and every sequence that was begun there with it; gives back heads.

        What was taken of such a sequence, or waits behind that, is answered with the cause. Sequences that were
        not begun yet have lost nothing and go elsewhere.
        """
        instance = self._instances.get(index)
        if instance is None:
            return []
        instance.is_open = False
        kept = []
        for sequence in sorted(instance.held.values(), key=lambda one: one.number):
            self._vacate(sequence)
            if sequence.begun:
                self._break_off(sequence, f"its worker died ({cause})")
            if sequence.waiting:
                kept.append(sequence)
            else:
                self._forget(sequence)
        for sequence in reversed(kept):  # they had a place before all who wait for one
            self._unplaced[sequence.number] = sequence
            self._unplaced.move_to_end(sequence.number, last=False)
        return self._fill()

    def expire(self, now_ns: int) -> list[Pending]:
        """End what has idled too long; gives back heads."""
        while (due_ns := self.next_expiry_ns) is not None and due_ns <= now_ns:
            number, _ = self._idle_since.popitem(last=False)
            sequence = self._by_number[number]
            self._remember(sequence.id, f"no request of it came for {self._max_idle_ns // 1000} us")
            self._vacate(sequence)
            self._forget(sequence)
        return self._fill()

    def close(self) -> list[Pending]:
        """There will be no more requests, so a sequence has ended once nothing of it waits; gives back heads."""
        self._closed = True
        for number in list(self._idle_since):
            sequence = self._by_number[number]
            self._vacate(sequence)
            self._forget(sequence)
        return self._fill()

    def refuse(self, kind: Kind, message: str) -> None:
        """Answer everything that waits with this error; with that, every sequence is broken off."""
        for sequence in list(self._by_number.values()):
            for one in sequence.waiting:
                one.fail(of_kind(kind, message))
            self._waiting -= len(sequence.waiting)
            sequence.waiting.clear()
            sequence.ended = True
            if sequence.begun:
                self._remember(sequence.id, message)
            if sequence.running is None:
                self._vacate(sequence)
                self._forget(sequence)

    # -- one sequence -------------------------------------------------------------------------------------

    def _find(self, identity: SequenceId) -> LiveSequence | None:
        """The live sequence of this id. What left at the head of one in line is let go, as it is nobody's head yet."""
        sequence = self._by_id.get(identity)
        if sequence is None or sequence.instance >= 0 or not sequence.waiting[0].dead:
            return sequence
        self._drop_dead_of(sequence)
        if sequence.waiting:
            return sequence
        self._forget(sequence)
        return None

    def _advance(self, sequence: LiveSequence, now_ns: int) -> list[Pending]:
        """What can run now that nothing of a sequence with a place runs, and another request is its first."""
        if sequence.waiting and sequence.waiting[0].dead:
            self._drop_dead_of(sequence)
        if not sequence.waiting:
            if sequence.ended or self._closed:
                self._vacate(sequence)
                self._forget(sequence)
                return self._fill()
            self._idle_since[sequence.number] = now_ns
            return []
        if begins(sequence.waiting[0]):
            if sequence.begun and (self._unplaced or self._instances[sequence.instance].leaving):
                # The one before has ended; who begins anew goes behind those that wait for a place already.
                sequence.begun = False
                self._vacate(sequence)
                self._unplaced[sequence.number] = sequence
                return self._fill()
            sequence.begun = False
        return [sequence.waiting[0]]

    def _drop_dead_of(self, sequence: LiveSequence) -> None:
        """Drop its dead requests. With the first one of a sequence goes all that follows it."""
        kept: deque[Pending] = deque()
        headless = False
        for one in sequence.waiting:
            if begins(one):
                headless = one.dead
            if one.dead:
                one.bury()
            elif headless:
                one.fail(self._not_begun(sequence.id))
            else:
                kept.append(one)
        self._waiting -= len(sequence.waiting) - len(kept)
        sequence.waiting = kept
        if headless:
            sequence.ended = True

    def _break_off(self, sequence: LiveSequence, cause: str) -> None:
        """Fail what has been taken of the sequence or comes behind that, up to where it is begun anew."""
        lost = [] if sequence.running is None else [sequence.running]
        sequence.running = None
        waiting = sequence.waiting
        while waiting and (waiting[0].slot >= 0 or not begins(waiting[0])):
            lost.append(waiting.popleft())
            self._waiting -= 1
        for one in lost:
            one.fail(InternalError(self._story(sequence.id, cause)))
        sequence.begun = False
        if not waiting:
            self._remember(sequence.id, cause)

    def _make(self, identity: SequenceId) -> LiveSequence:
        sequence = LiveSequence(next(self._numbers), identity)
        self._by_id[identity] = sequence
        self._by_number[sequence.number] = sequence
        index = self._roomiest()
        if index is None:
            self._unplaced[sequence.number] = sequence
        else:
            self._place(sequence, index)
        return sequence

    def _forget(self, sequence: LiveSequence) -> None:
        del self._by_id[sequence.id]
        del self._by_number[sequence.number]
        self._unplaced.pop(sequence.number, None)

    def _remember(self, identity: SequenceId, cause: str) -> None:
        self._broken_off[identity] = cause
        self._broken_off.move_to_end(identity)
        if len(self._broken_off) > MAX_REMEMBERED:
            self._broken_off.popitem(last=False)

    def _not_begun(self, identity: SequenceId) -> InvalidRequest:
        cause = self._broken_off.get(identity)
        if cause is not None:
            return InvalidRequest(self._story(identity, cause))
        return InvalidRequest(
            f"inference request for sequence {identity} to model '{self._model}' must specify the START flag on the "
            "first request of the sequence: its parameter sequence_start"
        )

    def _story(self, identity: SequenceId, cause: str) -> str:
        return f"sequence {identity} of model '{self._model}' has ended: {cause}; begin it anew with sequence_start"

    # -- places -------------------------------------------------------------------------------------------

    def _roomiest(self) -> int | None:
        """The instance with the most free places, or None when there is no place."""
        best, room = None, 0
        for index, instance in self._instances.items():
            if instance.is_open and len(instance.free) > room:
                best, room = index, len(instance.free)
        return best

    def _fill(self) -> list[Pending]:
        """Give free places to those that wait for one, who came first of all first; gives back heads."""
        heads: list[Pending] = []
        while self._unplaced and (index := self._roomiest()) is not None:
            _, sequence = self._unplaced.popitem(last=False)
            if sequence.waiting[0].dead:
                self._drop_dead_of(sequence)
            if sequence.waiting:
                self._place(sequence, index)
                heads.append(sequence.waiting[0])
            else:
                self._forget(sequence)
        return heads

    def _place(self, sequence: LiveSequence, index: int) -> None:
        instance = self._instances[index]
        sequence.instance = index
        sequence.slot = heappop(instance.free)
        instance.held[sequence.slot] = sequence

    def _vacate(self, sequence: LiveSequence) -> None:
        """Take its place away, if it has one."""
        self._idle_since.pop(sequence.number, None)
        if sequence.instance >= 0:
            instance = self._instances[sequence.instance]
            del instance.held[sequence.slot]
            heappush(instance.free, sequence.slot)
            sequence.instance = sequence.slot = -1

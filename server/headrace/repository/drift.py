"""Has the optimised forms of idle models answer their recorded requests again, and finds those that have changed."""

import asyncio
import logging
from collections.abc import Callable, Iterator
from time import monotonic_ns

from headrace.batching.pending import Pending
from headrace.batching.queue import BatchQueue
from headrace.core.errors import HeadraceError, Kind
from headrace.core.request import InferRequest
from headrace.core.tensor import Tensor, datatype_of, from_wire, to_wire
from headrace.repository.model_record import Served
from headrace.repository.plans import Plans
from headrace.repository.served import ServedVersion
from headrace_backends.base import Array
from headrace_backends.optimize.plan import BadPlan
from headrace_backends.optimize.replay import problem, read_replay

log = logging.getLogger(__name__)

LOOKS = 10  # in an interval: so much later than it may a model be checked
TIMEOUT_S = 600.0  # for one recorded request; what hangs is killed by its execution timeout long before


class Recheck(Pending):
    """A recorded request: it runs alone, and nobody's statistics count it."""

    __slots__ = ()
    counts = False


class DriftGuard:
    """Looks after what ``served`` gives, until it is cancelled. Wrong answers are told to the version itself.

    A recorded request goes through the queue as others do: where a client's comes meanwhile, it waits for one of them
    on each instance and no more.
    """

    def __init__(self, served: Callable[[], Iterator[Served]], plans: Plans, interval_s: float) -> None:
        self._served = served
        self._plans = plans
        self._interval_s = interval_s

    async def run(self) -> None:
        """Look after the models."""
        while True:
            await asyncio.sleep(self._interval_s / LOOKS)
            for one in list(self._served()):
                if isinstance(one, ServedVersion) and is_due(one, monotonic_ns(), self._interval_s):
                    await self.check(one)

    async def check(self, served: ServedVersion) -> None:
        """Have every instance answer the recorded requests; stop where somebody else wants something."""
        planned = served.planned
        assert planned is not None, "only what has a plan has recorded requests"
        try:
            inputs, recorded = await asyncio.to_thread(read_replay, planned.replay)
        except BadPlan as error:
            log.warning("model %s: its plan cannot be checked: %s", served.folder.name, error)
            served.checked_at_ns = monotonic_ns()  # a restart of its worker would find the same
            return
        used = [(instance, instance.used_at_ns) for instance in served.instances]
        answers: list[list[dict[str, Array]]] = []
        try:
            for example in inputs:
                if not self._is_there_idle(served):
                    return
                answers.append(await _answers(served, example))
        except HeadraceError as error:
            if error.kind in (Kind.INTERNAL, Kind.INVALID):
                self._distrust(served, f"a recorded request is refused: {error}")
            return
        finally:
            for instance, used_at_ns in used:
                instance.used_at_ns = used_at_ns  # nobody has used it: it may make room for others
        served.checked_at_ns = monotonic_ns()
        for of_instance in zip(*answers, strict=True):
            found = await asyncio.to_thread(problem, of_instance, recorded, planned.plan.tolerance)
            if found is not None:
                self._distrust(served, f"its answers have changed while it served: {found}")
                return
        self._plans.note_replay(planned, good=True)

    def _is_there_idle(self, served: ServedVersion) -> bool:
        """Whether an instance would answer at once. Of one that has been replaced none would, at any time."""
        if served.distrusted or not served.resident or served.queue.executing or len(served.queue):
            return False
        return any(one is served for one in self._served())

    def _distrust(self, served: ServedVersion, reason: str) -> None:
        assert served.planned is not None, "only what has a plan is checked"
        self._plans.note_replay(served.planned, good=False)
        served.distrust(reason)


def is_due(served: ServedVersion, now_ns: int, interval_s: float) -> bool:
    """Whether a version has been idle and unchecked for so long."""
    if served.planned is None or served.distrusted or not served.resident or served.reshaped:
        return False
    if len(served.queue) or served.queue.executing or not served.ready:
        return False
    last_ns = max([served.checked_at_ns, *(instance.used_at_ns for instance in served.instances)])
    return now_ns - last_ns >= interval_s * 1e9


async def _answers(served: ServedVersion, example: dict[str, Array]) -> list[dict[str, Array]]:
    """What as many requests as there are idle instances are answered: each of those takes one."""
    loop = asyncio.get_running_loop()
    deadline_ns = monotonic_ns() + int(TIMEOUT_S * 1e9)
    tensors = tuple(_tensor(name, array) for name, array in example.items())
    request = InferRequest(served.folder.name, served.version, "", tensors)
    inputs = served.checker.check(request)
    assert isinstance(served.queue, BatchQueue), "sequences are not run by plans"
    waiting = []
    for _ in served.instances:
        pending = Recheck(request, inputs, served.version, None, loop, deadline_ns=deadline_ns)
        pending.alone = True
        waiting.append(pending)
        served.queue.put_back([pending])  # nobody waits: the front is the end, and there it stays alone
    try:
        responses = await asyncio.gather(*(one.future for one in waiting))
    finally:
        for one in waiting:
            one.future.cancel()
            one.stop_clock()
    return [
        {tensor.name: from_wire(tensor.data, tensor.datatype, tensor.shape) for tensor in response.outputs}
        for response in responses
    ]


def _tensor(name: str, array: Array) -> Tensor:
    datatype = datatype_of(array)
    assert datatype is not None, "what was recorded came from a model"
    return Tensor(name, datatype, array.shape, to_wire(array))

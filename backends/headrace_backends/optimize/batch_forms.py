"""Batch sizes as forms, on a GPU: larger batches, and kernels for the size that a form is best in. Pure.

They come after the forms that they vary, which are the best few. For which sizes CUDA graphs are captured is nothing to
try: TensorRT and ONNX Runtime capture every size that comes, PyTorch those that are measured and more.
"""

from collections.abc import Collection, Sequence

import msgspec

from headrace.core.device import CPU
from headrace_backends.base import DEFAULT_MAX_BATCH_SIZE
from headrace_backends.optimize.findings import Fate, Row
from headrace_backends.optimize.form import Form
from headrace_backends.optimize.goal import Goal
from headrace_backends.optimize.subject import Subject

LARGER_ROWS = (64, 128, 256)  # the last is the most that forms are judged in
_PAYS = 1.05  # so many times as fast must twice as large a batch be
_PROFILES = "batch_profiles"


def larger_rows(goal: Goal, subject: Subject, most: int) -> tuple[int, ...]:
    """The batch sizes to try beyond ``most``, which the reference merges.

    None on the CPU, where one row is what counts, where the owner has set a size, and where the model takes no more.
    """
    if subject.device == CPU or goal.aim == "latency" or subject.max_batch_size is not None:
        return ()
    return LARGER_ROWS if most == DEFAULT_MAX_BATCH_SIZE else ()


def measured_rows(usual: Sequence[int], forms: Collection[Form]) -> tuple[int, ...]:
    """The batch sizes that forms are measured in: the usual ones, and the largest of each form that takes more."""
    larger = {form.max_batch_size or 0 for form in forms}
    return (*usual, *sorted(rows for rows in larger if rows > usual[-1]))


class Growing:
    """How large the batches of a form become: a size after the other, as long as each pays. ``best`` is what did."""

    def __init__(self, row: Row, sizes: Sequence[int]) -> None:
        self.best = row
        self._sizes = list(sizes)

    def next_form(self) -> Form | None:
        """What to try next; None at the end."""
        return msgspec.structs.replace(self.best.form, max_batch_size=self._sizes[0]) if self._sizes else None

    def tell(self, row: Row) -> None:
        """What came of it."""
        if row.fate is Fate.KEPT and (row.speedup or 0.0) > _PAYS * (self.best.speedup or 0.0):
            self.best = row
            del self._sizes[0]
        else:
            self._sizes.clear()


def with_kernels_for_its_best_size(row: Row, goal: Goal, subject: Subject, most: int) -> Form | None:
    """The engine with kernels chosen for the batch size by itself that serves the goal best.

    None where that is the largest, which they are chosen for anyway, for what is no engine or is one already, and where
    the owner has configured the profiles. ``most`` is what the reference merges.
    """
    form = row.form
    if form.backend != "tensorrt" or "precision" not in form.parameters or _PROFILES in subject.parameters:
        return None
    fitting = [point for point in row.curve if goal.fits(point)]
    best = max(fitting, key=lambda point: point.rows_per_s, default=None)
    if best is None or best.rows >= (form.max_batch_size or most):
        return None
    return msgspec.structs.replace(form, parameters={**form.parameters, _PROFILES: str(best.rows)})

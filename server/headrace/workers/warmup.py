"""The first runs of a model, on made-up inputs, so that the first client does not pay for them."""

from time import monotonic_ns

import numpy as np

from headrace.core.model import TensorSpec
from headrace.core.tensor import NUMPY_DTYPES, Array, DataType
from headrace_backends.base import Backend, DeviceLost, RequestInfo

RUNS = 2  # the first allocates, the second shows what a request will cost


def warm_up(backend: Backend) -> list[str]:
    """Run the model on one row of made-up values. Returns a note about it; a failure is no more than a note.

    The values are zeros and every free dimension is 1: a model may have good reasons to refuse that.

    Raises:
        DeviceLost: nothing can be run here any more.
    """
    signature = backend.signature
    inputs = {spec.name: _zeros(spec) for spec in signature.inputs if spec.shape is not None and not spec.optional}
    if len(inputs) < len(signature.inputs):
        return ["not warmed up: an input's shape is not declared"]
    try:
        for _ in range(RUNS):
            started_ns = monotonic_ns()
            backend.execute(inputs, [RequestInfo(1, "", {})] if backend.wants_requests else [])
    except DeviceLost:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a model raises here, real inputs decide
        return [f"not warmed up: it refused a row of zeros ({error})"]
    return [f"warmed up: one row of zeros takes {(monotonic_ns() - started_ns) / 1e6:.2f} ms"]


def _zeros(spec: TensorSpec) -> Array:
    assert spec.shape is not None
    shape = tuple(1 if size < 0 else size for size in spec.shape)
    if spec.datatype is DataType.BYTES:
        return np.full(shape, b"", dtype=np.object_)
    return np.zeros(shape, dtype=NUMPY_DTYPES[spec.datatype])

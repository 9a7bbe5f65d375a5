"""An inference request and its response, as the engine sees them."""

import msgspec

from headrace.core.tensor import Tensor

Parameter = bool | int | float | str
Parameters = dict[str, Parameter]


class Place(msgspec.Struct, frozen=True):
    """Where a tensor's data is, or is wanted, in a region of shared memory that a client has registered."""

    region: str
    offset: int
    byte_size: int


class RequestedOutput(msgspec.Struct, frozen=True):
    """An output that the client named, with its parameters (for instance ``binary_data``)."""

    name: str
    parameters: Parameters = {}


class InferRequest(msgspec.Struct, frozen=True):
    """What a front end hands to the engine.

    ``version`` is empty for "the newest that is ready", ``outputs`` is empty for "all of them", and
    ``deadline_ns`` is an absolute time of the monotonic clock, 0 for none. ``callers`` are the models on whose
    behalf the request is made, outermost first; empty for a client's own. With ``borrows`` the response's
    tensors may lie in the worker's memory, which is kept from its next batches for as long as they are referred to.

    ``to_fetch`` are inputs that lie on a GPU, by their index: they have no data before that is fetched, and the engine
    is given none such.
    """

    model: str
    version: str
    id: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[RequestedOutput, ...] = ()
    parameters: Parameters = {}
    deadline_ns: int = 0
    callers: tuple[str, ...] = ()
    borrows: bool = False
    to_fetch: tuple[tuple[int, Place], ...] = ()


class InferResponse(msgspec.Struct, frozen=True):
    """What the engine hands back: every requested output, in the order in which they were asked for.

    ``delivered`` are the names of those that were written to their clients' memory already.
    """

    model: str
    version: str
    id: str
    outputs: tuple[Tensor, ...]
    parameters: Parameters = {}
    delivered: frozenset[str] = frozenset()

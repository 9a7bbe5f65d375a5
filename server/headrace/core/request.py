"""An inference request and its response, as the engine sees them."""

import msgspec

from headrace.core.tensor import Tensor

Parameter = bool | int | float | str
Parameters = dict[str, Parameter]


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


class InferResponse(msgspec.Struct, frozen=True):
    """What the engine hands back: every requested output, in the order in which they were asked for."""

    model: str
    version: str
    id: str
    outputs: tuple[Tensor, ...]
    parameters: Parameters = {}

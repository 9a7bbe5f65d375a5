"""Inference bodies: JSON, then the tensors that travel as binary data, if any."""

from functools import lru_cache
from math import prod
from typing import Any

import msgspec

from headrace.core.classification import CLASSIFICATION, classification_count
from headrace.core.errors import InvalidRequest
from headrace.core.model import Signature, TensorSpec
from headrace.core.regions import (
    REGION,
    Regions,
    check_output,
    check_read_bytes,
    output_places,
    place_of,
    read_input,
    write_output,
)
from headrace.core.request import InferRequest, InferResponse, Parameters, Place, RequestedOutput
from headrace.core.tensor import DATATYPE_BY_NAME, ITEM_BYTES, MAX_DIMENSIONS, DataType, Tensor
from headrace.core.validation import MAX_ELEMENTS
from headrace.wire.elements import pack_flat, pack_nested, to_json
from headrace.wire.json_v2 import (
    FlatInputJson,
    InputJson,
    OutputJson,
    RequestJson,
    ResponseJson,
    encode_json,
    parse_request,
)

RESERVED_PREFIX = "triton_"
REMEMBERED_HEADER_BYTES = 1024  # of the JSON of a binary request, for it to be remembered


def decode_request(
    body: bytes | memoryview, header_length: int | None, model: str, version: str, regions: Regions | None = None
) -> InferRequest:
    """The request in ``body``; its first ``header_length`` bytes are JSON, or all of them for None.

    Tensors that came as binary data are slices of ``body``, so it must stay unchanged for as long as they are
    used; those in shared memory are copies, or are to be fetched (``InferRequest.to_fetch``). Whether they have the
    size that their shape asks for is left to the engine's check of the request.

    Raises:
        InvalidRequest: the body breaks the protocol.
        TooLarge: it names too much shared memory.
        NotFound: it names a shared memory region that is not registered.
        Unsupported: it asks for shared memory, and ``regions`` is None.
    """
    view = memoryview(body)
    total_bytes = len(view)
    position = total_bytes if header_length is None else header_length
    if not 0 <= position <= total_bytes:
        raise InvalidRequest(
            f"model '{model}': the header length is {header_length}, expected 0 to {total_bytes}, the body's length"
        )
    text = view[:position]
    layout = (
        _read_layout(text, model) if position > REMEMBERED_HEADER_BYTES or header_length is None else _seen(text, model)
    )
    inputs: list[Tensor] = []
    to_fetch: list[tuple[int, Place]] = []
    for name, datatype, shape, data, blob_bytes in layout.inputs:
        if data is not None:
            found = read_input(regions, data, model, name) if isinstance(data, Place) else data
            if found is None:
                to_fetch.append((len(inputs), data))  # type: ignore[arg-type]  # only what has a place is fetched
            inputs.append(Tensor(name, datatype, shape, found or b""))
            continue
        end = position + blob_bytes
        if end > total_bytes:
            raise _invalid(
                model,
                name,
                f"has a binary_data_size of {blob_bytes}, and {total_bytes - position} bytes follow "
                "(the JSON's length belongs in the header Inference-Header-Content-Length)",
            )
        inputs.append(Tensor(name, datatype, shape, view[position:end]))
        position = end
    if position != total_bytes:
        raise InvalidRequest(
            f"model '{model}': {total_bytes - position} bytes follow the last input's data, expected none"
        )
    if layout.places_outputs:
        for output in layout.outputs:
            if REGION in output.parameters:
                check_output(regions, output, model)
    return InferRequest(
        model, version, layout.id, tuple(inputs), layout.outputs, layout.parameters, to_fetch=tuple(to_fetch)
    )


class _Layout(msgspec.Struct, frozen=True):
    """What the JSON part says. Each input has its data, its place in shared memory, or None and its binary data's size.

    Nothing of shared memory itself is in here, so that a remembered layout stays true.
    """

    id: str
    inputs: tuple[tuple[str, DataType, tuple[int, ...], bytes | Place | None, int], ...]
    outputs: tuple[RequestedOutput, ...]
    parameters: Parameters
    places_outputs: bool  # whether some output is wanted in shared memory


def _read_layout(text: bytes | memoryview, model: str) -> _Layout:
    parsed = parse_request(text, model)
    inputs: list[tuple[str, DataType, tuple[int, ...], bytes | Place | None, int]] = []
    read_bytes = 0  # from shared memory
    for given in parsed.inputs:
        datatype = DATATYPE_BY_NAME.get(given.datatype)
        if datatype is None:
            raise _invalid(
                model, given.name, f"has datatype '{given.datatype}', expected one of {', '.join(DATATYPE_BY_NAME)}"
            )
        _check_shape(given, model)
        source = _source(given, model)
        if source is None:
            inputs.append((given.name, datatype, given.shape, _json_data(given, datatype, model), 0))
        elif isinstance(source, Place):
            inputs.append((given.name, datatype, given.shape, source, 0))
            read_bytes += source.byte_size
        else:
            inputs.append((given.name, datatype, given.shape, None, source))
    if read_bytes:
        check_read_bytes(read_bytes, model)
    outputs, places_outputs = _outputs(parsed, model)
    return _Layout(parsed.id or "", tuple(inputs), outputs, _parameters(parsed, model), places_outputs)


_remembered_layout = lru_cache(maxsize=512)(_read_layout)


def _seen(text: memoryview, model: str) -> _Layout:
    """As ``_read_layout``, for headers of binary requests: a client sends the same one with each of its requests."""
    return _remembered_layout(bytes(text), model)


def decode_raw_request(body: bytes | memoryview, signature: Signature, model: str, version: str) -> InferRequest:
    """The request whose whole ``body`` is the data of the model's one input: what a header length of 0 means.

    A model that batches gets one row. Every output is asked for as binary data.

    Raises:
        InvalidRequest: the model's signature does not tell the input's shape, or the body does not fit it.
    """
    if len(signature.inputs) != 1:
        raise InvalidRequest(
            f"model '{model}': a request without a JSON header is for models with one input, "
            f"and this one has {len(signature.inputs)}"
        )
    spec = signature.inputs[0]
    if spec.shape is None:
        raise _invalid(model, spec.name, "has no declared shape, so a request needs its JSON header")
    batch = (1,) if signature.max_batch_size > 0 else ()
    dimensions = batch + spec.shape[len(batch) :]
    view = memoryview(body)
    if spec.datatype is DataType.BYTES:
        shape = tuple(1 if size == -1 else size for size in dimensions)
        if prod(shape) != 1:
            raise _invalid(model, spec.name, f"is {spec.describe()}, and without a JSON header it must be one element")
        data: bytes | memoryview = b"".join((len(view).to_bytes(4, "little"), view))
    else:
        shape = _deduced_shape(dimensions, len(view), spec, model)
        data = view
    tensor = Tensor(spec.name, spec.datatype, shape, data)
    return InferRequest(model, version, "", (tensor,), parameters={"binary_data_output": True})


def encode_response(
    response: InferResponse, request: InferRequest, regions: Regions | None = None
) -> tuple[list[bytes | memoryview], int | None]:
    """The response's body in pieces, and the length of its JSON, or None when there is nothing but JSON.

    An output that is wanted in shared memory is written there. Any other is binary when the request asks so for
    that output, or for all and says nothing about this one. Pieces are the outputs' own buffers, which must stay
    unchanged until they are sent.

    Raises:
        InvalidRequest: an output that JSON cannot carry was asked for as JSON, or one does not fit its place in
            shared memory.
        NotFound: the shared memory region for an output is not registered any more.
    """
    default = request.parameters.get("binary_data_output", False)
    asked = {output.name: output.parameters.get("binary_data", default) for output in request.outputs}
    places = output_places(request.outputs, response.model) if regions is not None else None
    outputs: list[OutputJson] = []
    sizes: list[tuple[str, DataType, tuple[int, ...], int]] = []
    chunks: list[bytes | memoryview] = [b""]  # the JSON's place
    for tensor in response.outputs:
        data = tensor.data
        place = places.get(tensor.name) if places else None
        if place is not None:
            placed: dict[str, Any] = write_output(regions, place, response, tensor)
            output = OutputJson(tensor.name, tensor.datatype, tensor.shape, placed)
        elif asked.get(tensor.name, default):
            size_bytes = len(data)
            sizes.append((tensor.name, tensor.datatype, tensor.shape, size_bytes))
            if size_bytes:
                chunks.append(memoryview(data) if isinstance(data, bytearray) else data)
            continue
        else:
            try:
                text = msgspec.Raw(to_json(data, tensor.datatype, tensor.shape))
            except InvalidRequest as error:
                raise InvalidRequest(f"model '{response.model}': output '{tensor.name}' {error}") from None
            output = OutputJson(tensor.name, tensor.datatype, tensor.shape, data=text)
        outputs += map(_binary_output, sizes)  # so that they keep their order
        sizes.clear()
        outputs.append(output)
    if outputs or response.id or response.parameters:
        outputs += map(_binary_output, sizes)
        header = encode_json(ResponseJson(response.model, response.version, outputs, response.id, response.parameters))
    else:
        header = _binary_header(response.model, response.version, tuple(sizes))
    chunks[0] = header
    return chunks, len(header) if len(chunks) > 1 else None


def _binary_output(size: tuple[str, DataType, tuple[int, ...], int]) -> OutputJson:
    name, datatype, shape, size_bytes = size
    return OutputJson(name, datatype, shape, {"binary_data_size": size_bytes})


@lru_cache(maxsize=512)
def _binary_header(model: str, version: str, sizes: tuple[tuple[str, DataType, tuple[int, ...], int], ...]) -> bytes:
    """The JSON of a response that has nothing but binary outputs: the same for each response of a shape."""
    return encode_json(ResponseJson(model, version, [_binary_output(size) for size in sizes]))


def _invalid(model: str, tensor: str, problem: str) -> InvalidRequest:
    return InvalidRequest(f"model '{model}': input '{tensor}' {problem}")


def _check_shape(given: InputJson, model: str) -> None:
    """Refuse shapes that no array can have. The number of dimensions comes first: it bounds the rest's work."""
    shape = given.shape
    if len(shape) > MAX_DIMENSIONS:
        raise _invalid(model, given.name, f"has {len(shape)} dimensions, expected at most {MAX_DIMENSIONS}")
    if shape and min(shape) < 0:
        raise _invalid(model, given.name, f"has shape {list(shape)}: a request's dimensions cannot be negative")
    # Arrays without elements have bounds too: numpy refuses [0, 2**40, 2**40].
    if prod(shape) > MAX_ELEMENTS or (0 in shape and prod(filter(None, shape)) > MAX_ELEMENTS):
        raise _invalid(model, given.name, f"has shape {list(shape)}, expected at most {MAX_ELEMENTS} elements")


def _source(given: InputJson, model: str) -> int | Place | None:
    """How many bytes of binary data the input has, or its place in shared memory, or None for data in the JSON."""
    parameters = given.parameters
    if not parameters:
        if given.data is msgspec.UNSET:
            raise _without_one_source(given, model)
        return None
    size = parameters.get("binary_data_size")
    if REGION in parameters:
        if size is not None or given.data is not msgspec.UNSET:
            raise _without_one_source(given, model)
        return place_of(parameters, f"model '{model}': input '{given.name}'")
    if (size is None) is (given.data is msgspec.UNSET):
        raise _without_one_source(given, model)
    if size is not None and (type(size) is not int or size < 0):
        raise _invalid(model, given.name, f"has binary_data_size {size!r}, expected a number of bytes")
    return size


def _without_one_source(given: InputJson, model: str) -> InvalidRequest:
    parameters = given.parameters or {}
    sources = [] if given.data is msgspec.UNSET else ["data"]
    sources += [name for name in ("binary_data_size", REGION) if name in parameters]
    return _invalid(
        model,
        given.name,
        f"has {' and '.join(sources) or 'no data'}, "
        "expected exactly one of data, binary_data_size and shared_memory_region",
    )


def _json_data(given: InputJson, datatype: DataType, model: str) -> bytes:
    try:
        if isinstance(given, FlatInputJson):
            return pack_flat(given.data, datatype, given.shape)  # type: ignore[arg-type]  # UNSET was refused before
        return pack_nested(given.data, datatype, given.shape)
    except InvalidRequest as error:
        raise _invalid(model, given.name, str(error)) from None


def _outputs(parsed: RequestJson, model: str) -> tuple[tuple[RequestedOutput, ...], bool]:
    """The outputs that are named, their parameters checked, and whether one of them is wanted in shared memory."""
    outputs = tuple([RequestedOutput(asked.name, asked.parameters or {}) for asked in parsed.outputs or ()])
    places_outputs = False
    for output in outputs:
        parameters = output.parameters
        if parameters:
            if REGION in parameters:
                places_outputs = True
            if CLASSIFICATION in parameters:
                classification_count(output, model)
            binary = parameters.get("binary_data", False)
            if type(binary) is not bool:
                raise InvalidRequest(
                    f"model '{model}': output '{output.name}' has binary_data {binary!r}, expected true or false"
                )
    return outputs, places_outputs


def _parameters(parsed: RequestJson, model: str) -> Parameters:
    parameters = parsed.parameters
    if not parameters:
        return {}
    binary = parameters.get("binary_data_output", False)
    if type(binary) is not bool:
        raise InvalidRequest(f"model '{model}': binary_data_output is {binary!r}, expected true or false")
    for name, value in parameters.items():
        if type(value) is int and not -(1 << 63) <= value < 1 << 64:
            raise InvalidRequest(f"model '{model}': parameter '{name}' is an integer of more than 64 bits")
    check_parameter_names(parameters, model)
    return parameters


def check_parameter_names(parameters: Parameters, model: str) -> None:
    """See that no parameter has a name that is kept for the server.

    Raises:
        InvalidRequest: one has.
    """
    for name in parameters:
        if name.startswith(RESERVED_PREFIX):
            raise InvalidRequest(
                f"model '{model}': parameter '{name}': names that start with '{RESERVED_PREFIX}' are reserved"
            )


def _deduced_shape(dimensions: tuple[int, ...], size_bytes: int, spec: TensorSpec, model: str) -> tuple[int, ...]:
    """``dimensions`` with the one of any size, if there is one, as ``size_bytes`` of data make it."""
    known_bytes = prod(size for size in dimensions if size != -1) * ITEM_BYTES[spec.datatype]
    variable = dimensions.count(-1)
    if variable > 1 or (variable and not known_bytes):
        raise _invalid(
            model,
            spec.name,
            f"is {spec.describe()}: {size_bytes} bytes do not tell its shape, so a request needs its JSON header",
        )
    if not variable:
        if size_bytes != known_bytes:
            raise _invalid(
                model, spec.name, f"has {size_bytes} bytes of data, expected {known_bytes} for {list(dimensions)}"
            )
        return dimensions
    if size_bytes % known_bytes:
        raise _invalid(
            model,
            spec.name,
            f"has {size_bytes} bytes of data, expected a multiple of {known_bytes} for {list(dimensions)}",
        )
    return tuple(size_bytes // known_bytes if size == -1 else size for size in dimensions)

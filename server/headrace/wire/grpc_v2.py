"""The gRPC messages to and from the engine's requests, pure."""

from collections.abc import Callable, Iterable
from math import prod
from typing import Any

import numpy as np

from headrace.core.classification import CLASSIFICATION, classification_count
from headrace.core.errors import InvalidRequest
from headrace.core.model import ModelInfo, TensorSpec
from headrace.core.regions import (
    REGION,
    Regions,
    check_output,
    check_read_bytes,
    offered,
    output_places,
    place_of,
    read_input,
    write_output,
)
from headrace.core.request import InferRequest, InferResponse, Parameters, Place, RequestedOutput
from headrace.core.tensor import DATATYPE_BY_NAME, MAX_DIMENSIONS, NUMPY_DTYPES, DataType, Tensor, pack_bytes
from headrace.wire import pb

# Which typed field of InferTensorContents carries a datatype; FP16 and BF16 travel raw only.
_CONTENTS_FIELD = {
    DataType.BOOL: "bool_contents",
    DataType.INT8: "int_contents",
    DataType.INT16: "int_contents",
    DataType.INT32: "int_contents",
    DataType.INT64: "int64_contents",
    DataType.UINT8: "uint_contents",
    DataType.UINT16: "uint_contents",
    DataType.UINT32: "uint_contents",
    DataType.UINT64: "uint64_contents",
    DataType.FP32: "fp32_contents",
    DataType.FP64: "fp64_contents",
    DataType.BYTES: "bytes_contents",
}
_ALL_CONTENTS = sorted(set(_CONTENTS_FIELD.values()))


def decode_request(message: Any, deadline_ns: int = 0, regions: Regions | None = None) -> InferRequest:
    """A ModelInferRequest as the engine takes it, but for ``InferRequest.to_fetch``.

    Raw contents are used where they lie, without a copy.

    Raises:
        InvalidRequest: naming the model and the tensor.
        TooLarge: the request names too much shared memory.
        NotFound: it names a shared memory region that is not registered.
        Unsupported: it asks for shared memory, and ``regions`` is None.
    """
    model = message.model_name
    raw = message.raw_input_contents
    given = message.inputs
    in_memory = sum(1 for tensor in given if tensor.parameters and REGION in tensor.parameters)
    if raw and len(raw) != len(given) - in_memory:
        for tensor in given:
            _check_no_contents(model, tensor)  # the likelier mistake, so it is told first
        raise InvalidRequest(
            f"model '{model}': the request has {len(raw)} raw_input_contents for {len(given)} inputs, expected one "
            "each, and none for those in shared memory"
        )
    to_fetch: tuple[tuple[int, Place], ...] = ()
    if in_memory:
        tensors, to_fetch = _tensors_with_shared_memory(model, given, raw, regions)
    else:
        tensors = tuple(_tensor(model, tensor, raw[index] if raw else None) for index, tensor in enumerate(given))
    return InferRequest(
        model,
        message.model_version,
        message.id,
        tensors,
        tuple(_requested(model, output, regions) for output in message.outputs),
        decode_parameters(message.parameters, f"model '{model}'") if message.parameters else {},
        deadline_ns,
        to_fetch=to_fetch,
    )


def _tensors_with_shared_memory(
    model: str, given: Any, raw: Any, regions: Regions | None
) -> tuple[tuple[Tensor, ...], tuple[tuple[int, Place], ...]]:
    """The inputs, some of which are in shared memory: these take no entry of ``raw``; and those still to be fetched."""
    tensors: list[Tensor] = []
    to_fetch: list[tuple[int, Place]] = []
    entries = iter(raw)
    read_bytes = 0
    for tensor in given:
        if REGION not in tensor.parameters:
            tensors.append(_tensor(model, tensor, next(entries) if raw else None))
            continue
        where = f"model '{model}': input '{tensor.name}'"
        offered(regions, where)
        place = place_of(decode_parameters(tensor.parameters, where), where)
        if tensor.HasField("contents"):
            raise InvalidRequest(f"{where} has contents although it is in shared memory; send one or the other")
        read_bytes += place.byte_size
        check_read_bytes(read_bytes, model)
        datatype = _datatype(model, tensor)
        data = read_input(regions, place, model, tensor.name)
        if data is None:
            to_fetch.append((len(tensors), place))
        tensors.append(Tensor(tensor.name, datatype, tuple(tensor.shape), data or b""))
    return tuple(tensors), tuple(to_fetch)


def _tensor(model: str, tensor: Any, raw: bytes | None) -> Tensor:
    datatype = _datatype(model, tensor)
    if raw is None:
        raw = _typed(model, tensor, datatype)
    else:
        _check_no_contents(model, tensor)
    return Tensor(tensor.name, datatype, tuple(tensor.shape), raw)


def _check_no_contents(model: str, tensor: Any) -> None:
    if tensor.HasField("contents"):
        raise InvalidRequest(
            f"contents field must not be specified when using raw_input_contents for '{tensor.name}' for model "
            f"'{model}'; send one or the other"
        )


def _datatype(model: str, tensor: Any) -> DataType:
    """The input's datatype, once that and its number of dimensions are seen to be possible."""
    datatype = DATATYPE_BY_NAME.get(tensor.datatype)
    if datatype is None:
        raise InvalidRequest(
            f"model '{model}': input '{tensor.name}' has datatype '{tensor.datatype}', "
            f"expected one of {', '.join(DATATYPE_BY_NAME)}"
        )
    if len(tensor.shape) > MAX_DIMENSIONS:
        raise InvalidRequest(
            f"model '{model}': input '{tensor.name}' has {len(tensor.shape)} dimensions, "
            f"expected at most {MAX_DIMENSIONS}"
        )
    return datatype


def _requested(model: str, output: Any, regions: Regions | None) -> RequestedOutput:
    parameters = decode_parameters(output.parameters, f"model '{model}': output '{output.name}'")
    requested = RequestedOutput(output.name, parameters)
    if REGION in parameters:
        check_output(regions, requested, model)
    if CLASSIFICATION in parameters:
        classification_count(requested, model)
    return requested


def encode_response(
    response: InferResponse, request: InferRequest | None = None, regions: Regions | None = None
) -> Any:
    """A ModelInferResponse; every output's data is raw, as Triton answers.

    With ``regions`` the ``request`` is needed too: it says which outputs are to be written there instead. Their
    entries of raw_output_contents are empty.

    Raises:
        InvalidRequest: an output does not fit its place in shared memory.
        NotFound: the shared memory region for an output is not registered any more.
    """
    places = {} if request is None or regions is None else output_places(request.outputs, response.model)
    message = pb.ModelInferResponse(model_name=response.model, model_version=response.version, id=response.id)
    for tensor in response.outputs:
        output = message.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        place = places.get(tensor.name) if places else None
        if place is None:
            message.raw_output_contents.append(bytes(tensor.data))
        else:
            encode_parameters(write_output(regions, place, response, tensor), output.parameters)
            message.raw_output_contents.append(b"")
    encode_parameters(response.parameters, message.parameters)
    return message


def decode_parameters(parameters: Any, where: str = "the message") -> Parameters:
    """A map of InferParameter as plain values.

    Raises:
        InvalidRequest: one has none; ``where`` says whose they are.
    """
    values: Parameters = {}
    for name, parameter in parameters.items():
        choice = parameter.WhichOneof("parameter_choice")
        if choice is None:
            raise InvalidRequest(f"{where}: parameter '{name}' has no value")
        values[name] = getattr(parameter, choice)
    return values


def encode_parameters(values: Parameters, into: Any) -> None:
    """Plain values into a map of InferParameter."""
    for name, value in values.items():
        if isinstance(value, bool):
            into[name].bool_param = value
        elif isinstance(value, int):
            if value >> 63 == 0 or value < 0:
                into[name].int64_param = value
            else:
                into[name].uint64_param = value
        elif isinstance(value, float):
            into[name].double_param = value
        else:
            into[name].string_param = value


def encode_metadata(info: ModelInfo, versions: Iterable[str]) -> Any:
    """A ModelMetadataResponse."""
    message = pb.ModelMetadataResponse(name=info.name, versions=list(versions), platform=info.platform)
    for add, specs in ((message.inputs.add, info.signature.inputs), (message.outputs.add, info.signature.outputs)):
        _add_specs(add, specs)
    return message


def _add_specs(add: Callable[..., Any], specs: Iterable[TensorSpec]) -> None:
    for spec in specs:
        add(name=spec.name, datatype=str(spec.datatype), shape=spec.shape_or_any)


def _typed(model: str, tensor: Any, datatype: DataType) -> bytes:
    """An input's typed contents in raw wire form."""
    where = f"model '{model}': input '{tensor.name}'"
    field = _CONTENTS_FIELD.get(datatype)
    if field is None:
        raise InvalidRequest(f"{where} has datatype {datatype}, which travels in raw_input_contents only")
    contents = tensor.contents
    values = getattr(contents, field)
    for other in _ALL_CONTENTS:
        if other != field and len(getattr(contents, other)):
            raise InvalidRequest(f"{where} has {other}, expected {field} for datatype {datatype}")
    if any(size < 0 for size in tensor.shape):
        raise InvalidRequest(f"{where} has shape {list(tensor.shape)}: a request's dimensions cannot be negative")
    expected = prod(tensor.shape)
    if len(values) != expected:
        raise InvalidRequest(
            f"{where} has {len(values)} elements in {field}, expected {expected} for shape {list(tensor.shape)}"
        )
    if datatype is DataType.BYTES:
        return pack_bytes(list(values))
    dtype = NUMPY_DTYPES[datatype]
    try:
        return np.array(values, dtype=dtype).tobytes()
    except OverflowError:
        low, high = int(np.iinfo(dtype.name).min), int(np.iinfo(dtype.name).max)
        wrong = next(value for value in values if not low <= value <= high)
        raise InvalidRequest(f"{where} has the value {wrong}, out of range of {datatype} ({low} to {high})") from None

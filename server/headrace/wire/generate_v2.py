"""The generate extension: one flat JSON object a request and one a response, as language models' clients send them."""

from math import prod
from typing import Any

import msgspec

from headrace.core.errors import InvalidRequest
from headrace.core.model import Signature, TensorSpec
from headrace.core.request import InferRequest, InferResponse, Parameter, Parameters
from headrace.core.tensor import Tensor
from headrace.wire.elements import pack_nested, to_json
from headrace.wire.json_v2 import encode_json

_decode = msgspec.json.Decoder(dict[str, Any]).decode


def decode_generate(body: bytes | memoryview, model: str, version: str, signature: Signature) -> InferRequest:
    """The request in ``body``: keys with an input's name become that input, all others parameters.

    What stands under ``parameters`` is treated as if it stood beside it. An input is a single value or a flat list;
    its shape is what the model declares, with the list's length where that is free, and a batch of one.

    Raises:
        InvalidRequest: naming the model and the key.
    """
    try:
        given = _decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"model '{model}': the request's body is not a JSON object: {error}") from None
    request_id = given.pop("id", None)
    if request_id is None:
        request_id = ""
    elif isinstance(request_id, int) and not isinstance(request_id, bool):
        request_id = str(request_id)
    if not isinstance(request_id, str):
        raise InvalidRequest(f"model '{model}': id is {_kind(request_id)}, expected a string")
    specs = {spec.name: spec for spec in signature.inputs}
    inputs: list[Tensor] = []
    parameters: Parameters = {}
    for name, value in _levelled(given, model).items():
        spec = specs.get(name)
        if spec is not None:
            inputs.append(_tensor(spec, value, model, batches=signature.max_batch_size > 0))
        elif value is not None:
            parameters[name] = _parameter(name, value, model, list(specs))
    return InferRequest(model, version, request_id, tuple(inputs), parameters=parameters)


def encode_generate(response: InferResponse) -> bytes:
    """A response as one JSON object: outputs by name, an output of one element as that, and what model gave them.

    Raises:
        InvalidRequest: an output that JSON cannot carry.
    """
    plain: dict[str, Any] = {"model_name": response.model, "model_version": response.version}
    if response.id:
        plain["id"] = response.id
    plain.update(response.parameters)
    for tensor in response.outputs:
        try:
            text = to_json(tensor.data, tensor.datatype, tensor.shape)
        except InvalidRequest as error:
            raise InvalidRequest(f"model '{response.model}': output '{tensor.name}' {error}") from None
        plain[tensor.name] = msgspec.Raw(text[1:-1] if prod(tensor.shape) == 1 else text)
    return encode_json(plain)


def _levelled(given: dict[str, Any], model: str) -> dict[str, Any]:
    """What stands under ``parameters`` beside everything else."""
    nested = given.pop("parameters", None)
    if nested is None:
        return given
    if not isinstance(nested, dict):
        raise InvalidRequest(f"model '{model}': parameters is {_kind(nested)}, expected an object")
    twice = next((name for name in nested if name in given), None)
    if twice is not None:
        raise InvalidRequest(f"model '{model}': '{twice}' is given twice, also under parameters, expected once")
    return {**given, **nested}


def _parameter(name: str, value: Any, model: str, inputs: list[str]) -> Parameter:
    if not isinstance(value, bool | int | float | str):
        raise InvalidRequest(
            f"model '{model}': '{name}' is {_kind(value)} and no input of the model, whose inputs are {inputs}; "
            "a parameter has to be a string, a number or a boolean"
        )
    if type(value) is int and not -(1 << 63) <= value < 1 << 64:
        raise InvalidRequest(f"model '{model}': parameter '{name}' is an integer of more than 64 bits")
    return value


def _tensor(spec: TensorSpec, value: Any, model: str, *, batches: bool) -> Tensor:
    values = value if isinstance(value, list) else [value]
    if any(isinstance(one, list | dict) or one is None for one in values):
        what = f"{_kind(value)} of lists, objects or nulls" if isinstance(value, list) else _kind(value)
        raise InvalidRequest(
            f"model '{model}': input '{spec.name}' is {what}, expected one {spec.datatype} value or a flat list"
        )
    shape = _shape(spec, len(values), model, batches=batches)
    try:
        return Tensor(spec.name, spec.datatype, shape, pack_nested(values, spec.datatype, shape))
    except InvalidRequest as error:
        raise InvalidRequest(f"model '{model}': input '{spec.name}' {error}") from None


def _shape(spec: TensorSpec, count: int, model: str, *, batches: bool) -> tuple[int, ...]:
    """The declared shape with ``count`` elements in it, in a batch of one where the model batches."""
    batch = (1,) if batches else ()
    if spec.shape is None:
        return (*batch, count)
    dimensions = spec.shape[len(batch) :]
    free = dimensions.count(-1)
    known = prod(size for size in dimensions if size != -1)
    fits = known and not count % known if free else known == count
    if not fits:
        raise InvalidRequest(
            f"model '{model}': input '{spec.name}' has {count} element(s), expected {list(dimensions)}, -1 being any "
            "number"
        )
    sizes = []
    for size in dimensions:
        if size == -1:  # the first free dimension takes all, any other is 1
            sizes.append(count // known)
            known = count or 1
        else:
            sizes.append(size)
    return (*batch, *sizes)


def _kind(value: object) -> str:
    for kind, name in ((list, "a list"), (dict, "an object"), (str, "a string"), (bool, "a boolean")):
        if isinstance(value, kind):
            return name
    return "null" if value is None else "a number"

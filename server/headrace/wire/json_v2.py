"""The JSON of the protocol: requests parsed into typed structs, answers and errors written."""

import json
import math
import re
from typing import Any, Final

import msgspec

from headrace.core.errors import InvalidRequest
from headrace.core.request import Parameters

_INPUT_PATH = re.compile(r"\$\.inputs\[(\d+)\]")
_ENCODER: Final = msgspec.json.Encoder()


class InputJson(msgspec.Struct, gc=False):
    """One of a request's inputs; ``data`` is any JSON value, or UNSET."""

    name: str
    shape: tuple[int, ...]
    datatype: str
    parameters: Parameters | None = None
    data: Any = msgspec.UNSET


class FlatInputJson(InputJson, gc=False):
    """An input whose ``data``, where it has some, is an array of numbers and strings."""

    data: list[int | float | str] | msgspec.UnsetType = msgspec.UNSET


class AskedOutputJson(msgspec.Struct, gc=False):
    """One of the outputs that a request names."""

    name: str
    parameters: Parameters | None = None


class RequestJson(msgspec.Struct, gc=False):
    """A request's JSON. Fields that are unknown are ignored, and null stands for an optional one left out."""

    inputs: tuple[InputJson, ...]
    id: str | None = None
    outputs: tuple[AskedOutputJson, ...] | None = None
    parameters: Parameters | None = None


class FlatRequestJson(RequestJson, gc=False):
    """A request without nested data and without BOOL data: nearly every one."""

    inputs: tuple[FlatInputJson, ...]


class OutputJson(msgspec.Struct, omit_defaults=True, gc=False):
    """One of a response's outputs: with ``data``, or with the size of its blob in ``parameters``."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    parameters: dict[str, int] | msgspec.UnsetType = msgspec.UNSET
    data: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class ResponseJson(msgspec.Struct, omit_defaults=True, gc=False):
    """A response's JSON; ``id`` and ``parameters`` are left out when empty."""

    model_name: str
    model_version: str
    outputs: list[OutputJson]
    id: str = ""
    parameters: Parameters = {}


class _Named(msgspec.Struct):
    name: Any = None


class _NamedInputs(msgspec.Struct):
    inputs: list[_Named]


_FLAT: Final = msgspec.json.Decoder(FlatRequestJson)
_ANY: Final = msgspec.json.Decoder(RequestJson)
_NAMES: Final = msgspec.json.Decoder(_NamedInputs)


def parse_request(text: bytes | memoryview, model: str) -> RequestJson:
    """The request that ``text`` holds.

    The bare tokens NaN, Infinity and -Infinity are taken though JSON has none of them, as other servers do.

    Raises:
        InvalidRequest: ``text`` is not JSON, or not a request.
    """
    try:
        # One pass for tensors and all. Nested and BOOL data fail here at their first element, so early.
        return _FLAT.decode(text)
    except (ValueError, RecursionError):
        return _parse_any(text, model)


def encode_error(message: str) -> bytes:
    """The body of every error. Half surrogate pairs in ``message`` become question marks."""
    return _ENCODER.encode({"error": message.encode(errors="replace").decode()})


def encode_json(value: object) -> bytes:
    """``value`` as JSON: builtin types, msgspec structs, dataclasses."""
    return _ENCODER.encode(value)


def _parse_any(text: bytes | memoryview, model: str) -> RequestJson:
    try:
        return _ANY.decode(text)
    except msgspec.ValidationError as error:
        raise InvalidRequest(_located(error, text, model)) from None
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"model '{model}': the request's JSON is not valid UTF-8: {error.reason}") from None
    except RecursionError:
        raise InvalidRequest(f"model '{model}': the request's JSON is nested too deeply") from None
    except ValueError as error:
        raw = bytes(text)
        if b"NaN" not in raw and b"Infinity" not in raw:
            raise InvalidRequest(f"model '{model}': the request is not valid JSON: {error}") from None
        return _parse_with_nonfinite(raw, model)


def _parse_with_nonfinite(raw: bytes, model: str) -> RequestJson:
    """The same with the standard library's parser, ten times slower, which takes NaN and the infinities."""
    try:
        request = msgspec.convert(json.loads(raw.decode(), parse_float=_finite), RequestJson)
        # It also takes half surrogate pairs, which nothing that is sent on could encode.
        _ENCODER.encode((request.id, request.outputs, request.parameters))
        _ENCODER.encode([(given.name, given.datatype, given.parameters) for given in request.inputs])
    except UnicodeError:
        raise InvalidRequest(f"model '{model}': the request's JSON is not valid UTF-8") from None
    except RecursionError:
        raise InvalidRequest(f"model '{model}': the request's JSON is nested too deeply") from None
    except msgspec.ValidationError as error:
        raise InvalidRequest(_located(error, raw, model)) from None
    except ValueError as error:
        raise InvalidRequest(f"model '{model}': the request is not valid JSON: {error}") from None
    return request


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:40]} is out of range")
    return value


def _located(error: msgspec.ValidationError, text: bytes | memoryview, model: str) -> str:
    """The message of ``error``, with the name of the input that it is about where it can be told."""
    message = str(error)
    found = _INPUT_PATH.search(message)
    if found is not None:
        try:
            name = _NAMES.decode(text).inputs[int(found[1])].name
        except (ValueError, RecursionError):
            name = None
        if isinstance(name, str):
            return f"model '{model}': input '{name}': {message}"
    return f"model '{model}': the request does not fit the protocol: {message}"

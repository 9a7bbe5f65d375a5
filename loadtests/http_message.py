"""Inference over HTTP as bytes: a whole request to send again and again, and the check of an answer."""

import json
from collections.abc import Sequence
from itertools import accumulate
from math import prod
from typing import Any

import numpy as np

from headrace.core.errors import InvalidRequest
from headrace.core.tensor import (
    DATATYPE_BY_NAME,
    ITEM_BYTES,
    NUMPY_DTYPES,
    Array,
    DataType,
    Tensor,
    from_wire,
)
from loadtests.answer import BadResponse, Outputs

HEADER_LENGTH = "Inference-Header-Content-Length"


def encode_request(host: str, model: str, tensors: Sequence[Tensor], *, binary: bool, path: str | None = None) -> bytes:
    """Head and body of one inference request, tensors as blobs behind the JSON or as numbers within it."""
    inputs: list[dict[str, Any]] = []
    for tensor in tensors:
        entry: dict[str, Any] = {"name": tensor.name, "shape": tensor.shape, "datatype": tensor.datatype}
        if binary:
            entry["parameters"] = {"binary_data_size": len(tensor.data)}
        else:
            entry["data"] = _json_data(tensor)
        inputs.append(entry)
    document: dict[str, Any] = {"inputs": inputs}
    if binary:
        document["parameters"] = {"binary_data_output": True}
    header = json.dumps(document, separators=(",", ":")).encode()
    body = b"".join([header, *(bytes(tensor.data) for tensor in tensors)]) if binary else header
    extra = [f"{HEADER_LENGTH}: {len(header)}"] if binary else []
    return post(host, path or f"/v2/models/{model}/infer", body, extra, binary=binary)


def post(host: str, path: str, body: bytes, extra: Sequence[str] = (), *, binary: bool) -> bytes:
    """A whole POST request; ``extra`` are more lines of its head."""
    lines = [
        f"POST {path} HTTP/1.1",
        f"Host: {host}",
        f"Content-Type: application/{'octet-stream' if binary else 'json'}",
        *extra,
        f"Content-Length: {len(body)}",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


def check_response(head: bytes, body: bytes) -> Outputs:
    """Decode the whole answer.

    Raises:
        BadResponse: it is not JSON, has no outputs, or an output's data does not fit its shape.
    """
    header_length = header_value(head, HEADER_LENGTH)
    split = len(body) if header_length is None else int(header_length)
    try:
        entries = json.loads(body[:split])["outputs"]
    except (ValueError, KeyError, TypeError) as error:
        raise BadResponse(f"the answer is not a JSON object with 'outputs': {body[:200]!r}") from error
    if not entries:
        raise BadResponse("the answer has no outputs; expected at least one")
    sizes = [_check_output(entry) for entry in entries]
    if split + sum(sizes) != len(body):
        raise BadResponse(f"the answer has {len(body) - split} bytes of blobs; its outputs tell of {sum(sizes)}")
    starts = accumulate(sizes, initial=split)
    return {
        entry["name"]: _array(entry, body[start : start + size])
        for entry, start, size in zip(entries, starts, sizes, strict=False)
    }


def header_value(head: bytes, name: str) -> str | None:
    """The value of one header in a response's head; None without it."""
    wanted = name.lower().encode()
    for line in head.split(b"\r\n")[1:]:
        key, _, value = line.partition(b":")
        if key.strip().lower() == wanted:
            return value.strip().decode("latin-1")
    return None


def _json_data(tensor: Tensor) -> list[Any]:
    # tolist() spells an FP32 with the digits of its FP64, and so do the clients in use: the server reads those.
    flat = from_wire(tensor.data, tensor.datatype, tensor.shape).reshape(-1).tolist()
    return [element.decode() for element in flat] if tensor.datatype is DataType.BYTES else flat


def _check_output(output: dict[str, Any]) -> int:
    """The size of the output's blob, 0 where its data is JSON."""
    name, shape, datatype = output.get("name"), output.get("shape"), DATATYPE_BY_NAME.get(output.get("datatype", ""))
    if name is None or shape is None or datatype is None:
        raise BadResponse(f"output {name!r} has shape {shape} and datatype {output.get('datatype')!r}")
    size = output.get("parameters", {}).get("binary_data_size")
    if size is None:
        count = _count(output.get("data"))
        if count != prod(shape):
            raise BadResponse(f"output '{name}' has {count} elements, expected {prod(shape)} for shape {shape}")
        return 0
    item_bytes = ITEM_BYTES[datatype]
    if item_bytes and size != prod(shape) * item_bytes:
        raise BadResponse(f"output '{name}' has {size} bytes, expected those of {datatype}{shape}")
    return int(size)


def _count(data: Any) -> int:
    return sum(map(_count, data)) if isinstance(data, list) else 1


def _array(output: dict[str, Any], blob: bytes) -> Array:
    datatype, shape = DATATYPE_BY_NAME[output["datatype"]], output["shape"]
    try:
        if "data" in output:
            return np.array(output["data"], NUMPY_DTYPES[datatype]).reshape(shape)
        return from_wire(blob, datatype, tuple(shape))
    except (ValueError, InvalidRequest) as error:
        raise BadResponse(f"output '{output['name']}' of {datatype}{shape} cannot be read: {error}") from error

"""An answer for people, for programs and for files."""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np

from headrace.client.command_values import BadArgument
from headrace.client.result import InferResult
from headrace.core.tensor import Array, DataType, datatype_of

_SHOWN_CHARACTERS = 200  # of one BYTES element


def describe(result: InferResult) -> str:
    """Each output with its datatype, its shape and, where they are many, the outermost of its values."""
    lines = [f"{result.model_name} version {result.model_version}" if result.model_version else result.model_name]
    if result.id:
        lines.append(f"id: {result.id}")
    lines += [f"parameter {name}: {value}" for name, value in result.parameters.items()]
    for name, array in result.outputs.items():
        lines.append(f"{name}  {_datatype(array)}{list(array.shape)}")
        lines += [f"  {line}" for line in _values(array).splitlines()]
    return "\n".join(lines)


def to_json(result: InferResult) -> str:
    """The answer as the protocol's JSON, data flat; bytes that are no UTF-8 are ``{"b64": ...}``."""
    value: dict[str, Any] = {"model_name": result.model_name, "model_version": result.model_version}
    if result.id:
        value["id"] = result.id
    if result.parameters:
        value["parameters"] = result.parameters
    value["outputs"] = [
        {"name": name, "datatype": _datatype(array), "shape": list(array.shape), "data": _plain(array)}
        for name, array in result.outputs.items()
    ]
    return json.dumps(value)


def save(name: str, array: Array, path: Path) -> None:
    """Write one output as the file's ending says: .npy, .json, or any other for a single BYTES element as it is.

    Raises:
        BadArgument: the output cannot be written so.
    """
    datatype = _datatype(array)
    suffix = path.suffix.lower()
    try:
        if suffix == ".json":
            path.write_text(json.dumps(_nested(array)))
        elif suffix == ".npy" and datatype != DataType.BYTES:
            # numpy's files know no BF16, and every BF16 is an FP32.
            np.save(path, array.astype(np.float32) if datatype == DataType.BF16 else array)
        elif datatype == DataType.BYTES and array.size == 1 and suffix != ".npy":
            path.write_bytes(array.item())
        else:
            fitting = ".json" if datatype == DataType.BYTES else ".npy or .json"
            raise BadArgument(f"--output {name}: {datatype}{list(array.shape)} is written to a {fitting} file")
    except OSError as error:
        raise BadArgument(f"--output {name}: cannot write {path}: {error.strerror or error}") from error


def _datatype(array: Array) -> str:
    return str(datatype_of(array))


def _values(array: Array) -> str:
    shown = np.vectorize(_text, otypes=[np.object_])(array) if array.dtype.kind == "O" and array.size else array
    if shown.dtype.kind not in "Obiuf":
        shown = shown.astype(np.float32)  # BF16, which numpy prints without care for width
    return np.array2string(shown, threshold=60, edgeitems=4, max_line_width=110, precision=6)


def _text(element: bytes) -> str:
    try:
        text = element.decode()
    except UnicodeDecodeError:
        return f"<{len(element)} bytes>"
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def _plain(array: Array) -> list[Any]:
    return [_json_text(element) if isinstance(element, bytes) else element for element in array.reshape(-1).tolist()]


def _nested(array: Array) -> Any:
    if array.dtype.kind != "O":
        return array.tolist()
    plain = np.empty(array.size, np.object_)
    plain[:] = _plain(array)
    return plain.reshape(array.shape).tolist()


def _json_text(element: bytes) -> Any:
    try:
        return element.decode()
    except UnicodeDecodeError:
        return {"b64": base64.b64encode(element).decode()}

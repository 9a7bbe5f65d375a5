"""Requests that nobody should send: tables of them, and mutations of good ones by a fixed seed."""

import gzip
import json
import random
import struct
from collections.abc import Iterator
from typing import Any

from raw_http import request

from headrace.wire import pb

INFER = "/v2/models/onnx_fp32/infer"
ROUTE = "/v2/models/onnx_fp32/%69nfer"
ANY = "/v2/models/any/infer"
LENGTH = "Inference-Header-Content-Length"
X = {"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]}
GOOD = {"id": "7", "inputs": [X], "outputs": [{"name": "y", "parameters": {"binary_data": False}}], "parameters": {}}
RAW = struct.pack("<3f", 1, 2, 3)
HUGE_INTEGER = "9" * 5000  # past what Python turns into an int, or back, without being asked twice
ODD_VALUES: tuple[Any, ...] = (None, True, 0, -1, 1.5, 2**70, "", "text", [], [[]], [None], {}, {"a": {"b": []}})


def http_infer() -> Iterator[tuple[str, bytes, set[int]]]:
    """Inference requests: a name, the bytes and the statuses that may answer them."""
    for name, body, headers in _bodies():
        for how, path in (("lane", INFER), ("route", ROUTE)):
            yield f"{how}: {name}", request("POST", path, body, headers), {400, 404, 413, 501}
    for name, body in _any_bodies():
        yield name, request("POST", ANY, body), {400, 501}


def _bodies() -> Iterator[tuple[str, bytes, dict[str, str]]]:
    good = json.dumps(GOOD).encode()
    for cut in range(0, len(good), 9):
        yield f"JSON cut at {cut}", good[:cut], {}
    for text in (
        "null",
        "true",
        "17",
        '"text"',
        "[]",
        "[1, 2]",
        "{}",
        '{"inputs": []}',
        "{}{}",
        "\ufeff{}",
        "nul",
        "'",
    ):
        yield f"JSON {text}", text.encode(), {}
    for depth in (101, 5000, 200_000):
        yield f"arrays {depth} deep", b"[" * depth, {}
        yield f"objects {depth} deep", b'{"inputs":' * depth, {}
        nested = b"[" * depth + b"1" + b"]" * depth
        yield f"data {depth} deep", good.replace(b"[1, 2, 3]", nested), {}
        yield f"unknown field {depth} deep", good.replace(b'"id": "7"', b'"x": ' + nested + b', "id": 7'), {}
    yield from _odd_fields()
    yield from _odd_shapes()
    yield from _odd_data()
    yield from _odd_binary(good)
    for spoiled in (b"\xff", b"\xc3", b"\xed\xa0\x80", b"\\ud800", b"\x00", b"\x1f"):
        yield f"text with {spoiled!r}", good.replace(b'"x"', b'"x' + spoiled + b'"'), {}
    yield "input twice", json.dumps({"inputs": [X, X]}).encode(), {}
    yield "10,000 inputs", json.dumps({"inputs": [X | {"name": f"x{index}"} for index in range(10_000)]}).encode(), {}
    yield "100,000 outputs", json.dumps(GOOD | {"outputs": [{"name": f"y{i}"} for i in range(100_000)]}).encode(), {}
    yield "long name", json.dumps({"inputs": [X | {"name": "n" * 500_000}]}).encode(), {}
    yield "gzip of nothing good", gzip.compress(b"\0" * 100_000), {"Content-Encoding": "gzip"}
    yield "bomb", gzip.compress(b" " * (64 << 20)), {"Content-Encoding": "gzip"}
    for coding in ("br", "gzip", "deflate", "zstd", "gzip,deflate,gzip,deflate,gzip", "\xe9", "," * 1000 + "x"):
        yield f"coding {coding[:9]!r}", good, {"Content-Encoding": coding}


def _odd_fields() -> Iterator[tuple[str, bytes, dict[str, str]]]:
    """Each field missing, and with a value of each wrong kind."""
    for value in ODD_VALUES:
        for field in ("inputs", "outputs", "id", "parameters"):
            if _is_fine(field, value):
                continue
            yield f"{field} is {value!r}", json.dumps(GOOD | {field: value}).encode(), {}
        for field in ("name", "datatype", "shape", "data", "parameters"):
            if _is_fine(field, value):
                continue
            yield f"input's {field} is {value!r}", json.dumps({"inputs": [X | {field: value}]}).encode(), {}
        yield f"an input is {value!r}", json.dumps({"inputs": [value]}).encode(), {}
        yield f"an output is {value!r}", json.dumps(GOOD | {"outputs": [value]}).encode(), {}
        if value is not True:
            wish = {"name": "y", "parameters": {"binary_data": value}}
            yield f"binary_data is {value!r}", json.dumps(GOOD | {"outputs": [wish]}).encode(), {}
            yield f"default is {value!r}", json.dumps(GOOD | {"parameters": {"binary_data_output": value}}).encode(), {}
        if value != 0 or value is None:
            timed = json.dumps(GOOD | {"parameters": {"timeout": value}})
            if value not in ("", 2**70):
                yield f"timeout is {value!r}", timed.encode(), {}
    for field in ("name", "datatype", "shape", "data"):
        without = {name: value for name, value in X.items() if name != field}
        yield f"no {field}", json.dumps({"inputs": [without]}).encode(), {}
    for region in ("input", "output"):
        memory = {"parameters": {"shared_memory_region": "r", "shared_memory_byte_size": 12}}
        body = {"inputs": [{k: v for k, v in X.items() if k != "data"} | memory]} if region == "input" else dict(GOOD)
        if region == "output":
            body["outputs"] = [{"name": "y"} | memory]
        yield f"{region} in shared memory", json.dumps(body).encode(), {}


def _is_fine(field: str, value: Any) -> bool:
    """Whether the value is right for the field: null or nothing for what is optional."""
    if field in ("outputs", "parameters"):
        return (value in (None, {}) and value != []) or (field == "outputs" and value == []) or value == {"x": 1}
    return field == "id" and (value is None or isinstance(value, str))


def _odd_shapes() -> Iterator[tuple[str, bytes, dict[str, str]]]:
    for shape in (
        [-1, 3],
        [3],
        [1, 3, 1],
        [3, 1],
        [0, 3],
        [1, -3],
        [2**31, 2**31],
        [2**62, 4],
        [2**63, 3],
        [2**64, 3],
        [10**30],
        [0, 2**63],
        [1] * 40 + [3],
        [2**62] * 40_000,
        [1.0, 3],
        ["1", 3],
        [[1, 3]],
        [None, 3],
        [True, 3],
    ):
        yield f"shape {str(shape)[:40]}", json.dumps({"inputs": [X | {"shape": shape}]}).encode(), {}
    text = json.dumps({"inputs": [X]})
    for number in (HUGE_INTEGER, "-" + HUGE_INTEGER, "1e400", "1E5", "01", "0x1", "NaN", "Infinity", "-"):
        yield f"a dimension is {number[:12]}", text.replace("[1, 3]", f"[{number}, 3]").encode(), {}
        if number not in ("NaN", "Infinity", "1E5"):
            yield f"an element is {number[:12]}", text.replace("[1, 2, 3]", f"[{number}, 2, 3]").encode(), {}


def _odd_data() -> Iterator[tuple[str, bytes, dict[str, str]]]:
    for data in (
        [1, 2],
        [1, 2, 3, 4],
        [[1, 2], [3]],
        [1, [2, 3]],
        [[1, 2, 3], []],
        [1, 2, None],
        [1, 2, "3"],
        [1, 2, {}],
        [True, 2, 3],
        [1e39, 2, 3],
        "123",
        {"0": 1},
    ):
        yield f"data {data!r}", json.dumps({"inputs": [X | {"data": data}]}).encode(), {}
    for datatype in ("FP31", "fp32", "", "INT32", "BYTES", "BF16", "TYPE_FP32", "\u2028" * 50):
        yield f"datatype {datatype!r}", json.dumps({"inputs": [X | {"datatype": datatype}]}).encode(), {}


def _odd_binary(good: bytes) -> Iterator[tuple[str, bytes, dict[str, str]]]:
    bare = {name: value for name, value in X.items() if name != "data"}
    for size in (-1, 0, 11, 13, 2**31, 2**63, 2**70, 12.0, "12", None, True, [12]):
        text = json.dumps({"inputs": [bare | {"parameters": {"binary_data_size": size}}]}).encode()
        yield f"binary_data_size {size!r}", text + RAW, {LENGTH: str(len(text))}
    text = json.dumps({"inputs": [bare | {"parameters": {"binary_data_size": 12}}]}).encode()
    huge = text.replace(b"12}", HUGE_INTEGER.encode() + b"}")
    yield "binary_data_size of 5,000 digits", huge + RAW, {LENGTH: str(len(huge))}
    both = json.dumps({"inputs": [X | {"parameters": {"binary_data_size": 12}}]}).encode()
    yield "data and a blob", both + RAW, {LENGTH: str(len(both))}
    yield "too short a blob", text + RAW[:-1], {LENGTH: str(len(text))}
    yield "more than the blob", text + RAW + b"x", {LENGTH: str(len(text))}
    yield "no length", text + RAW, {}
    for length in (
        "1",
        str(len(text) - 1),
        str(len(text) + 1),
        str(len(text) + 13),
        "-1",
        "+5",
        "1e2",
        "0x10",
        "ten",
        " ",
        "\xb2",
        "12 34",
        "1,2",
        "99999999999999999999",
        HUGE_INTEGER,
    ):
        yield f"length {length[:20]!r}", text + RAW, {LENGTH: length}
    yield "length of plain JSON one too small", good, {LENGTH: str(len(good) - 1)}
    for raw in (b"", RAW[:-1], RAW + b"x"):
        yield f"raw request of {len(raw)} bytes", raw, {LENGTH: "0"}


def _any_bodies() -> Iterator[tuple[str, bytes]]:
    """For a model that leaves its shapes open, where the protocol alone has to say no."""
    given = {"name": "x_INT8", "datatype": "INT8", "shape": [1], "data": [1]}
    for shape in ([0, 2**62], [0] + [2**62] * 40, [1] * 33, [2**62] * 40_000, [2**40, 2**40], [-1], [2**32, 2**32]):
        yield f"open shape {str(shape)[:40]}", json.dumps({"inputs": [given | {"shape": shape}]}).encode()
    for value in (128, -129, 1.5, "1", None, True, 2**70):
        yield f"INT8 {value!r}", json.dumps({"inputs": [given | {"data": [value]}]}).encode()
    for token in ("NaN", "Infinity", "-Infinity"):
        yield f"INT8 {token}", json.dumps({"inputs": [given]}).replace("[1]}", f"[{token}]}}").encode()
    text = {"name": "x_BYTES", "datatype": "BYTES", "shape": [1], "data": [1]}
    for value in (1, None, ["a"], {"b64": "YQ=="}):
        yield f"BYTES {value!r}", json.dumps({"inputs": [text | {"data": [value]}]}).encode()
    yield "half a surrogate pair", json.dumps({"inputs": [text | {"data": ["\ud800"]}]}).encode()
    yield "NaN and half a surrogate pair", b'{"inputs":[{"name":"\\ud800","datatype":"FP32","shape":[1],"data":[NaN]}]}'


def http_other() -> Iterator[tuple[str, bytes, set[int]]]:
    """Everything but inference: paths, headers, other bodies."""
    for path in (
        "/v2/models/%ff/infer",
        "/v2/models/%/infer",
        "/v2/models/%zz/infer",
        "/v2/models/%00/infer",
        "/v2/models/a%2Fb/infer",
        "/v2/models/" + "m" * 60_000 + "/infer",
        "/v2/models/onnx_fp32/versions/" + HUGE_INTEGER + "/infer",
        "/v2/models/onnx_fp32/versions/%D9%A1/infer",
        "/v2/models/onnx_fp32/versions/-1/infer",
        "/v2/models/onnx_fp32/versions/1e0/infer",
        "/v2/models/" + "%2e%2e%2f" * 20 + "etc%2fpasswd/infer",
        "//v2/models/onnx_fp32/infer",
        "/v2/../v2/models/onnx_fp32/infer",
        "/" * 5000,
        "/v2/models/\u00e9/infer",
    ):
        yield f"POST {path[:50]}", request("POST", path, json.dumps({"inputs": [X]}).encode()), {400, 404}
        yield f"GET {path[:50]}", request("GET", path), {400, 404, 405}
        ready = path.replace("/infer", "/ready")
        yield f"GET {ready[:50]}", request("GET", ready), {400, 404}
    yield "long query", request("POST", f"{INFER}?{'q' * 60_000}", b"{"), {400}
    for method in ("TRACE", "CONNECT", "OPTIONS", "DELETE", "PROPFIND", "QUERY", "PRI"):
        yield f"method {method}", request(method, INFER), {400, 404, 405}
    for value in ODD_VALUES:
        body = json.dumps(value).encode()
        if value != {}:
            yield (
                f"index of {value!r}",
                request("POST", "/v2/repository/index", body),
                {200, 400} if isinstance(value, dict) else {400},
            )
        if value is not True:
            body = json.dumps({"ready": value}).encode()
            yield f"index ready {value!r}", request("POST", "/v2/repository/index", body), {400}
        if value != {}:
            body = json.dumps({"parameters": value}).encode()
            yield f"load with {value!r}", request("POST", "/v2/repository/models/any/load", body), {400, 501, 503}
            yield f"unload with {value!r}", request("POST", "/v2/repository/models/any/unload", body), {400, 501, 503}
    for what in ("index", "models/any/load", "models/any/unload"):
        for body in (
            b"{",
            b"[" * 100_000,
            b'{"ready":' * 50_000,
            b"\xff\xfe",
            b"\0",
            b'{"parameters":{"config":"' + b"{" * 9,
        ):
            yield f"{what} with {body[:20]!r}", request("POST", f"/v2/repository/{what}", body), {400}


def broken_http() -> Iterator[tuple[str, bytes]]:
    """What is hardly HTTP, or HTTP that two servers could understand differently."""
    good = json.dumps({"inputs": [X]}).encode()
    top = f"POST {INFER} HTTP/1.1\r\nHost: t\r\n".encode()
    for name, lines in {
        "two lengths": b"Content-Length: 5\r\nContent-Length: 6\r\n",
        "a list of lengths": b"Content-Length: 5, 6\r\n",
        "length and chunks": b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        "chunks and length": b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
        "a negative length": b"Content-Length: -5\r\n",
        "a length with a sign": b"Content-Length: +5\r\n",
        "a length in hexadecimal": b"Content-Length: 0x5\r\n",
        "a length of 5,000 digits": b"Content-Length: " + HUGE_INTEGER.encode() + b"\r\n",
        "a length past 64 bits": b"Content-Length: 18446744073709551617\r\n",
        "an empty length": b"Content-Length:\r\n",
        "an unknown transfer coding": b"Transfer-Encoding: cow\r\n",
        "chunked not last": b"Transfer-Encoding: chunked, gzip\r\n",
        "chunked twice": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
        "a blank before the colon": b"Content-Length : 5\r\n",
        "a folded line": b"X: a\r\n b: c\r\nContent-Length: 5\r\n",
        "no colon": b"nonsense\r\n",
        "a NUL": b"X: a\0b\r\n",
        "a bare CR": b"X: a\rb\r\n",
        "a name of no letters": b": value\r\n",
    }.items():
        yield name, top + lines + b"\r\n" + good
    for name, chunks in {
        "a chunk size of no digits": b"zz\r\nhello\r\n0\r\n\r\n",
        "a negative chunk size": b"-5\r\nhello\r\n0\r\n\r\n",
        "a chunk size past 64 bits": b"fffffffffffffffff\r\nhello\r\n0\r\n\r\n",
        "a chunk longer than it says": b"2\r\nhello\r\n0\r\n\r\n",
    }.items():
        yield name, top + b"Transfer-Encoding: chunked\r\n\r\n" + chunks
    for line in (
        b"POST",
        b"POST  HTTP/1.1",
        b"POST / HTTP/9.9",
        b"POST / HTCPCP/1.0",
        b"post / HTTP/1.1",
        b"GET /\r\n",
        b"GET /a b HTTP/1.1",
        b"\0\0\0\0",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM",
        b"SSH-2.0-OpenSSH_9.0",
        b"GET http://[ HTTP/1.1",
    ):
        yield f"first line {line[:20]!r}", line + b"\r\n\r\n"


def mutations(count: int, seed: int = 20_240) -> Iterator[tuple[str, bytes]]:
    """Good requests with bytes changed, cut, doubled and swapped."""
    chance = random.Random(seed)
    text = json.dumps(
        {"inputs": [{k: v for k, v in X.items() if k != "data"} | {"parameters": {"binary_data_size": 12}}]}
    )
    good = (
        request("POST", INFER, json.dumps(GOOD).encode()),
        request("POST", INFER, text.encode() + RAW, {LENGTH: str(len(text))}),
        request("POST", ROUTE, json.dumps(GOOD).encode()),
        request("POST", "/v2/repository/index", b'{"ready": true}'),
    )
    for index in range(count):
        yield f"mutation {index} of seed {seed}", mutated(chance.choice(good), chance)


def mutated(data: bytes, chance: random.Random) -> bytes:
    """``data`` with a few things wrong."""
    spoiled = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(spoiled) + 1)
        match chance.randrange(5):
            case 0:
                spoiled[at : at + 1] = bytes([chance.randrange(256)])
            case 1:
                del spoiled[at : at + chance.randint(1, 8)]
            case 2:
                spoiled[at:at] = spoiled[at : at + chance.randint(1, 30)]
            case 3:
                spoiled[at:at] = chance.choice([b"\r\n", b"\0", b"9" * 30, b"-", b'"', b"{", b"[", b"null", b"\xff"])
            case 4:
                spoiled[at : at + 1] = (
                    bytes([spoiled[at % len(spoiled)] ^ 1 << chance.randrange(8)]) if spoiled else b""
                )
        if not spoiled:
            spoiled += b"x"
    return bytes(spoiled)


# -- gRPC -------------------------------------------------------------------------------------------------


def good_message() -> Any:
    """A ModelInferRequest that succeeds."""
    message = pb.ModelInferRequest(model_name="onnx_fp32", id="7", raw_input_contents=[RAW])
    message.inputs.add(name="x", datatype="FP32", shape=[1, 3])
    message.outputs.add(name="y")
    return message


def typed_message() -> Any:
    """The same with typed contents."""
    message = good_message()
    del message.raw_input_contents[:]
    message.inputs[0].contents.fp32_contents.extend([1, 2, 3])
    return message


def grpc_infer() -> Iterator[tuple[str, bytes]]:
    """Serialised messages that say something wrong."""
    for name, shape in {
        "negative": [-1, 3],
        "both negative": [-1, -3],
        "empty": [],
        "rank": [1, 1, 3],
        "zero": [0, 3],
        "huge": [2**62, 3],
        "overflow": [2**62, 4],
        "all huge": [2**62] * 40,
        "so many digits": [2**62] * 400,
        "so many dimensions": [2**62] * 40_000,
        "least": [-(2**63), 3],
        "huge and empty": [0, 2**62, 2**62],
        "40 dimensions": [1] * 40,
    }.items():
        for kind in (good_message, typed_message):
            message = kind()
            del message.inputs[0].shape[:]
            message.inputs[0].shape.extend(shape)
            yield f"shape {name} in {kind.__name__}", message.SerializeToString()
            if name == "rank":
                continue
            message.model_name, message.inputs[0].name = "any", "x_FP32"
            del message.outputs[:]
            yield f"open shape {name} in {kind.__name__}", message.SerializeToString()
    for field, value in {
        "model_name": ("", "nobody", "onnx_fp32\0", "../any", "m" * 3000, "\u2028"),
        "model_version": ("2", "-1", "x", "\u0661", HUGE_INTEGER, "1.0", "v" * 3000),
    }.items():
        for one in value:
            message = good_message()
            setattr(message, field, one)
            yield f"{field} is {one[:20]!r}", message.SerializeToString()
    for field, value in {"name": ("", "z", "x\0"), "datatype": ("", "fp32", "FP31", "BYTES", "BF16", "INT64")}.items():
        for one in value:
            for kind in (good_message, typed_message):
                message = kind()
                setattr(message.inputs[0], field, one)
                yield f"input's {field} is {one!r} in {kind.__name__}", message.SerializeToString()
    for size in (0, 1, 11, 13, 100_000):
        message = good_message()
        message.raw_input_contents[0] = b"\1" * size
        yield f"{size} raw bytes", message.SerializeToString()
    for prefix in (0xFFFFFFFF, 0x7FFFFFFF, 9, 0):
        message = good_message()
        message.model_name, message.inputs[0].name, message.inputs[0].datatype = "any", "x_BYTES", "BYTES"
        del message.outputs[:]
        message.raw_input_contents[0] = struct.pack("<I", prefix) + b"12345678"
        yield f"a text's length is {prefix}", message.SerializeToString()
    yield from _grpc_counts()


def _grpc_counts() -> Iterator[tuple[str, bytes]]:
    message = good_message()
    message.inputs.append(message.inputs[0])
    message.raw_input_contents.append(RAW)
    yield "input twice", message.SerializeToString()
    message = good_message()
    del message.inputs[:]
    yield "raw contents of no input", message.SerializeToString()
    message = pb.ModelInferRequest()
    yield "nothing", message.SerializeToString()
    message = pb.ModelInferRequest(model_name="any")
    yield "no inputs", message.SerializeToString()
    message = good_message()
    for index in range(5000):
        message.inputs.add(name=f"i{index}", datatype="FP32", shape=[1])
        message.raw_input_contents.append(b"\0" * 4)
    yield "5,000 inputs", message.SerializeToString()
    message = good_message()
    message.outputs.add(name="z")
    yield "unknown output", message.SerializeToString()
    message = good_message()
    message.parameters["timeout"].string_param = "soon"
    yield "timeout is a text", message.SerializeToString()
    message = good_message()
    message.parameters["timeout"].double_param = float("nan")
    yield "timeout is NaN", message.SerializeToString()
    message = good_message()
    message.parameters["x"].SetInParent()
    yield "a parameter without a value", message.SerializeToString()


def grpc_garbage() -> Iterator[tuple[str, bytes]]:
    """What is no message at all."""
    good = good_message().SerializeToString()
    for cut in (1, 5, 20, len(good) - 1):
        yield f"cut at {cut}", good[:cut]
    yield "text that is not UTF-8", b"\x0a\x02\xff\xfe"
    yield "a length past the end", b"\x0a\xff\xff\xff\xff\x0f"
    yield "an endless varint", b"\xff" * 40
    yield "JSON", json.dumps(GOOD).encode()
    yield "a group that does not end", b"\x0b" * 500
    chance = random.Random(7)
    yield from ((f"random bytes {index}", chance.randbytes(60)) for index in range(20))


def grpc_mutations(count: int, seed: int = 4711) -> Iterator[tuple[str, bytes]]:
    """Good messages with bytes wrong, some of which still say something, and a few something good."""
    chance = random.Random(seed)
    good = (good_message().SerializeToString(), typed_message().SerializeToString())
    for index in range(count):
        yield f"mutation {index} of seed {seed}", mutated(chance.choice(good), chance)

"""One way to send a case, whatever the protocol: six front ends that take a ``Call`` and give an ``Answer``."""

import http.client
import json
from dataclasses import dataclass, field
from typing import Any

import grpc
from wire_values import BINARY_ONLY, CONTENTS, Given, unpack

from headrace.wire import pb

UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
TIMEOUT_S = 60


@dataclass(frozen=True)
class Call:
    """An inference request, in no protocol's terms. ``output_parameters`` are by output."""

    model: str
    inputs: tuple[Given, ...] = ()
    version: str = ""
    id: str = ""
    outputs: tuple[str, ...] = ()
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """A response: HTTP's or gRPC's own ``status``, and either a ``message`` or the outputs in their order."""

    status: int | str
    message: str = ""
    model: str = ""
    version: str = ""
    id: str = ""
    outputs: tuple[Given, ...] = ()

    @property
    def ok(self) -> bool:
        return self.status in (200, "OK")


class HttpFront:
    """Over HTTP: tensors as JSON or binary, through the fast lane or the application's ordinary route."""

    def __init__(self, address: str, *, binary: bool, ordinary: bool) -> None:
        host, _, port = address.rpartition(":")
        self._connection = http.client.HTTPConnection(host, int(port), timeout=TIMEOUT_S)
        self._binary = binary
        self._ordinary = ordinary

    def close(self) -> None:
        self._connection.close()

    def can_carry(self, tensor: Given) -> bool:
        """Whether the protocol has a form for the tensor."""
        if self._binary:
            return True
        if tensor.datatype == "BYTES":
            return all(_is_utf8(value) for value in tensor.values)
        return tensor.datatype not in BINARY_ONLY

    def infer(self, call: Call) -> Answer:
        blobs = []
        document: dict[str, Any] = {"inputs": []}
        for tensor in call.inputs:
            one: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape}
            if self._binary:
                blobs.append(tensor.raw)
                one["parameters"] = {"binary_data_size": len(blobs[-1])}
            else:
                one["data"] = [_json_value(value) for value in tensor.values]
            document["inputs"].append(one)
        if call.id:
            document["id"] = call.id
        if call.outputs:
            document["outputs"] = [{"name": name} for name in call.outputs]
        parameters = dict(call.parameters)
        if self._binary:
            parameters["binary_data_output"] = True
        if parameters:
            document["parameters"] = parameters
        header = json.dumps(document).encode()
        headers = {"Inference-Header-Content-Length": str(len(header))} if self._binary else {}
        status, answer_headers, body = self.send(call, b"".join([header, *blobs]), headers)
        return read_answer(status, answer_headers, body)

    def send(self, call: Call, body: bytes, headers: dict[str, str]) -> tuple[int, http.client.HTTPMessage, bytes]:
        version = f"/versions/{call.version}" if call.version else ""
        # An escaped letter: the lane leaves the path to the application, which unescapes it.
        path = f"/v2/models/{call.model}{version}/{'%69nfer' if self._ordinary else 'infer'}"
        self._connection.request("POST", path, body, headers)
        response = self._connection.getresponse()
        return response.status, response.msg, response.read()


def read_answer(status: int, headers: Any, body: bytes) -> Answer:
    """An HTTP response to an inference request; its form is checked on the way."""
    length = headers.get("Inference-Header-Content-Length")
    document = json.loads(body if length is None else body[: int(length)])
    if status != 200:
        assert list(document) == ["error"]
        assert isinstance(document["error"], str)
        assert document["error"]
        assert headers["content-type"] == "application/json"
        return Answer(status, document["error"])
    assert headers["content-type"] == ("application/json" if length is None else "application/octet-stream")
    position = len(body) if length is None else int(length)
    outputs = []
    for one in document["outputs"]:
        shape, datatype = tuple(one["shape"]), one["datatype"]
        size = one.get("parameters", {}).get("binary_data_size")
        assert (size is None) == ("data" in one), "an output has either data or a size"
        if size is None:
            values = tuple(value.encode() if isinstance(value, str) else value for value in one["data"])
        else:
            values = unpack(datatype, shape, body[position : position + size])
            position += size
        outputs.append(Given(one["name"], datatype, shape, values))
    assert position == len(body), "nothing follows the last output"
    version = document["model_version"]
    return Answer(200, "", document["model_name"], version, document.get("id", ""), tuple(outputs))


class GrpcFront:
    """Over gRPC, tensors raw or as typed contents."""

    def __init__(self, address: str, *, raw: bool) -> None:
        self._channel = grpc.insecure_channel(address, options=UNLIMITED)
        self._infer = rpc(self._channel, "ModelInfer")
        self._raw = raw

    def close(self) -> None:
        self._channel.close()

    def can_carry(self, tensor: Given) -> bool:
        """Whether the protocol has a form for the tensor."""
        return self._raw or tensor.datatype not in BINARY_ONLY

    def infer(self, call: Call) -> Answer:
        message = self.message(call)
        try:
            response = self._infer(message, timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            return Answer(error.code().name, error.details())
        assert len(response.raw_output_contents) == len(response.outputs)
        outputs = [
            Given(one.name, one.datatype, tuple(one.shape), unpack(one.datatype, tuple(one.shape), bytes(raw)))
            for one, raw in zip(response.outputs, response.raw_output_contents, strict=True)
        ]
        return Answer("OK", "", response.model_name, response.model_version, response.id, tuple(outputs))

    def message(self, call: Call) -> Any:
        message = pb.ModelInferRequest(model_name=call.model, model_version=call.version, id=call.id)
        for tensor in call.inputs:
            one = message.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
            if self._raw:
                message.raw_input_contents.append(tensor.raw)
            elif tensor.datatype in CONTENTS:
                getattr(one.contents, CONTENTS[tensor.datatype]).extend(tensor.values)
            else:
                one.contents.fp32_contents.extend(tensor.values)
        for name in call.outputs:
            message.outputs.add(name=name)
        for name, value in call.parameters.items():
            kind = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}[type(value)]
            setattr(message.parameters[name], kind, value)
        return message


def rpc(channel: grpc.Channel, name: str) -> Any:
    """One of the service's procedures."""
    kinds = pb.RPCS[name]
    return channel.unary_unary(
        f"/{pb.SERVICE}/{name}",
        request_serializer=kinds.request.SerializeToString,
        response_deserializer=kinds.response.FromString,
    )


def _json_value(value: Any) -> Any:
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True

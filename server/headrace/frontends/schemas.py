"""What the OpenAPI document says of each path: its parameters, bodies and answers. No request is parsed by these."""

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request

Scalar = bool | int | float | str
Datatype = Literal[
    "BOOL",
    "UINT8",
    "UINT16",
    "UINT32",
    "UINT64",
    "INT8",
    "INT16",
    "INT32",
    "INT64",
    "FP16",
    "BF16",
    "FP32",
    "FP64",
    "BYTES",
]


class ErrorBody(BaseModel):
    """What every response that is not a success holds."""

    error: str


class LiveBody(BaseModel):
    """The process answers."""

    live: bool


class ReadyBody(BaseModel):
    """The server can take inference requests."""

    ready: bool


class ModelReadyBody(BaseModel):
    """The model can take inference requests."""

    name: str
    ready: bool


class ServerMetadataBody(BaseModel):
    """The server and what it offers beyond the base protocol."""

    name: str
    version: str
    extensions: list[str]


class TensorMetadataBody(BaseModel):
    """An input or output; -1 in ``shape`` is a dimension of any size."""

    name: str
    datatype: Datatype
    shape: list[int]


class ModelMetadataBody(BaseModel):
    """A model and its tensors."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadataBody]
    outputs: list[TensorMetadataBody]


class ModelConfigBody(BaseModel):
    """A model's configuration, with the fields of Triton's ModelConfig, of which these are the main ones."""

    model_config = ConfigDict(extra="allow")

    name: str
    platform: str
    backend: str
    max_batch_size: int
    input: list[dict[str, Any]]
    output: list[dict[str, Any]]


class ModelListBody(BaseModel):
    """The names of the models in the repository."""

    models: list[str]


class InferInputBody(BaseModel):
    """One input: its data as JSON (flat or nested, row-major), or ``binary_data_size`` among its parameters."""

    name: str
    shape: list[int]
    datatype: Datatype
    parameters: dict[str, Scalar] | None = None
    data: list[Any] | None = None


class InferRequestedOutputBody(BaseModel):
    """An output that is wanted."""

    name: str
    parameters: dict[str, Scalar] | None = None


class InferRequestBody(BaseModel):
    """An inference request. Without ``outputs`` every output is returned."""

    id: str | None = None
    parameters: dict[str, Scalar] | None = None
    inputs: list[InferInputBody]
    outputs: list[InferRequestedOutputBody] | None = None


class InferOutputBody(BaseModel):
    """One output, flat and row-major; without ``data`` where ``parameters`` say that it is elsewhere."""

    name: str
    shape: list[int]
    datatype: Datatype
    parameters: dict[str, Scalar] = Field(default_factory=dict)
    data: list[Scalar] = Field(default_factory=list)


class InferResponseBody(BaseModel):
    """The answer to an inference request."""

    model_config = ConfigDict(protected_namespaces=())

    model_name: str
    model_version: str
    id: str = Field(default_factory=str)
    parameters: dict[str, Scalar] = Field(default_factory=dict)
    outputs: list[InferOutputBody]


class GenerateRequestBody(BaseModel):
    """A request as one flat object: an input's name as key, with a value or a flat list; other keys are parameters."""

    model_config = ConfigDict(extra="allow")

    id: str | int = Field(default_factory=str)
    parameters: dict[str, Any] | None = None


class GenerateResponseBody(BaseModel):
    """A response as one flat object: beside these, each output by its name."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model_name: str
    model_version: str
    id: str = Field(default_factory=str)


class IndexRequestBody(BaseModel):
    """Which models are wanted: with ``ready`` only those that serve."""

    ready: bool = False


class IndexEntryBody(BaseModel):
    """A line of the repository index; a model that was never loaded has only its name."""

    name: str
    version: str = Field(default_factory=str)
    state: str = Field(
        default_factory=str, json_schema_extra={"enum": ["READY", "LOADING", "UNLOADING", "UNAVAILABLE"]}
    )
    reason: str = Field(default_factory=str)


class LoadRequestBody(BaseModel):
    """What to use in place of the model's own files: ``config``, and ``file:VERSION/NAME`` in base64."""

    parameters: dict[str, str] | None = None


class UnloadParameters(BaseModel):
    """Whether to unload also the models that were loaded only as parts of this one."""

    model_config = ConfigDict(extra="forbid")

    unload_dependents: bool = False


class UnloadRequestBody(BaseModel):
    """How a model is unloaded."""

    parameters: UnloadParameters | None = None


EVENT_STREAM = "text/event-stream"

TAGS = [
    {"name": "health", "description": "Whether the server and its models can take requests."},
    {"name": "metadata", "description": "What the server offers, and what its models take and give."},
    {"name": "inference", "description": "Running models."},
    {"name": "repository", "description": "Which models are served, and changing that."},
    {"name": "statistics", "description": "What models have done since they were loaded."},
    {"name": "shared memory", "description": "Memory that tensors pass through between a client and this server."},
    {"name": "trace", "description": "Traces of single requests."},
    {"name": "recording", "description": "Recording real inputs of a model."},
    {"name": "logging", "description": "What the server logs."},
    {"name": "metrics", "description": "Numbers for Prometheus."},
]

_ERRORS = {
    400: "The request is malformed, or asks for what it cannot have.",
    403: "The path is restricted (--restricted-api) and the request lacks its header, or its offer is switched off.",
    404: "There is no such model, version, region or path.",
    413: "The body is larger than the server takes (--max-request-bytes).",
    500: "The model failed, or this server did.",
    501: "Understood, but not offered by this server, model or configuration.",
    503: "Not now, or not under the server's present settings.",
}
_RETRY_AFTER = {"Retry-After": {"description": "Seconds to wait before it may work.", "schema": {"type": "integer"}}}

_SEVEN = [0, 0, 3, 14, 16, 14, 0, 0, 0, 0, 13, 13, 13, 16, 2, 0, 0, 0, 1, 0, 9, 15, 0, 0, 0, 0, 9, 12, 15, 16, 10, 0]
_SEVEN += [0, 4, 16, 16, 16, 11, 3, 0, 0, 0, 4, 9, 14, 2, 0, 0, 0, 0, 2, 15, 9, 0, 0, 0, 0, 0, 4, 13, 1, 0, 0, 0]
# A seven to the sample model `digits`, 8 x 8 pixels.
INFER_EXAMPLE = {"id": "1", "inputs": [{"name": "image", "shape": [1, 64], "datatype": "FP32", "data": _SEVEN}]}
GENERATE_EXAMPLE = {"id": "1", "image": _SEVEN}

_PATH_PARAMETERS = {
    "name": ("A model's name.", "digits"),
    "version": ("A model's version, a number.", "1"),
    "region": ("A shared memory region's name, which the client chooses.", "image"),
    "repository_name": ("A repository's name.", "repository"),
}

_INFER_HEADERS: list[tuple[str, dict[str, Any], str]] = [
    (
        "Inference-Header-Content-Length",
        {"type": "integer", "minimum": 0},
        "The length of the JSON part, where binary data follow it; 0 where the body is the data of the one input.",
    ),
    (
        "endpoint-load-metrics-format",
        {"type": "string"},
        "text or json: has the response tell the server's load in this form, in its header endpoint-load-metrics.",
    ),
]
_ENCODING_HEADER: tuple[str, dict[str, Any], str] = (
    "Content-Encoding",
    {"type": "string"},
    "How the body is compressed: gzip or deflate.",
)
_TIMEOUT_HEADER: tuple[str, dict[str, Any], str] = (
    "grpc-timeout",
    {"type": "string", "pattern": "^[0-9]{1,8}[HMSmun]$"},
    "How long the client waits, as in gRPC: up to 8 digits and H, M, S, m (milliseconds), u or n.",
)
_INFER_ANSWER_HEADERS = {
    "Inference-Header-Content-Length": {
        "description": "The length of the body's JSON part, where binary data follow it.",
        "schema": {"type": "integer"},
    },
    "endpoint-load-metrics": {
        "description": "The server's load, where it was asked for.",
        "schema": {"type": "string"},
    },
}
_BINARY = {
    "type": "string",
    "format": "binary",
    "description": "The JSON part, its length in the header Inference-Header-Content-Length, and behind it the raw "
    "data of each tensor that has a binary_data_size.",
}
# No schema: what a stream of events holds cannot be said in OpenAPI 3.1.
_EVENTS = {EVENT_STREAM: {"example": 'data: {"model_name":"digits","model_version":"1","probabilities":[0.5,0.5]}\n\n'}}
_FAILED_EVENT = {EVENT_STREAM: {"example": 'data: {"error":"model \'digits\': what was wrong"}\n\n'}}


def model_in(request: Request) -> tuple[str, str]:
    """The model and the version that a request's path names; the version is empty where there is none in it.

    Not parameters of the routes' functions: FastAPI would take a version that is not in the path from the query, and
    would document an answer 422 that there is not.
    """
    return request.path_params["name"], request.path_params.get("version", "")


def operation(
    path: str, *errors: int, body: dict[str, Any] | None = None, headers: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """The arguments of a route that describe it: parameters, body, and beside the success these errors.

    Any path of the protocol may be restricted, one with a parameter may be none (a name can hold a slash), and what
    stands for a version may be no number.
    """
    names = re.findall(r"\{(\w+)\}", path)
    statuses = sorted({*errors, 403, *([404] if names else []), *([400] if "version" in names else [])})
    extra: dict[str, Any] = {}
    parameters = [_path_parameter(path, name) for name in names] + (headers or [])
    if parameters:
        extra["parameters"] = parameters
    if body is not None:
        extra["requestBody"] = body
    return {"responses": {status: _error(status) for status in statuses}, "openapi_extra": extra}


def json_body(
    model: type[BaseModel],
    examples: dict[str, Any],
    *,
    required: bool = True,
    other: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A request's body: JSON, with examples by their titles, or ``other`` content by its type."""
    content = {"schema": _inlined(model), "examples": {title: {"value": value} for title, value in examples.items()}}
    return {"required": required, "content": {"application/json": content, **(other or {})}}


def inference(path: str) -> dict[str, Any]:
    """The arguments that describe a path for inference requests, but for its success."""
    body = json_body(
        InferRequestBody,
        {"a handwritten digit": INFER_EXAMPLE},
        other={"application/octet-stream": {"schema": _BINARY}},
    )
    headers = [_header(*one) for one in (*_INFER_HEADERS, _ENCODING_HEADER, _TIMEOUT_HEADER)]
    return operation(path, 400, 413, 500, 501, 503, body=body, headers=headers)


def infer(path: str) -> dict[str, Any]:
    """The arguments that describe a path whose answer is one inference response."""
    found = inference(path)
    found["responses"][200] = {
        "description": "The outputs: as JSON, or where some were asked for as binary data, behind it.",
        "headers": _INFER_ANSWER_HEADERS,
        "content": {"application/octet-stream": {"schema": _BINARY}},
    }
    return found | {"response_model": InferResponseBody}


def generation(path: str) -> dict[str, Any]:
    """The arguments that describe a path of the generate extension, but for its success."""
    body = json_body(GenerateRequestBody, {"a handwritten digit": GENERATE_EXAMPLE})
    headers = [_header(*one) for one in (_ENCODING_HEADER, _TIMEOUT_HEADER)]
    return operation(path, 400, 413, 500, 501, 503, body=body, headers=headers)


def streaming(described: dict[str, Any]) -> dict[str, Any]:
    """The same for a path that answers with events, also where the first of them is an error and decides the status."""
    responses = {status: {**response, "content": _FAILED_EVENT} for status, response in described["responses"].items()}
    success = {"description": "Each response as it is made, an event each.", "content": _EVENTS}
    return described | {"responses": {**responses, 200: success}}


def _error(status: int) -> dict[str, Any]:
    described: dict[str, Any] = {"model": ErrorBody, "description": _ERRORS[status]}
    return described | {"headers": _RETRY_AFTER} if status == 503 else described


def _path_parameter(path: str, name: str) -> dict[str, Any]:
    description, example = _PATH_PARAMETERS["region" if "/region/{name}" in path else name]
    return {
        "name": name,
        "in": "path",
        "required": True,
        "description": description,
        "schema": {"type": "string", "minLength": 1},
        "example": example,
    }


def _header(name: str, schema: dict[str, Any], description: str) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": False, "description": description, "schema": schema}


def _inlined(model: type[BaseModel]) -> dict[str, Any]:
    """A model's schema without references: they would be looked up in the whole document, where they are not."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def inline(value: Any) -> Any:
        if isinstance(value, dict):
            if "$ref" in value:
                return inline(definitions[value["$ref"].removeprefix("#/$defs/")])
            return {key: inline(one) for key, one in value.items()}
        return [inline(one) for one in value] if isinstance(value, list) else value

    inlined: dict[str, Any] = inline(schema)
    return inlined

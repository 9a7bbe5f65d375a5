"""The protocol's JSON bodies as the OpenAPI document shows them. Only documentation: no request is parsed by these."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

Scalar = bool | int | float | str


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
    datatype: str
    shape: list[int]


class ModelMetadataBody(BaseModel):
    """A model and its tensors."""

    model_config = ConfigDict(protected_namespaces=())

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadataBody]
    outputs: list[TensorMetadataBody]


class InferInputBody(BaseModel):
    """One input: its data as JSON (flat or nested, row-major), or ``binary_data_size`` among its parameters."""

    name: str
    shape: list[int] = Field(examples=[[1, 64]])
    datatype: str = Field(examples=["FP32"])
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
    """One output, flat and row-major."""

    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Scalar] | None = None
    data: list[Any] | None = None


class InferResponseBody(BaseModel):
    """The answer to an inference request."""

    model_config = ConfigDict(protected_namespaces=())

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[InferOutputBody]


class IndexEntryBody(BaseModel):
    """A line of the repository index; a model that was never loaded has only its name."""

    name: str
    version: str | None = None
    state: str | None = None
    reason: str | None = None


class ModelListBody(BaseModel):
    """The names of the models in the repository."""

    models: list[str]

"""Every call but inference, in both protocols' forms side by side: what is sent, and what the answer is made into."""

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from urllib.parse import quote

from headrace.client.answers import Health, IndexEntry, ModelMetadata, ModelStatistics, ServerMetadata
from headrace.client.errors import InvalidRequestError

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Operation(Generic[Value]):
    """One exchange with the server.

    ``body`` is None for a GET, else the JSON to post. ``fields`` are those of the RPC's request. The answer is the JSON
    value at ``http_key``, or the message's field ``rpc_key``, converted to ``answer``; without a key, all of it.
    """

    answer: Any  # the type of Value, which no type checker can tie to it for a dict or a tuple
    path: str
    rpc: str
    body: Any = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    http_key: str = ""
    rpc_key: str = ""


def model_path(name: str, version: str = "") -> str:
    """The path of one model or version.

    Raises:
        InvalidRequestError: no path can have these in it.
    """
    path = f"/v2/models/{_segment(name, 'model')}"
    return path if version == "" else f"{path}/versions/{_segment(version, 'version')}"


def _segment(text: str, what: str) -> str:
    if not isinstance(text, str):
        raise InvalidRequestError(None, f"the {what} is {text!r}, expected a text")
    try:
        segment = quote(text, safe="")
    except UnicodeError:
        segment = ""
    if segment in ("", ".", ".."):
        raise InvalidRequestError(None, f"{text!r} is no name of a {what}")
    return segment


def server_live() -> Operation[Health]:
    """Whether the server answers at all."""
    return Operation(Health, "/v2/health/live", "ServerLive")


def server_ready() -> Operation[Health]:
    """Whether the server takes inference requests."""
    return Operation(Health, "/v2/health/ready", "ServerReady")


def model_ready(name: str, version: str) -> Operation[Health]:
    """Whether a model takes inference requests."""
    fields = {"name": name, "version": version}
    return Operation(Health, f"{model_path(name, version)}/ready", "ModelReady", fields=fields)


def server_metadata() -> Operation[ServerMetadata]:
    """What the server is called and offers."""
    return Operation(ServerMetadata, "/v2", "ServerMetadata")


def model_metadata(name: str, version: str) -> Operation[ModelMetadata]:
    """A model's tensors."""
    fields = {"name": name, "version": version}
    return Operation(ModelMetadata, model_path(name, version), "ModelMetadata", fields=fields)


def model_config(name: str, version: str) -> Operation[dict[str, Any]]:
    """A model's configuration."""
    fields = {"name": name, "version": version}
    return Operation(
        dict[str, Any], f"{model_path(name, version)}/config", "ModelConfig", fields=fields, rpc_key="config"
    )


def statistics(name: str, version: str) -> Operation[tuple[ModelStatistics, ...]]:
    """What happened to a model, or to every one where ``name`` is empty."""
    return Operation(
        tuple[ModelStatistics, ...],
        f"{model_path(name, version)}/stats" if name else "/v2/models/stats",
        "ModelStatistics",
        fields={"name": name, "version": version},
        http_key="model_stats",
        rpc_key="model_stats",
    )


def index(ready: bool) -> Operation[tuple[IndexEntry, ...]]:
    """The repository's versions, or only those that are ready."""
    asked = {"ready": ready}
    return Operation(
        tuple[IndexEntry, ...], "/v2/repository/index", "RepositoryIndex", body=asked, fields=asked, rpc_key="models"
    )


def load(
    name: str, config: Mapping[str, Any] | str | None, files: Mapping[str, bytes] | None
) -> Operation[dict[str, Any]]:
    """Load a model, where ``config`` is given with that instead of its own; ``files`` are by path, as 1/model.onnx."""
    parameters: dict[str, str | bytes] = {}
    if config is not None:
        parameters["config"] = config if isinstance(config, str) else json.dumps(config)
    parameters.update({f"file:{path}": content for path, content in (files or {}).items()})
    texts = {
        key: value if isinstance(value, str) else base64.b64encode(value).decode() for key, value in parameters.items()
    }
    return Operation(
        dict[str, Any],
        f"/v2/repository/models/{_segment(name, 'model')}/load",
        "RepositoryModelLoad",
        body={"parameters": texts} if texts else {},
        fields={"model_name": name, "parameters": parameters},
    )


def unload(name: str, unload_dependents: bool) -> Operation[dict[str, Any]]:
    """Stop serving a model."""
    parameters = {"unload_dependents": True} if unload_dependents else {}
    return Operation(
        dict[str, Any],
        f"/v2/repository/models/{_segment(name, 'model')}/unload",
        "RepositoryModelUnload",
        body={"parameters": parameters} if parameters else {},
        fields={"model_name": name, "parameters": parameters},
    )

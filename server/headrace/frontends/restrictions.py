"""Groups of paths and RPCs that only requests with an agreed header may use."""

import re
from collections.abc import Iterable, Sequence
from hmac import compare_digest
from typing import NamedTuple

from headrace.core.errors import Restricted

GRPC_PREFIX = "triton-grpc-protocol-"
GROUPS = (
    "health",
    "metadata",
    "inference",
    "shared-memory",
    "model-config",
    "model-repository",
    "statistics",
    "trace",
    "logging",
)

_MODEL = "/v2/models/[^/]+"
_VERSION = f"{_MODEL}(?:/versions/[^/]+)?"

# Tried in this order, so that "/v2/models/stats" is no model's metadata.
_PATHS = tuple(
    (re.compile(pattern, re.DOTALL), group)  # a path may hold anything, percent-encoded
    for pattern, group in (
        ("/v2/health/(?:live|ready)", "health"),
        (f"{_VERSION}/ready", "health"),
        (f"/v2/models/stats|{_VERSION}/stats", "statistics"),
        ("/v2/?|/v2/models", "metadata"),
        (_VERSION, "metadata"),
        # Any model name, also one with slashes that the fast lane lets through.
        ("/v2/models/.+/(?:infer|infer_stream|generate|generate_stream)", "inference"),
        (f"{_VERSION}/config", "model-config"),
        ("/v2/repository/.*", "model-repository"),
        ("/v2/(?:system|cuda)sharedmemory/.*", "shared-memory"),
        (f"/v2/trace/setting|{_MODEL}/trace/setting", "trace"),
        (f"{_VERSION}/recording|{_MODEL}/recording/file", "trace"),  # like a trace, it tells what clients have sent
        ("/v2/logging", "logging"),
    )
)

_RPCS = {
    "ServerLive": "health",
    "ServerReady": "health",
    "ModelReady": "health",
    "Check": "health",
    "Watch": "health",
    "ServerMetadata": "metadata",
    "ModelMetadata": "metadata",
    "ModelInfer": "inference",
    "ModelStreamInfer": "inference",
    "ModelConfig": "model-config",
    "ModelStatistics": "statistics",
    "RepositoryIndex": "model-repository",
    "RepositoryModelLoad": "model-repository",
    "RepositoryModelUnload": "model-repository",
    "SystemSharedMemoryStatus": "shared-memory",
    "SystemSharedMemoryRegister": "shared-memory",
    "SystemSharedMemoryUnregister": "shared-memory",
    "CudaSharedMemoryStatus": "shared-memory",
    "CudaSharedMemoryRegister": "shared-memory",
    "CudaSharedMemoryUnregister": "shared-memory",
    "TraceSetting": "trace",
    "LogSettings": "logging",
}

# What a header's name may be made of in HTTP and in gRPC alike.
_HEADER = re.compile(r"[A-Za-z0-9_.-]+")
_VALUE = re.compile(r"[!-~](?:[ -~]*[!-~])?")


class _Key(NamedTuple):
    """The header that opens a group: as the owner wrote it, in each protocol's bytes, and its value."""

    header: str
    http_name: bytes
    grpc_name: str
    value: bytes


class Restrictions:
    """Who may use what. ``active`` is false where everybody may use everything: look at it before asking."""

    __slots__ = ("_keys", "active")

    def __init__(self, keys: dict[str, _Key]) -> None:
        self._keys = keys
        self.active = bool(keys)

    @classmethod
    def parse(cls, rules: Sequence[str]) -> "Restrictions":
        """The restrictions of ``--restricted-api``, each ``GROUP[,GROUP...]:HEADER=VALUE``.

        Raises:
            ValueError: naming everything that is wrong, without the values, which are secrets.
        """
        keys: dict[str, _Key] = {}
        problems = []
        for number, rule in enumerate(rules, 1):
            names, colon, pair = rule.partition(":")
            header, equals, value = pair.partition("=")
            where = f"--restricted-api number {number}"
            if not colon or not equals:
                problems.append(f"{where} is not of the form GROUP[,GROUP...]:HEADER=VALUE")
                continue
            if not _HEADER.fullmatch(header):
                problems.append(f"{where}: '{header}' is no header name, expected letters, digits, '-', '_' and '.'")
            if not _VALUE.fullmatch(value):
                problems.append(f"{where}: the value of '{header}' is empty, not ASCII or has spaces around it")
            key = _Key(header, header.lower().encode(), GRPC_PREFIX + header.lower(), value.encode())
            for group in names.split(","):
                if group not in GROUPS:
                    problems.append(f"{where}: there is no group '{group}', expected one of {', '.join(GROUPS)}")
                elif group in keys:
                    problems.append(f"{where}: group '{group}' is restricted already, expected each group once")
                else:
                    keys[group] = key
        if problems:
            raise ValueError("; ".join(problems))
        return cls(keys)

    def http_problem(self, path: str, headers: Iterable[tuple[bytes, bytes]]) -> Restricted | None:
        """Why a request may not be answered. ``path`` is percent-decoded, header names are in lower case."""
        return self.group_problem(http_group(path), headers)

    def group_problem(self, group: str, headers: Iterable[tuple[bytes, bytes]]) -> Restricted | None:
        """The same for an HTTP request whose group is known."""
        key = self._keys.get(group)
        if key is None or _holds(key.value, (value for name, value in headers if name == key.http_name)):
            return None
        return Restricted(f"This API is restricted, expecting header '{key.header}'")

    def grpc_problem(self, rpc: str, metadata: Iterable[tuple[str, str | bytes]]) -> Restricted | None:
        """Why a call of an RPC may not be answered."""
        key = self._keys.get(grpc_group(rpc))
        if key is None or _holds(key.value, (value for name, value in metadata if name == key.grpc_name)):
            return None
        return Restricted(f"This API is restricted, expecting header '{GRPC_PREFIX}{key.header}'")


def http_group(path: str) -> str:
    """The group that a percent-decoded path belongs to; empty for those outside of the protocol."""
    path = path.removesuffix("\n")  # as the router does, whose patterns end in "$"
    return next((group for pattern, group in _PATHS if pattern.fullmatch(path)), "")


def grpc_group(rpc: str) -> str:
    """The group that an RPC belongs to; empty for those outside of the protocol."""
    return _RPCS.get(rpc, "")


def _holds(expected: bytes, values: Iterable[str | bytes]) -> bool:
    """Whether ``expected`` is among the values, in a time that does not tell how much of one was right."""
    found = False
    for value in values:
        found |= compare_digest(expected, value.encode() if isinstance(value, str) else value)
    return found

"""What a client knows of its server between calls, and how it makes a call out of a caller's wishes."""

from collections.abc import Iterable, Mapping
from typing import Final

from headrace.client.address import parse_address
from headrace.client.answers import Health, IndexEntry, ModelMetadata
from headrace.client.errors import (
    ClientError,
    ConnectionFailed,
    DeadlineError,
    InvalidRequestError,
    NotFoundError,
    UnavailableError,
)
from headrace.client.operations import Operation, model_ready, server_ready
from headrace.client.terms import Terms, make_terms
from headrace.client.transport import Limits

DEFAULT_TIMEOUT_S = 60.0
DEFAULT_LOAD_TIMEOUT_S = 600.0
DEFAULT_MAX_CONNECTIONS = 100
DEFAULT_MAX_ANSWER_BYTES = (1 << 31) - 1  # what gRPC can carry
POLL_S = 0.1
# What a health request can end in that means no. Servers refuse the name of a model that is not ready, each in its way.
NOT_READY: Final = (ConnectionFailed, NotFoundError, InvalidRequestError, UnavailableError, DeadlineError)


class Session:
    """The part of a client that sends nothing. Any thread may use it.

    Metadata are kept for each model that was asked with a list, so for no more than the server has.
    """

    def __init__(
        self,
        url: str,
        timeout_s: float | None,
        headers: Mapping[str, str] | None,
        max_connections: int,
        max_answer_bytes: int,
    ) -> None:
        self.address = parse_address(url)
        if max_connections < 1 or max_answer_bytes < 1:
            raise ClientError(
                f"max_connections is {max_connections} and max_answer_bytes {max_answer_bytes}, expected at least 1"
            )
        self.limits = Limits(max_connections, max_answer_bytes)
        self.closed = False
        self._timeout_s = timeout_s
        self._headers = dict(headers or {})
        self._metadata: dict[tuple[str, str], ModelMetadata] = {}
        self.terms()  # so that wrong ones are refused here

    def terms(
        self, timeout_s: float | None = None, headers: Mapping[str, str] | None = None, *, whole_stream: bool = False
    ) -> Terms:
        """The terms of a call that begins now. A ``whole_stream`` may take any time unless the caller says otherwise.

        Raises:
            ClientError: the client is closed, or the terms are none.
        """
        if self.closed:
            raise ClientError(f"the client of {self.address.url} is closed")
        default_s = None if whole_stream else self._timeout_s
        return make_terms(timeout_s, default_s, {**self._headers, **(headers or {})})

    def known(self, model: str, version: str) -> ModelMetadata | None:
        """The metadata that were kept."""
        return self._metadata.get((model, version))

    def keep(self, model: str, version: str, metadata: ModelMetadata) -> None:
        """For later requests with lists."""
        self._metadata[model, version] = metadata

    def forget(self, model: str) -> None:
        """The model may have changed."""
        for key in [key for key in list(self._metadata) if key[0] == model]:
            self._metadata.pop(key, None)


def health_operation(model: str | None, version: str) -> Operation[Health]:
    """What to ask to learn whether a model, or else the server, takes requests."""
    return model_ready(model, version) if model else server_ready()


def models_of(entries: Iterable[IndexEntry]) -> list[str]:
    """Each model's name once."""
    return sorted({entry.name for entry in entries})


def not_ready_message(url: str, model: str | None, timeout_s: float, reason: Exception | None) -> str:
    """What to say when waiting was in vain; ``reason`` is the last error that told something."""
    what = f"model '{model}' at {url}" if model else url
    told = "" if reason is None else f": {str(reason).removeprefix(f'{url}: ')}"
    return f"{what} was not ready within {timeout_s:g} s{told}"

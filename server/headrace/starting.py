"""What a server needs before it starts: its repository, its ports, options that go together. Else it says so."""

import contextlib
import errno
import resource
import socket
from collections.abc import Iterable
from pathlib import Path

from headrace.config import Settings
from headrace.frontends.http_server import bind
from headrace.repository.layout import list_models


class CannotStart(Exception):
    """The server cannot start; the message says why and what to do."""


def check_folder(path: Path) -> None:
    """See that there is a model repository at ``path``.

    Raises:
        CannotStart: there is none.
    """
    if not path.is_dir():
        raise CannotStart(
            f"there is no model repository at '{path}': expected a folder with one folder a model, "
            "for instance NAME/1/model.onnx"
        )
    try:
        list_models(path)
    except OSError as error:
        raise CannotStart(f"the model repository '{path}' cannot be read: {error}") from error


def check_pairs(settings: Settings) -> None:
    """See that no option is given that would do nothing without another.

    Raises:
        CannotStart: one is; naming both.
    """
    if settings.load_model and settings.model_control != "explicit":
        raise CannotStart(
            f"--load-model {settings.load_model[0]} needs --model-control explicit: "
            f"with {settings.model_control} every model of the repository is loaded"
        )
    if settings.rate_limit_resource and settings.rate_limit == "off":
        raise CannotStart(
            f"--rate-limit-resource {settings.rate_limit_resource[0]} needs --rate-limit execution_count: "
            "without it nothing is limited"
        )


def bind_all(host: str, ports: Iterable[tuple[int, str]]) -> list[socket.socket]:
    """A listening socket for each port, given with the flag that chooses it: all of them or none.

    Raises:
        CannotStart: one is taken, or the address is not this machine's.
    """
    with contextlib.ExitStack() as bound:
        sockets = [bound.enter_context(_bind(host, port, flag)) for port, flag in ports]
        bound.pop_all()
    return sockets


def raise_descriptor_limit() -> None:
    """A connection is a descriptor, and so is much of what a worker needs: take as many as are allowed."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _bind(host: str, port: int, flag: str) -> socket.socket:
    try:
        return bind(host, port)
    except OSError as error:
        raise _taken(host, port, flag, error) from error


def _taken(host: str, port: int, flag: str, error: OSError) -> CannotStart:
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        return CannotStart(f"cannot listen on '{host}' ({error}): expected an address of this machine, with --host")
    return CannotStart(f"cannot listen on {host}:{port} ({error}); choose another port with {flag}, 0 for a free one")

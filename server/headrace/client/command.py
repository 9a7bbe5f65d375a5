"""What ``headrace infer`` does: one request from the command line, and its answer shown or saved."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from headrace.client.client import Client
from headrace.client.command_output import describe, save, to_json
from headrace.client.command_values import (
    BadArgument,
    check_complete,
    fit_batch,
    parse_pairs,
    parse_parameter,
    read_input,
)
from headrace.client.errors import ClientError, ConnectionFailed, ForbiddenError, UnsupportedError
from headrace.client.result import InferResult

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class InferArguments:
    """The command line, not yet looked into."""

    model: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parameters: tuple[str, ...]
    version: str
    url: str
    timeout_s: float
    as_json: bool


def run(arguments: InferArguments, say: Say, say_aside: Say) -> int:
    """Send the request. What it says of the answer goes to ``say``, all else to ``say_aside``; the exit status."""
    try:
        files = _output_files(arguments.outputs)
        with Client(arguments.url, timeout_s=arguments.timeout_s) as client:
            result = _infer(client, arguments, list(files), say_aside)
        if arguments.as_json:
            say(to_json(result))
        else:
            say(describe(result))
        _save(files, result, say_aside)
    except ConnectionFailed as error:
        say_aside(f"headrace: {error}")
        say_aside(
            f"Is a server running at {arguments.url}? `headrace serve REPOSITORY` starts one; --url names another."
        )
    except (ClientError, BadArgument) as error:
        say_aside(f"headrace: {error}")
    else:
        return 0
    return 1


def _infer(client: Client, arguments: InferArguments, outputs: list[str], say_aside: Say) -> InferResult:
    given = parse_pairs(arguments.inputs, "input")
    parameters = {name: parse_parameter(text) for name, text in parse_pairs(arguments.parameters, "parameter").items()}
    metadata = client.metadata(arguments.model, arguments.version)
    check_complete(given, metadata)
    batches = _batches(client, arguments)
    inputs = {}
    for name, text in given.items():
        inputs[name], note = fit_batch(name, read_input(name, text, metadata), metadata, batches=batches)
        if note:
            say_aside(f"headrace: {note}")
    return client.infer(arguments.model, inputs, outputs=outputs, version=arguments.version, parameters=parameters)


def _batches(client: Client, arguments: InferArguments) -> bool:
    try:
        size = client.config(arguments.model, arguments.version).get("max_batch_size", 0)
    except (UnsupportedError, ForbiddenError):
        return False  # a server without that extension, or that does not tell everybody
    return isinstance(size, int) and size > 0


def _save(files: Mapping[str, Path | None], result: InferResult, say_aside: Say) -> None:
    for name, path in files.items():
        if path is None:
            continue
        if name not in result.outputs:
            raise BadArgument(f"--output {name}: the answer does not have it")
        save(name, result[name], path)
        say_aside(f"output '{name}' is in {path}")


def _output_files(given: tuple[str, ...]) -> dict[str, Path | None]:
    """The file of each output that is asked for; None where it is only to be shown."""
    files: dict[str, Path | None] = {}
    for text in given:
        name, equals, file = text.partition("=")
        if not name or name in files or (equals and len(file) < 2) or (equals and not file.startswith("@")):
            raise BadArgument(f"--output {text} is not of the form NAME or NAME=@FILE, once for each name")
        files[name] = Path(file[1:]) if equals else None
    return files

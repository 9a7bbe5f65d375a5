"""What ``headrace bench`` does with its command line."""

import asyncio
import importlib.util
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import typer

from headrace.bench.knee import most_steps
from headrace.bench.made_up import make_up, parse_shape
from headrace.bench.own_server import OwnServer
from headrace.bench.report import Protocol, describe, draw, to_document, write_json
from headrace.bench.sweep import Limits, Sweep
from headrace.bench.traffic import Traffic
from headrace.client.address import Address, parse_address
from headrace.client.answers import ModelMetadata
from headrace.client.async_client import AsyncClient
from headrace.client.command_values import (
    BadArgument,
    fit_batch,
    parse_pairs,
    parse_parameter,
    read_input,
)
from headrace.client.errors import (
    ClientError,
    ConnectionFailed,
    ForbiddenError,
    InferenceError,
    InvalidRequestError,
    UnsupportedError,
)
from headrace.client.request import build_request
from headrace.core.request import InferRequest

Say = Callable[[str], None]
ProtocolName = Literal["http", "grpc"]
_DEFAULTS: dict[ProtocolName, str] = {"http": "http://127.0.0.1:8000", "grpc": "grpc://127.0.0.1:8001"}


@dataclass(frozen=True, slots=True)
class BenchArguments:
    """The command line, not yet looked into."""

    model: str
    repository: Path | None
    url: str | None
    grpc_url: str | None
    protocols: tuple[ProtocolName, ...]
    inputs: tuple[str, ...]
    shapes: tuple[str, ...]
    rows: int
    parameters: tuple[str, ...]
    version: str
    clients: tuple[int, ...]
    most_clients: int
    limits: Limits
    json_file: Path | None
    plot_file: Path | None


async def run(arguments: BenchArguments, say: Say, say_aside: Say, *, show_progress: bool) -> int:
    """Measure; the report goes to ``say``, all else to ``say_aside``. Returns the exit status.

    SIGTERM cancels it, so that a server that was started is ended too.
    """
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        _check_files(arguments)
        async with AsyncExitStack() as stack:
            addresses = choose_addresses(arguments)
            if arguments.repository is not None:
                say_aside(f"starting a server for '{arguments.model}' of {arguments.repository}")
                server = await stack.enter_async_context(OwnServer(arguments.repository, arguments.model))
                addresses = {name: getattr(server, name) for name in addresses}
            bench = _Bench(arguments, say, say_aside, show_progress=show_progress)
            found = [await bench.measure(name, url) for name, url in addresses.items()]
        document = to_document(arguments.model, bench.described_inputs, found)
        if arguments.json_file is not None:
            write_json(document, arguments.json_file)
            say_aside(f"the numbers are in {arguments.json_file}")
        if arguments.plot_file is not None:
            draw(arguments.model, found, arguments.plot_file)
            say_aside(f"the plot is in {arguments.plot_file}")
    except ConnectionFailed as error:
        say_aside(f"headrace: {error}")
        say_aside(
            "Is a server running there? `headrace serve REPOSITORY` starts one; --repository has one started for this "
            "measurement, --url and --grpc-url name another, --protocol leaves one protocol out."
        )
    except (ClientError, BadArgument) as error:
        say_aside(f"headrace: {error}")
    except OSError as error:
        say_aside(f"headrace: cannot write {error.filename}: {error.strerror}")
    else:
        return 0 if all(protocol.answered for protocol in found) else 1
    return 1


def choose_addresses(arguments: BenchArguments) -> dict[ProtocolName, str]:
    """What to measure and where. Whoever names one address means that server, so the other's default is not asked.

    Raises:
        BadArgument: an address is given beside a server that is to be started.
    """
    given: dict[ProtocolName, str | None] = {"http": arguments.url, "grpc": arguments.grpc_url}
    named = [name for name, url in given.items() if url is not None]
    if named and arguments.repository is not None:
        raise BadArgument("--repository starts a server of its own, so --url and --grpc-url cannot be given with it")
    chosen = arguments.protocols or tuple(named) or tuple(_DEFAULTS)
    return {name: given[name] or _DEFAULTS[name] for name in chosen}


class _Bench:
    """One command's measurements, a protocol after the other with the same inputs."""

    def __init__(self, arguments: BenchArguments, say: Say, say_aside: Say, *, show_progress: bool) -> None:
        self._arguments = arguments
        self._say = say
        self._say_aside = say_aside
        self._show_progress = show_progress
        self.described_inputs: list[str] = []

    async def measure(self, name: ProtocolName, url: str) -> Protocol:
        """Prove with one answer that the model takes the inputs, then raise the load."""
        arguments = self._arguments
        address = parse_address(url)
        if address.protocol != name:
            option = "--url" if name == "http" else "--grpc-url"
            raise BadArgument(
                f"{option} is '{url}', which is an address for {address.protocol}, expected one for {name}"
            )
        async with AsyncClient(url, timeout_s=arguments.limits.answer_s) as client:
            request = await self._request(client)
            inputs = {tensor.name: tensor for tensor in request.inputs}
            described = [f"{key} {tensor.datatype}{list(tensor.shape)}" for key, tensor in inputs.items()]
            if described != self.described_inputs:
                self.described_inputs = described
                made_up = "" if arguments.inputs else " (made up from its metadata)"
                self._say(f"{arguments.model}: {', '.join(described) or 'no inputs'}{made_up}\n")
            traffic = _traffic(address, request)
            try:
                found = await self._sweep(name, url, traffic, client)
            finally:
                await traffic.close()
        self._say(describe(found) + "\n")
        return found

    async def _sweep(self, name: ProtocolName, url: str, traffic: Traffic, client: AsyncClient) -> Protocol:
        arguments = self._arguments
        steps = len(arguments.clients) or most_steps(arguments.most_clients)
        with typer.progressbar(length=steps, label=f"{name:4}", hidden=not self._show_progress) as progress:

            def told(clients: int) -> None:
                progress.label = f"{name:4} {clients:4} clients"
                progress.update(1)

            sweep = Sweep(traffic, client, arguments.model, arguments.version, arguments.limits, told)
            done, cut_short = await sweep.run(arguments.clients, arguments.most_clients)
            progress.update(steps)
        return Protocol(name, url, tuple(done), cut_short)

    async def _request(self, client: AsyncClient) -> InferRequest:
        arguments = self._arguments
        metadata = await client.metadata(arguments.model, arguments.version)
        inputs = await self._inputs(client, metadata)
        parameters = {
            key: parse_parameter(text) for key, text in parse_pairs(arguments.parameters, "parameter").items()
        }
        version = arguments.version
        try:
            await client.infer(arguments.model, inputs, version=version, parameters=parameters)
        except InferenceError as error:
            if arguments.inputs or type(error) not in {InferenceError, InvalidRequestError}:
                raise
            raise BadArgument(
                f"{error}; that input was made up from the model's metadata, --input NAME=VALUE gives a real one"
            ) from error
        return build_request(arguments.model, inputs, metadata, version=version, parameters=parameters)

    async def _inputs(self, client: AsyncClient, metadata: ModelMetadata) -> dict[str, object]:
        arguments = self._arguments
        given = parse_pairs(arguments.inputs, "input")
        shapes = {key: parse_shape(key, text) for key, text in parse_pairs(arguments.shapes, "shape").items()}
        if not given:
            return dict(make_up(metadata, shapes, arguments.rows))
        if shapes:
            raise BadArgument("--shape is for inputs that are made up; with --input all are given")
        batches = await self._batches(client)
        inputs: dict[str, object] = {}
        for key, text in given.items():
            value, note = fit_batch(key, read_input(key, text, metadata), metadata, batches=batches)
            if note:
                self._say_aside(f"headrace: {note}")
            inputs[key] = np.repeat(value, arguments.rows, axis=0) if arguments.rows > 1 else value
        return inputs

    async def _batches(self, client: AsyncClient) -> bool:
        try:
            size = (await client.config(self._arguments.model, self._arguments.version)).get("max_batch_size", 0)
        except (UnsupportedError, ForbiddenError):
            return False
        return isinstance(size, int) and size > 0


def _traffic(address: Address, request: InferRequest) -> Traffic:
    """Only the protocol's own library is imported."""
    if address.protocol == "grpc":
        from headrace.bench.grpc_traffic import GrpcTraffic
        from headrace.client import grpc_form

        return GrpcTraffic(address, grpc_form.encode_infer(request).SerializeToString())
    from headrace.bench.http_traffic import HttpTraffic
    from headrace.client import http_form

    return HttpTraffic(address, http_form.encode_infer(request, 0))


def _check_files(arguments: BenchArguments) -> None:
    """Say at once what would otherwise be said after minutes of measuring."""
    if arguments.plot_file is not None and importlib.util.find_spec("matplotlib") is None:
        raise BadArgument("--plot needs matplotlib, which is not installed: pip install 'headrace[bench]'")
    for option, path in (("--json", arguments.json_file), ("--plot", arguments.plot_file)):
        if path is not None and not path.absolute().parent.is_dir():
            raise BadArgument(f"{option} {path}: there is no folder {path.absolute().parent}")
    if arguments.repository is not None and not (arguments.repository / arguments.model).is_dir():
        raise BadArgument(f"there is no model '{arguments.model}' in {arguments.repository}")

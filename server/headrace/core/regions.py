"""Shared memory of clients as the wire formats use it: where a tensor lies, how it is read and written."""

from collections.abc import Iterable
from typing import Protocol

from headrace.core.errors import HeadraceError, InvalidRequest, TooLarge, Unsupported, at
from headrace.core.request import InferResponse, Parameters, Place, RequestedOutput
from headrace.core.tensor import Buffer, Tensor

REGION = "shared_memory_region"
BYTE_SIZE = "shared_memory_byte_size"
OFFSET = "shared_memory_offset"

# A message of a few bytes can name this much, and it is copied before anything else has looked at the request.
MAX_READ_BYTES = 1 << 30  # of one request's inputs together


class Regions(Protocol):
    """The regions that clients registered. Offsets count from a region's start, sizes are in bytes.

    Every method raises NotFound for a region that is not there (any more), and InvalidRequest for bytes that do not
    lie within it.
    """

    def check(self, region: str, offset: int, byte_size: int) -> None:
        """See that the bytes are there, so that a request need not run to find that its answer has no place."""

    def read(self, region: str, offset: int, byte_size: int) -> bytes | None:
        """A copy of the bytes, which their owner may change at any time; None where they are there, to be fetched."""

    def write(self, region: str, offset: int, byte_size: int, data: Buffer) -> None:
        """Put ``data`` at the start of the bytes; InvalidRequest when it is longer than ``byte_size``."""


def place_of(parameters: Parameters, where: str) -> Place:
    """The place that a tensor's parameters name; one of them is ``shared_memory_region``.

    Raises:
        InvalidRequest: one of the three has a wrong type or value; ``where`` says whose they are.
    """
    region = parameters[REGION]
    if type(region) is not str:
        raise InvalidRequest(f"{where} has {REGION} {region!r}, expected the name of a region")
    if BYTE_SIZE not in parameters:
        raise InvalidRequest(f"{where} has {REGION} '{region}' without {BYTE_SIZE}")
    return Place(region, _bytes(parameters, OFFSET, where), _bytes(parameters, BYTE_SIZE, where))


def output_places(outputs: Iterable[RequestedOutput], model: str) -> dict[str, Place]:
    """The place of each output that is wanted in shared memory, by name.

    Raises:
        InvalidRequest: as ``place_of``.
    """
    return {
        output.name: place_of(output.parameters, output_of(model, output.name))
        for output in outputs
        if REGION in output.parameters
    }


def offered(regions: Regions | None, where: str) -> Regions:
    """The server's regions.

    Raises:
        Unsupported: it has none; ``where`` says which tensor asks for one.
    """
    if regions is None:
        raise Unsupported(
            f"{where} is in shared memory, which is not enabled on this server; start it with --allow-client-shm"
        )
    return regions


def check_read_bytes(read_bytes: int, model: str) -> None:
    """Bound what one request has read from shared memory.

    Raises:
        TooLarge: ``read_bytes``, of all its inputs, is over the bound.
    """
    if read_bytes > MAX_READ_BYTES:
        raise TooLarge(
            f"model '{model}': the request has {read_bytes} bytes of inputs in shared memory, "
            f"expected at most {MAX_READ_BYTES}"
        )


def check_output(regions: Regions | None, output: RequestedOutput, model: str) -> None:
    """See that there is a place for an output that is wanted in shared memory.

    Raises:
        HeadraceError: there is not; naming model, output and region.
    """
    where = output_of(model, output.name)
    found = offered(regions, where)
    place = place_of(output.parameters, where)
    try:
        found.check(place.region, place.offset, place.byte_size)
    except HeadraceError as error:
        raise at(where, error) from None


def read_input(regions: Regions | None, place: Place, model: str, name: str) -> bytes | None:
    """The data of an input; None where it is there, and has to be fetched.

    Raises:
        HeadraceError: it cannot be read; naming model, input and region.
    """
    where = input_of(model, name)
    found = offered(regions, where)
    try:
        return found.read(place.region, place.offset, place.byte_size)
    except HeadraceError as error:
        raise at(where, error) from None


def write_output(regions: Regions | None, place: Place, response: InferResponse, tensor: Tensor) -> Parameters:
    """Put an output where it is wanted, unless it is there; the parameters that its response has in place of the data.

    Raises:
        HeadraceError: it cannot be written; naming model, output and region.
    """
    if tensor.name not in response.delivered:
        where = output_of(response.model, tensor.name)
        found = offered(regions, where)
        try:
            found.write(place.region, place.offset, place.byte_size, tensor.data)
        except HeadraceError as error:
            raise at(where, error) from None
    return {REGION: place.region, OFFSET: place.offset, BYTE_SIZE: len(tensor.data)}


def input_of(model: str, name: str) -> str:
    """Where an error about an input is, for its message."""
    return f"model '{model}': input '{name}'"


def output_of(model: str, name: str) -> str:
    """Where an error about an output is, for its message."""
    return f"model '{model}': output '{name}'"


def _bytes(parameters: Parameters, name: str, where: str) -> int:
    value = parameters.get(name, 0)
    if type(value) is not int or not 0 <= value < 1 << 63:  # an exact type, because True is an int too
        raise InvalidRequest(f"{where} has {name} {value!r}, expected a number of bytes")
    return value

"""An answer to an inference request: arrays by output name."""

from dataclasses import dataclass
from typing import Any

from headrace.client.errors import ProtocolError
from headrace.core.errors import InvalidRequest
from headrace.core.tensor import DATATYPE_BY_NAME, Array, DataType, from_wire


@dataclass(frozen=True, slots=True, eq=False)
class InferResult:
    """One answer, or one part of a streamed one.

    The arrays of ``outputs`` are the caller's own and may be written to; BYTES come as object arrays of bytes.
    """

    model_name: str
    model_version: str
    id: str
    parameters: dict[str, Any]
    outputs: dict[str, Array]

    def __getitem__(self, output: str) -> Array:
        try:
            return self.outputs[output]
        except KeyError:
            raise KeyError(f"there is no output '{output}', only {', '.join(self.outputs) or 'none at all'}") from None

    def __repr__(self) -> str:
        outputs = ", ".join(f"{name}: {array.dtype}{list(array.shape)}" for name, array in self.outputs.items())
        which = f"{self.model_name} version {self.model_version}" if self.model_version else self.model_name
        return f"<InferResult of {which}: {outputs or 'no outputs'}>"


def datatype_named(name: str, output: str) -> DataType:
    """The datatype that an output says it has.

    Raises:
        ProtocolError: the protocol has none of that name.
    """
    datatype = DATATYPE_BY_NAME.get(name)
    if datatype is None:
        raise ProtocolError(f"output '{output}' has datatype '{name}', expected one of {', '.join(DATATYPE_BY_NAME)}")
    return datatype


def array_of(data: bytearray, datatype: DataType, shape: tuple[int, ...], output: str) -> Array:
    """The array in ``data``, whose memory it keeps.

    Raises:
        ProtocolError: the data do not fit the shape and datatype.
    """
    try:
        return from_wire(data, datatype, shape)
    except (InvalidRequest, ValueError) as error:
        raise ProtocolError(f"output '{output}' is said to be {datatype}{list(shape)}, but {error}") from None

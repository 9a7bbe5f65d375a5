"""Whether an answer is the right one: its outputs beside those that were computed beforehand."""

from collections.abc import Mapping

import numpy as np

from headrace.core.tensor import Array

Outputs = Mapping[str, Array]


class BadResponse(Exception):
    """An answer that a client could not use; the message says why."""


# Batches of another size and sessions of another thread count add up in another order. The outputs of the load models
# are of the size of 1.
_RELATIVE, _ABSOLUTE = 1e-3, 1e-3


def check_outputs(outputs: Outputs, expected: Outputs) -> None:
    """Every expected output must be there, with as many elements and about the same values.

    Shapes may differ: servers with protocols of their own drop or keep the batch dimension as they like.

    Raises:
        BadResponse: one is not.
    """
    for name, right in expected.items():
        if name not in outputs:
            raise BadResponse(f"the answer has the outputs {sorted(outputs)}, expected '{name}' among them")
        given = np.asarray(outputs[name]).reshape(-1)
        if given.size != right.size:
            raise BadResponse(f"output '{name}' has {given.size} elements, expected {right.size}")
        if not np.allclose(given, right.reshape(-1), rtol=_RELATIVE, atol=_ABSOLUTE):
            distance = np.abs(given - right.reshape(-1)).max()
            raise BadResponse(
                f"output '{name}' is off by up to {distance:.3g} from what the model gives without a server"
            )

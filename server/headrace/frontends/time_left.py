"""How long a client waits for its answer, as the header ``grpc-timeout`` says it: in gRPC, and over HTTP as well."""

import re

from headrace.batching.queue_policy import MAX_TIMEOUT_US
from headrace.core.errors import InvalidRequest

TIMEOUT_HEADER = b"grpc-timeout"
_FORM = re.compile(r"[ \t]*([0-9]{1,8})([HMSmun])[ \t]*")
_UNIT_NS = {"H": 3_600_000_000_000, "M": 60_000_000_000, "S": 1_000_000_000, "m": 1_000_000, "u": 1000, "n": 1}


def time_left_ns(text: str) -> int:
    """The nanoseconds that the header's value stands for, 1 at the least; 0 for so many that it is as good as none.

    Raises:
        InvalidRequest: it is no such value.
    """
    found = _FORM.fullmatch(text)
    if found is None:
        raise InvalidRequest(
            f"header grpc-timeout is {text[:40]!r}, expected up to 8 digits and H, M, S, m (milliseconds), u or n"
        )
    left_ns = int(found[1]) * _UNIT_NS[found[2]]
    return max(1, left_ns) if left_ns <= MAX_TIMEOUT_US * 1000 else 0

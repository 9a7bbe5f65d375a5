"""The requests of all connections that are not whole yet: how many bytes of them there are, and may be."""

from headrace.core.errors import Overloaded


class Arrivals:
    """One for a server, for HTTP and gRPC together. Whoever holds a part of a request counts it here."""

    __slots__ = ("bytes", "max_bytes")

    def __init__(self, max_bytes: int) -> None:
        self.bytes = 0
        self.max_bytes = max_bytes

    def change(self, before: int, now: int) -> Overloaded | None:
        """One request's part was so large and is so large now; what to refuse the request with, if that is too much.

        One alone may be as large as any request. The refused one is counted until its part is changed to nothing.
        """
        self.bytes += now - before
        if now <= before or self.bytes <= max(self.max_bytes, now):
            return None
        return Overloaded(
            f"the server holds {self.bytes} bytes of requests that are not whole yet and takes at most "
            f"{self.max_bytes} (--max-inflight-bytes)",
            "inflight_bytes",
        )

"""Request heads that were seen before: a client sends the same lines with each of its inference requests."""

import msgspec

from headrace.frontends.infer import InferHeaders

END = b"\r\n\r\n"
_REMEMBERED = 1024
_LONGEST_BYTES = 2048


class KnownHead(msgspec.Struct, frozen=True, gc=False):
    """What a head said, of a request that keeps its connection open and has its body right behind its head."""

    model: str
    version: str
    headers: InferHeaders


class KnownHeads:
    """The heads of one server, by their bytes up to and with the empty line.

    Parsing a head anew, with a callback for each of its lines, takes as long as half of all else that the front does
    with a small request. Equal bytes mean equal heads, so those that the parser has gone through are looked up.
    """

    def __init__(self) -> None:
        self._heads: dict[bytes, KnownHead] = {}

    def find(self, data: bytes) -> tuple[KnownHead, int] | None:
        """The head that ``data`` begins with and where its body begins, if the rest of ``data`` is that body."""
        start = data.find(END) + len(END)
        if start > _LONGEST_BYTES:
            return None
        head = self._heads.get(data[:start])
        if head is None or head.headers.content_length != len(data) - start:
            return None
        return head, start

    def remember(self, data: bytes, head: KnownHead) -> None:
        """Keep the head that the parser made of ``data``, which is one whole request."""
        start = data.find(END) + len(END)
        if head.headers.content_length != len(data) - start or start > _LONGEST_BYTES:
            return
        if len(self._heads) >= _REMEMBERED:
            self._heads.clear()
        self._heads[data[:start]] = head

"""Server-sent events out of the pieces in which they arrive."""

from headrace.client.errors import ProtocolError


class EventReader:
    """Collects the data of events. It never holds more than ``max_event_bytes``.

    Lines end with LF or CR LF, as every server writes them, though the format knows a lone CR as well.
    """

    def __init__(self, max_event_bytes: int) -> None:
        self._max_event_bytes = max_event_bytes
        self._pending = bytearray()  # a line whose end has not come
        self._data: list[bytes] = []  # the lines of an event whose end has not come
        self._data_bytes = 0

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of the events that ``piece`` completes.

        Raises:
            ProtocolError: an event is too large.
        """
        searched = len(self._pending)
        self._pending += piece
        events: list[bytes] = []
        start = 0
        while (end := self._pending.find(b"\n", max(start, searched))) >= 0:
            self._take(bytes(self._pending[start:end]).removesuffix(b"\r"), events)
            start = end + 1
        del self._pending[:start]
        if self._data_bytes + len(self._pending) > self._max_event_bytes:
            raise ProtocolError(f"an event of the stream is over {self._max_event_bytes} bytes, the client's bound")
        return events

    def finish(self) -> None:
        """The stream has ended.

        Raises:
            ProtocolError: it did so within an event.
        """
        if self._data or self._pending.strip():
            raise ProtocolError("the stream ended in the midst of an event")

    def _take(self, line: bytes, events: list[bytes]) -> None:
        if not line:
            if self._data:
                events.append(b"\n".join(self._data))
            self._data = []
            self._data_bytes = 0
            return
        name, _, value = line.partition(b":")  # a comment has an empty name
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
            self._data_bytes += len(line)

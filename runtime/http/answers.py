"""An answer written to the socket as one piece.

aiohttp's own response costs more than all the rest of a small request, most of it for headers that never differ.
Left out: which answer is due (the faces).
"""

from collections.abc import Mapping
from email.utils import formatdate
from http import HTTPStatus
from typing import ClassVar, Final

from aiohttp import HttpVersion11, web
from aiohttp.abc import AbstractStreamWriter

_LINES: Final = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus if status >= 200
}
_NO_CONTENT: Final = HTTPStatus.NO_CONTENT.value


class _Stamp:
    """The Date header of this second."""

    line = b""

    def renew(self) -> None:
        self.line = f"Date: {formatdate(usegmt=True)}\r\n".encode()


DATE: Final = _Stamp()
DATE.renew()


class Answer(web.StreamResponse):
    """A whole response: status, JSON body, and headers as ready lines of bytes."""

    media_type: ClassVar[bytes] = b"application/json"

    def __init__(self, status: int, body: bytes, request_id: str, headers: bytes = b"") -> None:
        # Deliberately not the parent's: none of what it sets up is used, and it is most of a response's cost.
        self._status = status
        self._content = body
        self._request_id = request_id
        self._extra = headers
        self._keep_alive: bool | None = None
        self._payload_writer: AbstractStreamWriter | None = None

    @property
    def status(self) -> int:
        return self._status

    @property
    def content(self) -> bytes:
        return self._content

    def add(self, headers: Mapping[str, str]) -> None:
        """Send these headers too; none of them stands in it yet."""
        self._extra += "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode()

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        transport = request.transport
        if transport is None:
            raise ConnectionResetError("the client went away before its answer")
        if self._keep_alive is None:
            self._keep_alive = request.keep_alive
        connection = b""
        if not self._keep_alive:
            connection = b"Connection: close\r\n"
        elif request.version < HttpVersion11:
            connection = b"Connection: keep-alive\r\n"
        transport.write(self._encode(connection, b"" if request.method == "HEAD" else self._content))
        if request.protocol.writing_paused:
            # A client that sends but does not read: its answers must not pile up here. Its connection has a timer.
            await request.protocol._drain_helper()
        return None

    def encode_last(self) -> bytes:
        """The answer to something that never became a request; its connection is closed after it."""
        return self._encode(b"Connection: close\r\n", self._content)

    def _encode(self, connection: bytes, body: bytes) -> bytes:
        if self._status == _NO_CONTENT:
            head = b"%sCache-Control: no-store\r\nX-Request-Id: %s\r\n%s%s%s\r\n"
            return head % (_LINES[_NO_CONTENT], self._request_id.encode(), DATE.line, self._extra, connection)
        return (
            b"%sContent-Type: %s\r\nContent-Length: %d\r\nCache-Control: no-store\r\n"
            b"X-Request-Id: %s\r\n%s%s%s\r\n%s"
            % (
                _LINES[self._status],
                self.media_type,
                len(self._content),
                self._request_id.encode(),
                DATE.line,
                self._extra,
                connection,
                body,
            )
        )

    async def write_eof(self, data: bytes = b"") -> None:
        """Everything was written at once."""

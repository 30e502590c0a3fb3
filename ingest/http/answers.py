"""What the ingest face answers: one shape of success, one of error, written to the socket as one piece.

aiohttp's own response costs more than all the rest of a small request, most of it for headers that never differ.
Left out: which answer is due (`ingest.http.service`).
"""

import asyncio
from email.utils import formatdate
from http import HTTPStatus
from random import random
from typing import Any, Final

import orjson
from aiohttp import HttpVersion11, web
from aiohttp.abc import AbstractStreamWriter

from schemas.errors import RequestCode

_LINES: Final = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus if status >= 200
}
_NO_CONTENT: Final = HTTPStatus.NO_CONTENT.value
_RETRY_AFTER_S: Final = (1, 5)
#: How long a client may leave its answers unread before its connection is cut.
_UNREAD_S: Final = 30.0


class _Stamp:
    """The Date header of this second."""

    line = b""

    def renew(self) -> None:
        self.line = f"Date: {formatdate(usegmt=True)}\r\n".encode()


DATE: Final = _Stamp()
DATE.renew()


class Answer(web.StreamResponse):
    """A whole response: status, JSON body, and headers as ready lines of bytes."""

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

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        transport = request.transport
        if transport is None:
            raise ConnectionResetError("the client went away before its answer")
        keep_alive = self._keep_alive if self._keep_alive is not None else request.keep_alive
        self._keep_alive = keep_alive
        extra = self._extra
        if not keep_alive:
            extra += b"Connection: close\r\n"
        elif request.version < HttpVersion11:
            extra += b"Connection: keep-alive\r\n"
        body = b"" if request.method == "HEAD" else self._content
        if self._status == _NO_CONTENT:
            head = b"%sCache-Control: no-store\r\nX-Request-Id: %s\r\n%s%s\r\n"
            transport.write(head % (_LINES[_NO_CONTENT], self._request_id.encode(), DATE.line, extra))
            return None
        transport.write(
            b"%sContent-Type: application/json\r\nContent-Length: %d\r\nCache-Control: no-store\r\n"
            b"X-Request-Id: %s\r\n%s%s\r\n%s"
            % (_LINES[self._status], len(self._content), self._request_id.encode(), DATE.line, extra, body)
        )
        if request.protocol.writing_paused:
            await _drained(request.protocol, transport)
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        """Everything was written at once."""

    def close_connection(self) -> "Answer":
        """For a request whose rest cannot be told from the next one, or is not worth reading."""
        self._keep_alive = False
        return self


async def _drained(protocol: web.RequestHandler, transport: asyncio.Transport) -> None:
    """Wait for a client that sends but does not read: its answers must not pile up here."""
    try:
        async with asyncio.timeout(_UNREAD_S):
            await protocol._drain_helper()
    except TimeoutError:
        transport.abort()


class Refusal(Exception):  # noqa: N818 - an answer on its way out, not a fault
    """A request that is refused as a whole."""

    def __init__(self, code: RequestCode, message: str, *, close: bool = False, headers: bytes = b"") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.close = close
        self.headers = headers

    def answer(self, request_id: str, **details: Any) -> Answer:
        headers = self.headers
        if self.code.status == HTTPStatus.SERVICE_UNAVAILABLE:
            headers += _retry_after()
        if self.code.status == HTTPStatus.UNAUTHORIZED:
            headers += b'WWW-Authenticate: Bearer realm="sluice"\r\n'
        content = {"error": {"code": str(self.code), "message": self.message, "request_id": request_id} | details}
        answer = Answer(self.code.status, orjson.dumps(content), request_id, headers)
        return answer.close_connection() if self.close else answer


def _retry_after() -> bytes:
    """Spread over some seconds, so that clients refused together do not come back together."""
    low, high = _RETRY_AFTER_S
    return b"Retry-After: %d\r\n" % round(low + (high - low) * random())  # noqa: S311 - jitter, not a secret

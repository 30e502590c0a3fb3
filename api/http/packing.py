"""Answers packed as the client takes them (`Accept-Encoding`): gzip or zstd, whole or piece by piece.

Credentials travel in a header that no other page can send, so that nobody else's words stand beside a secret in a
packed answer. Left out: events, each of which has to arrive at once, and what is packed already.
"""

import asyncio
import zlib
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from typing import Final, Protocol

import zstandard
from aiohttp import hdrs, web

from api.http.accepting import best_encoding

#: Of equals, zstd costs a third of the time.
ENCODINGS: Final = ("zstd", "gzip")
#: Below it, the head is most of the answer.
LEAST_BYTES: Final = 1_000
#: What takes longer than half a millisecond or so is done beside the loop.
_ASIDE_BYTES: Final = 16_384
_GZIP_LEVEL: Final = 5
_ZSTD_LEVEL: Final = 3
_GZIP_WINDOW: Final = 31
_PACKABLE: Final = frozenset(
    {
        "application/json",
        "application/yaml",
        "application/x-ndjson",
        "application/vnd.apache.arrow.stream",
        "image/svg+xml",
        "text/csv",
        "text/css",
        "text/html",
        "text/javascript",
        "text/plain",
    }
)
#: Behind the tag of a version, that of its packed form: two answers of different bytes have different tags.
_TAG_MARK: Final = ";"


class _Packer(Protocol):
    def compress(self, data: bytes, /) -> bytes: ...

    def flush(self) -> bytes: ...


def _packer(encoding: str) -> _Packer:
    if encoding == "zstd":
        return zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compressobj()
    return zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, _GZIP_WINDOW)


def version_of(tag: str) -> str:
    """What an entity tag says of the version, however the answer was packed."""
    return tag.strip().removeprefix("W/").strip('"').partition(_TAG_MARK)[0]


def add_vary(response: web.StreamResponse, name: str) -> None:
    """Say that the answer follows another header of the request, too."""
    known = response.headers.get(hdrs.VARY, "")
    if name.lower() not in {one.strip().lower() for one in known.split(",")}:
        response.headers[hdrs.VARY] = f"{known}, {name}" if known else name


class Streamed(web.StreamResponse):
    """An answer whose pieces are taken as fast as the client reads them.

    One that fails in its middle has no end: `failed` is told why, and the connection is cut, so that no client takes
    it for whole.
    """

    def __init__(
        self,
        request: web.BaseRequest,
        chunks: AsyncIterator[bytes],
        status: int,
        headers: Mapping[str, str],
        failed: Callable[[Exception], None],
    ) -> None:
        super().__init__(status=status, headers=headers)
        self._request = request
        self._failed = failed
        self.chunks = chunks

    async def write_eof(self, data: bytes = b"") -> None:
        try:
            async with aclosing(self.chunks) as chunks:  # type: ignore[type-var]
                if self._request.method != hdrs.METH_HEAD:
                    async for chunk in chunks:
                        await self.write(chunk)
        except Exception as error:
            transport = self._request.transport
            if transport is not None and not transport.is_closing():
                transport.abort()
                self._failed(error)
            # Of a connection that is lost nobody needs to be told again.
            raise ConnectionAbortedError("the answer broke off") from error
        await super().write_eof(data)


async def pack(request: web.BaseRequest, response: web.StreamResponse) -> None:
    """Pack the answer if the client takes it and that is worth while."""
    body = response.body if isinstance(response, web.Response) else None
    if not _is_packable(response, body):
        return
    add_vary(response, hdrs.ACCEPT_ENCODING)
    encoding = best_encoding(request.headers.get(hdrs.ACCEPT_ENCODING, ""), ENCODINGS)
    if encoding is None:
        return
    response.headers[hdrs.CONTENT_ENCODING] = encoding
    if tag := response.headers.get(hdrs.ETAG):
        response.headers[hdrs.ETAG] = f'{tag[:-1]}{_TAG_MARK}{encoding}"'
    if isinstance(response, Streamed):
        response.chunks = _packed(response.chunks, encoding)
    elif isinstance(response, web.Response) and isinstance(body, bytes):
        response.body = await _done(_packer(encoding), body, last=True)


def _is_packable(response: web.StreamResponse, body: object) -> bool:
    kind = response.content_type
    if hdrs.CONTENT_ENCODING in response.headers or not (kind in _PACKABLE or kind.endswith("+json")):
        return False
    return isinstance(response, Streamed) or (isinstance(body, bytes) and len(body) >= LEAST_BYTES)


async def _packed(chunks: AsyncIterator[bytes], encoding: str) -> AsyncIterator[bytes]:
    packer = _packer(encoding)
    async with aclosing(chunks) as pieces:  # type: ignore[type-var]
        async for chunk in pieces:
            if packed := await _done(packer, chunk):
                yield packed
    yield packer.flush()


async def _done(packer: _Packer, raw: bytes, *, last: bool = False) -> bytes:
    def work() -> bytes:
        return packer.compress(raw) + (packer.flush() if last else b"")

    return work() if len(raw) < _ASIDE_BYTES else await asyncio.to_thread(work)

"""A request's body: read within a time and a size, unpacked within the same size. Left out: what it says."""

import asyncio
import zlib
from typing import Final

import zstandard
from aiohttp import web

from ingest.http.answers import Refusal
from schemas.errors import RequestCode

_GZIP: Final = 16 + zlib.MAX_WBITS
_ZSTD_WINDOW_MAX: Final = 8 * 1024 * 1024
#: curl and simple firmware name these for a JSON text they send.
_TYPES: Final = frozenset(
    {
        "",
        "application/json",
        "text/json",
        "text/plain",
        "application/octet-stream",
        "application/x-www-form-urlencoded",
    }
)


def declared_size(request: web.BaseRequest, bytes_max: int) -> int:
    """The Content-Length, 0 where there is none. Raises a refusal when it is too large already."""
    raw = request.headers.get("Content-Length")
    size = int(raw) if raw is not None and raw.isdecimal() and len(raw) < 20 else 0
    if size > bytes_max:
        raise too_large(bytes_max)
    return size


async def read_body(request: web.BaseRequest, *, bytes_max: int, timeout_s: float) -> bytes:
    """The unpacked body. Raises a refusal for one that is too large, too slow, cut off, or packed in another way."""
    _check_type(request.headers.get("Content-Type", ""))
    encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
    content = request.content
    try:
        if content.is_eof():
            # The usual case: the body came with the head, and no timer is needed.
            body = content.read_nowait()
        else:
            async with asyncio.timeout(timeout_s):
                body = await _read_slowly(request, bytes_max)
    except TimeoutError:
        message = f"the body did not come within {timeout_s:g} s"
        raise Refusal(RequestCode.REQUEST_TIMEOUT, message, close=True) from None
    except web.RequestPayloadError:
        raise Refusal(RequestCode.BAD_REQUEST, "the body is malformed or was cut off", close=True) from None
    if len(body) > bytes_max:
        raise too_large(bytes_max)
    return body if encoding in ("identity", "") else _unpack(body, encoding, bytes_max)


async def _read_slowly(request: web.BaseRequest, bytes_max: int) -> bytes:
    if request.headers.get("Expect", "").lower() == "100-continue" and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    body = bytearray()
    while chunk := await request.content.readany():
        body += chunk
        if len(body) > bytes_max:
            raise too_large(bytes_max)
    return bytes(body)


def too_large(bytes_max: int) -> Refusal:
    message = f"a body has up to {bytes_max} bytes, packed and unpacked: split it"
    return Refusal(RequestCode.BODY_TOO_LARGE, message, close=True)


def _check_type(raw: str) -> None:
    kind = raw.partition(";")[0].strip().lower()
    if kind not in _TYPES and not kind.endswith("+json"):
        raise Refusal(RequestCode.UNSUPPORTED_TYPE, "the body is JSON: send Content-Type: application/json")


def _unpack(body: bytes, encoding: str, bytes_max: int) -> bytes:
    try:
        if encoding in ("gzip", "x-gzip"):
            plain = _unpack_gzip(body, bytes_max)
        elif encoding == "zstd":
            plain = _unpack_zstd(body, bytes_max)
        else:
            message = "a body is plain, or its Content-Encoding is gzip or zstd"
            raise Refusal(RequestCode.UNSUPPORTED_ENCODING, message, headers=b"Accept-Encoding: gzip, zstd\r\n")
    except (zlib.error, zstandard.ZstdError, EOFError):
        message = f"the body does not unpack as {encoding}"
        raise Refusal(RequestCode.BAD_ENCODING, message) from None
    if len(plain) > bytes_max:
        raise too_large(bytes_max)
    return plain


def _unpack_gzip(body: bytes, bytes_max: int) -> bytes:
    """All members of a gzip file, up to one byte more than allowed."""
    plain = b""
    while body and len(plain) <= bytes_max:
        member = zlib.decompressobj(_GZIP)
        plain += member.decompress(body, bytes_max + 1 - len(plain))
        if not member.eof and not member.unconsumed_tail:
            raise EOFError
        body = member.unused_data
    return plain


def _unpack_zstd(body: bytes, bytes_max: int) -> bytes:
    """Up to one byte more than allowed, whatever size the frame claims."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_MAX)
    with decompressor.stream_reader(body, read_across_frames=True) as reader:
        plain = reader.read(bytes_max + 1)
    if not plain and body:
        raise EOFError
    return plain

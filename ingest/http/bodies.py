"""A request's body: read within a time and a size, unpacked within the same size. Left out: what it says."""

import asyncio
import zlib
from typing import Final

import zstandard
from aiohttp import HttpVersion11, StreamReader, hdrs, web

from ingest.http.answers import Refusal
from schemas.errors import RequestCode

_GZIP: Final = 16 + zlib.MAX_WBITS
#: Nobody's file has more, and each costs a copy of what follows it.
_GZIP_MEMBERS_MAX: Final = 16
_ZSTD_WINDOW_MAX: Final = 8 * 1024 * 1024
_ZSTD_FIRST_BYTES: Final = 64 * 1024
_ZSTD_HEAD_MAX: Final = 18
#: Of the magic number of a frame without content, what follows its first byte.
_ZSTD_SKIPPABLE: Final = b"\x2a\x4d\x18"
#: A block of one byte, so many times.
_ZSTD_REPEATED: Final = 1
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


class Room:
    """How many bytes of bodies a process holds: of all requests together, bounded."""

    __slots__ = ("bytes_max", "taken")

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.taken = 0
        """Whoever takes gives back, by subtracting it here."""

    def take(self, size: int) -> None:
        """Raises a refusal when so much more is too much."""
        if self.taken + size > self.bytes_max:
            raise _no_room()
        self.taken += size


def check_size(request: web.BaseRequest, bytes_max: int, room: Room) -> None:
    """Raises a refusal when the Content-Length tells already that the body is too large, or too much right now."""
    raw = request.headers.get(hdrs.CONTENT_LENGTH)
    size = int(raw) if raw is not None and raw.isdecimal() and len(raw) < 20 else 0
    if size > bytes_max:
        raise too_large(bytes_max)
    if room.taken + size > room.bytes_max:
        raise _no_room()


async def read_body(request: web.BaseRequest, *, bytes_max: int, timeout_s: float, room: Room) -> bytes:
    """The unpacked body. Raises a refusal for one that is too large, too slow, cut off, or packed in another way.

    While it comes it takes up `room`, as it comes; what is returned has not taken any.
    """
    headers = request.headers
    if (kind := headers.get(hdrs.CONTENT_TYPE, "")) not in _TYPES:
        _check_type(kind)
    if (coding := headers.get(hdrs.TRANSFER_ENCODING)) is not None and coding.strip().lower() != "chunked":
        message = "a body comes as it is or chunked: what is packed says so in its Content-Encoding"
        raise Refusal(RequestCode.UNSUPPORTED_ENCODING, message, close=True)
    encoding = headers.get(hdrs.CONTENT_ENCODING, "")
    content = request.content
    try:
        if content.is_eof():
            # The usual case: the body came with the head, and no timer is needed.
            body = _whole(content)
        else:
            async with asyncio.timeout(timeout_s):
                body = await _read_slowly(request, bytes_max, room)
    except TimeoutError:
        message = f"the body did not come within {timeout_s:g} s"
        raise Refusal(RequestCode.REQUEST_TIMEOUT, message, close=True) from None
    except (web.RequestPayloadError, ConnectionError):
        raise _broken_off() from None
    if getattr(request.protocol, "malformed", None) is content:
        raise _broken_off()
    if len(body) > bytes_max:
        raise too_large(bytes_max)
    return _unpack(body, encoding.strip().lower(), bytes_max) if encoding else body


def _whole(content: StreamReader) -> bytes:
    """All of a body that has come.

    `read_nowait` has parser and transport go on even where they were not held up, which takes as long as the rest.
    """
    is_plain = type(content) is StreamReader and content.exception() is None
    if is_plain and len(content._buffer) == 1 and not content._protocol._reading_paused:
        return content._buffer.popleft()
    return content.read_nowait()


async def _read_slowly(request: web.BaseRequest, bytes_max: int, room: Room) -> bytes:
    expected = request.version >= HttpVersion11 and request.headers.get(hdrs.EXPECT, "").lower() == "100-continue"
    if expected and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    body = bytearray()
    try:
        while chunk := await request.content.readany():
            if len(body) + len(chunk) > bytes_max:
                raise too_large(bytes_max)
            room.take(len(chunk))
            body += chunk
        return bytes(body)
    finally:
        room.taken -= len(body)


def _no_room() -> Refusal:
    return Refusal(RequestCode.OVERLOADED, "too much is being worked on: try again later", close=True)


def _broken_off() -> Refusal:
    return Refusal(RequestCode.BAD_REQUEST, "the body is malformed or was cut off", close=True)


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
        elif encoding in ("identity", ""):
            plain = body
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
    for _ in range(_GZIP_MEMBERS_MAX):
        if not body or len(plain) > bytes_max:
            return plain
        member = zlib.decompressobj(_GZIP)
        plain += member.decompress(body, bytes_max + 1 - len(plain))
        if not member.eof and not member.unconsumed_tail:
            raise EOFError
        body = member.unused_data
    if body:
        raise EOFError
    return plain


def _unpack_zstd(body: bytes, bytes_max: int) -> bytes:
    """Up to one byte more than allowed, whatever size the frame claims."""
    _check_frames(body)
    with _zstd.stream_reader(body, read_across_frames=True) as reader:
        # Room for all that is allowed would be asked of the system each time, and given back.
        first = min(_ZSTD_FIRST_BYTES, bytes_max + 1)
        plain = reader.read(first)
        if len(plain) == first:
            plain += reader.read(bytes_max + 1 - first)
    return plain


def _check_frames(body: bytes) -> None:
    """Raises `EOFError` unless the last frame is whole: a reader takes the end of its input for a frame's end.

    Headers alone are looked at, as RFC 8878, 3.1 has them; what is in the blocks, the reader judges.
    """
    at = 0
    while at < len(body):
        if body[at + 1 : at + 4] == _ZSTD_SKIPPABLE:
            at += 8 + int.from_bytes(body[at + 4 : at + 8], "little")
            continue
        head = body[at : at + _ZSTD_HEAD_MAX]
        parameters = zstandard.get_frame_parameters(head)
        at += zstandard.frame_header_size(head)
        is_last = False
        while not is_last and at < len(body):
            block = int.from_bytes(body[at : at + 3], "little")
            is_last, kind = bool(block & 1), block >> 1 & 3
            at += 3 + (1 if kind == _ZSTD_REPEATED else block >> 3)
        at += 4 if parameters.has_checksum else 0
        if not is_last:
            raise EOFError
    if at != len(body):
        raise EOFError


_zstd: Final = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_MAX)

"""What a client would rather have: the `Prefer` header (RFC 7240)."""

from typing import Final

from aiohttp import web
from multidict import istr

PREFER: Final = istr("Prefer")
WAIT_STORED: Final = ("wait", "stored")
RESPOND_ASYNC: Final = ("respond-async", "")


def prefers(request: web.BaseRequest, preference: tuple[str, str]) -> bool:
    """Whether a preference, a name in lower case and its value, stands in any of the request's headers."""
    return any(
        _read(text) == preference for header in request.headers.getall(PREFER, ()) for text in header.split(",")
    )


def _read(text: str) -> tuple[str, str]:
    name, _, value = text.partition(";")[0].partition("=")
    return name.strip().lower(), value.strip().strip('"')

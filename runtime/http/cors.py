"""Which pages of other origins may call the API and ingest from a browser (CORS, WHATWG Fetch).

Credentials travel in the Authorization header, never in a cookie: another origin gains nothing by it that it does not
have. Left out: everything that is no browser.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from aiohttp import hdrs

from runtime.settings import setting

ANY: Final = "*"
_TAKES: Final = (
    "Authorization, Content-Type, Content-Encoding, If-Match, If-None-Match, Idempotency-Key, Last-Event-ID, Prefer, "
    "X-Device-Id, X-Request-Id"
)
_SHOWS: Final = (
    "ETag, Location, X-Request-Id, Retry-After, Idempotency-Replayed, Preference-Applied, RateLimit, "
    "RateLimit-Policy, Sluice-Next-Cursor, Sluice-Source, Sluice-Tier, Sluice-Complete-Through, Sluice-Dirty, "
    "Sluice-Kept-From, Sluice-Removed-At"
)
_PREFLIGHT_S: Final = 600


@dataclass(frozen=True, kw_only=True)
class CorsSettings:
    """Who may call from a browser."""

    api_cors_origins: tuple[str, ...] = setting(
        (), why="Origins (https://app.example.org) whose pages may call the API and ingest from a browser; * for all."
    )


class Origins:
    """The origins of the settings; none allows nothing, `*` all."""

    def __init__(self, origins: tuple[str, ...]) -> None:
        self._origins = frozenset(origins)

    def __bool__(self) -> bool:
        return bool(self._origins)

    def headers(self, request: Mapping[str, str], allowed_methods: str | None = None) -> dict[str, str]:
        """What an answer says to a browser; with `allowed_methods`, what the answer to its preflight does."""
        if not self._origins:
            return {}
        origin = request.get(hdrs.ORIGIN)
        if origin is None or not (origin in self._origins or (ANY in self._origins and origin.isascii())):
            return {hdrs.VARY: hdrs.ORIGIN}
        headers: dict[str, str] = {
            hdrs.VARY: hdrs.ORIGIN,
            hdrs.ACCESS_CONTROL_ALLOW_ORIGIN: origin,
            hdrs.ACCESS_CONTROL_EXPOSE_HEADERS: _SHOWS,
        }
        if allowed_methods is not None and hdrs.ACCESS_CONTROL_REQUEST_METHOD in request:
            headers[hdrs.ACCESS_CONTROL_ALLOW_METHODS] = allowed_methods
            headers[hdrs.ACCESS_CONTROL_ALLOW_HEADERS] = _TAKES
            headers[hdrs.ACCESS_CONTROL_MAX_AGE] = str(_PREFLIGHT_S)
        return headers

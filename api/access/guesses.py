"""How often an address may try: counted per process, in a bounded table. Left out: what is tried."""

from typing import Final

from aiohttp import hdrs, web

from api.http.problems import RATE_LIMITED, Problem
from runtime.addresses import Proxies
from runtime.clock import Clock

_WINDOW_S: Final = 60.0


def limited(message: str, wait_s: float) -> Problem:
    return Problem(RATE_LIMITED, message, headers={"Retry-After": str(max(1, round(wait_s)))})


def address_of(proxies: Proxies, request: web.BaseRequest) -> bytes:
    """Whose request it is, through trusted proxies."""
    headers = request.headers
    return proxies.client(
        request.remote, headers.getall(hdrs.X_FORWARDED_FOR, ()), headers.getall(hdrs.FORWARDED, ())
    )


class Guesses:
    """Attempts of addresses within a minute."""

    def __init__(self, clock: Clock, *, per_minute: int, addresses_max: int) -> None:
        self._clock = clock
        self._most = per_minute
        self._addresses_max = addresses_max
        self._windows: dict[bytes, tuple[float, int]] = {}

    def check(self, address: bytes) -> None:
        """Raises the problem of an address that has tried too often."""
        began, count = self._windows.get(address, (0.0, 0))
        left_s = began + _WINDOW_S - self._clock.monotonic()
        if count >= self._most and left_s > 0:
            raise limited(f"more than {self._most} attempts within a minute from this address", left_s)

    def count(self, address: bytes) -> None:
        now = self._clock.monotonic()
        began, count = self._windows.pop(address, (now, 0))
        if now - began >= _WINDOW_S:
            began, count = now, 0
        if len(self._windows) >= self._addresses_max:
            del self._windows[next(iter(self._windows))]
        self._windows[address] = (began, count + 1)

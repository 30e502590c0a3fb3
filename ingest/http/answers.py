"""How the ingest face refuses: one shape of error. Left out: which is due (`ingest.http.service`)."""

from http import HTTPStatus
from random import random
from typing import Any, Final

import orjson

from ingest.limits import BYTES, READINGS, LimitExceededError
from runtime.http.answers import Answer
from schemas.errors import RequestCode

_RETRY_AFTER_S: Final = (1, 5)


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
        if self.close:
            answer.force_close()
        return answer


def limited(error: LimitExceededError, request_id: str) -> Answer:
    """The answer to what a limit does not allow: which one, how much of it is used, and when it begins anew."""
    kind, value, wait_s = error.kind, error.value, error.resets_in_s
    policy = f'"{error.scope}-{kind.name}"'
    left = max(0, value - error.used)
    # draft-ietf-httpapi-ratelimit-headers-10; it has no unit for readings, and an unnamed one would mean requests.
    headers = f"RateLimit-Policy: {policy};q={value};w={kind.window_s}{_QUOTA_UNITS.get(kind.name, '')}\r\n"
    headers += f"RateLimit: {policy};r={left};t={wait_s}\r\nRetry-After: {wait_s}\r\n"
    limit = {"name": kind.name, "scope": error.scope, "value": value, "used": error.used}
    limit |= {"window_s": kind.window_s, "resets_in_s": wait_s}
    return Refusal(RequestCode.RATE_LIMITED, str(error), headers=headers.encode()).answer(request_id, limit=limit)


_QUOTA_UNITS: Final = {READINGS.name: ';qu="readings"', BYTES.name: ';qu="content-bytes"'}


def _retry_after() -> bytes:
    """Spread over some seconds, so that clients refused together do not come back together."""
    low, high = _RETRY_AFTER_S
    return b"Retry-After: %d\r\n" % round(low + (high - low) * random())  # noqa: S311 - jitter, not a secret

"""What can go wrong with a request: stable codes with their statuses, and the error that carries one.

Left out: how a face words it (`api.http.faces`), and the ingest face's codes (`schemas.errors`).
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

RETRY_AFTER_S: Final = (1, 5)


class Kind(NamedTuple):
    """A code that clients program against: never renamed, only added to."""

    code: str
    status: int
    meaning: str


class Detail(NamedTuple):
    """One thing that is wrong, and the field or parameter that it is wrong with."""

    field: str
    message: str


BAD_REQUEST: Final = Kind("bad_request", 400, "The request is not well-formed HTTP, or its body was cut off.")
INVALID_BODY: Final = Kind("invalid_body", 400, "The body is no JSON in UTF-8.")
INVALID_PARAMETER: Final = Kind("invalid_parameter", 400, "A query parameter is unknown, or no value it can have.")
AUTH_REQUIRED: Final = Kind("auth_required", 401, "A credential is needed.")
TOKEN_INVALID: Final = Kind("token_invalid", 401, "The credential is unknown, revoked or expired.")
FORBIDDEN: Final = Kind("forbidden", 403, "The caller's role does not allow it.")
SCOPE_MISSING: Final = Kind("scope_missing", 403, "The API key lacks the scope.")
NOT_FOUND: Final = Kind("not_found", 404, "Nothing is at this path.")
METHOD_NOT_ALLOWED: Final = Kind("method_not_allowed", 405, "The path does not take this method.")
NOT_ACCEPTABLE: Final = Kind("not_acceptable", 406, "The answer has none of the forms that Accept names.")
REQUEST_TIMEOUT: Final = Kind("request_timeout", 408, "The request did not come in time.")
IDEMPOTENCY_CONFLICT: Final = Kind(
    "idempotency_conflict", 409, "Another request with this Idempotency-Key and another content came before."
)
STALE: Final = Kind("precondition_failed", 412, "It was changed since the version that If-Match names.")
BODY_TOO_LARGE: Final = Kind("body_too_large", 413, "The body is larger than may be.")
URI_TOO_LONG: Final = Kind("uri_too_long", 414, "The path and query are too long.")
UNSUPPORTED_ENCODING: Final = Kind("unsupported_encoding", 415, "The body is packed.")
UNSUPPORTED_TYPE: Final = Kind("unsupported_type", 415, "The body is no JSON.")
EXPECTATION_FAILED: Final = Kind("expectation_failed", 417, "Nothing is expected here but `100-continue`.")
INVALID: Final = Kind("invalid", 422, "A field is missing, unknown, or no value it can have.")
RATE_LIMITED: Final = Kind("rate_limited", 429, "Too many attempts.")
HEAD_TOO_LARGE: Final = Kind("head_too_large", 431, "A header is too long, or there are too many.")
INTERNAL: Final = Kind("internal_error", 500, "Something broke here; it has been logged.")
NOT_IMPLEMENTED: Final = Kind("not_implemented", 501, "HTTP has no such method.")
OVERLOADED: Final = Kind("overloaded", 503, "Too many requests are being answered.")
QUERY_TIMEOUT: Final = Kind("query_timeout", 503, "The query took too long.")
DATABASE_UNAVAILABLE: Final = Kind("database_unavailable", 503, "The database is away.")


class Problem(Exception):  # noqa: N818 - a problem in the sense of RFC 9457
    """Ends a request: what happened, in words for a person, and what it happened with."""

    def __init__(
        self,
        kind: Kind,
        message: str = "",
        *,
        details: Sequence[Detail] = (),
        headers: Mapping[str, str] | None = None,
        members: Mapping[str, Any] | None = None,
    ) -> None:
        """`members` are what a program reads of it beside the code: JSON, by names of this kind of problem."""
        super().__init__(message or kind.meaning)
        self.kind = kind
        self.message = message or kind.meaning
        self.details = tuple(details)
        self.headers = dict(headers or {})
        self.members = dict(members or {})


def invalid_parameter(name: str, message: str) -> Problem:
    return Problem(INVALID_PARAMETER, f"{name}: {message}", details=[Detail(name, message)])


def invalid(field: str, message: str) -> Problem:
    return Problem(INVALID, f"{field}: {message}", details=[Detail(field, message)])


def auth_required() -> Problem:
    message = "send a credential: Authorization: Bearer <API key or access token>"
    return Problem(AUTH_REQUIRED, message, headers={"WWW-Authenticate": "Bearer"})


def token_invalid() -> Problem:
    """Unknown, revoked and expired ones are told apart by nobody who does not hold a valid one."""
    return Problem(TOKEN_INVALID, headers={"WWW-Authenticate": 'Bearer error="invalid_token"'})


def unavailable(kind: Kind, message: str) -> Problem:
    """To be tried again, not by everybody at once."""
    return Problem(kind, message, headers={"Retry-After": str(random.randint(*RETRY_AFTER_S))})  # noqa: S311

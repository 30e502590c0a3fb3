"""The errors of this face, one shape and stable codes. Left out: those of ingest (`schemas.errors`)."""

import random
from typing import Final

import orjson
from aiohttp import web

from runtime.secrets import without_secrets

RETRY_AFTER_S: Final = (1, 5)


class ApiError(Exception):
    """Ends a request with a status, a code that clients may rely on, and words for a person."""

    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.headers = headers


def invalid_parameter(name: str, message: str) -> ApiError:
    return ApiError(400, "invalid_parameter", f"{name}: {message}")


def auth_required() -> ApiError:
    return ApiError(
        401,
        "auth_required",
        "an API key is needed: Authorization: Bearer sk_live_…",
        **{"WWW-Authenticate": "Bearer"},
    )


def token_invalid() -> ApiError:
    """Unknown, revoked and expired keys are told apart by nobody who does not hold a valid one."""
    header = {"WWW-Authenticate": 'Bearer error="invalid_token"'}
    return ApiError(401, "token_invalid", "the API key is not known, was revoked or has expired", **header)


def scope_missing(scope: str) -> ApiError:
    return ApiError(403, "scope_missing", f"the API key lacks the scope {scope}")


def device_not_found() -> ApiError:
    return ApiError(404, "device_not_found", "the organisation of this API key has no such device")


def unavailable(code: str, message: str) -> ApiError:
    """To be tried again, not by everybody at once."""
    return ApiError(503, code, message, **{"Retry-After": str(random.randint(*RETRY_AFTER_S))})  # noqa: S311


def error_response(error: ApiError, request_id: str) -> web.Response:
    """What every error of this face looks like."""
    return web.Response(
        status=error.status,
        body=error_body(error, request_id),
        content_type="application/json",
        headers=error.headers,
    )


def error_body(error: ApiError, request_id: str) -> bytes:
    message = without_secrets(error.message)  # a parameter is named as it was sent, which may be anything
    return orjson.dumps({"error": {"code": error.code, "message": message, "request_id": request_id}})

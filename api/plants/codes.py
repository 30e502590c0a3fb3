"""The codes of the Plants face: capital letters, and of what is wrong with a request one for each operation.

The document prints `statusCode: 400` with every error; the number here is the status that is sent.
"""

from collections.abc import Mapping
from typing import Final

from api import problems as registry
from api.http import problems
from api.http.problems import Kind

VALIDATION_ERROR: Final = Kind("VALIDATION_ERROR", 400, "Validation error")
INVALID_UUID: Final = Kind("INVALID_UUID", 400, "Invalid plant UUID")
BAD_REQUEST: Final = Kind("BAD_REQUEST", 400, "Bad request")
#: Of an operation that has no `INVALID_UUID`.
BAD_PLANT: Final = BAD_REQUEST._replace(meaning=INVALID_UUID.meaning)
_UNAUTHORIZED: Final = Kind("UNAUTHORIZED", 401, "Unauthorized")
_FORBIDDEN: Final = Kind("FORBIDDEN", 403, "Forbidden")
_UNAVAILABLE: Final = Kind("SERVICE_UNAVAILABLE", 503, "Service unavailable")

#: Of the whole face: a code of its own, or the common one in capital letters.
CODES: Final[Mapping[Kind, Kind]] = {
    kind: kind._replace(code=kind.code.upper())
    for kind in (*vars(registry).values(), *vars(problems).values())
    if isinstance(kind, Kind)
} | {
    registry.DEVICE_NOT_FOUND: registry.PLANT_NOT_FOUND,
    problems.BAD_REQUEST: BAD_REQUEST,
    problems.INVALID: VALIDATION_ERROR,
    problems.INVALID_BODY: VALIDATION_ERROR,
    problems.INVALID_PARAMETER: VALIDATION_ERROR,
    problems.AUTH_REQUIRED: _UNAUTHORIZED,
    problems.TOKEN_INVALID: _UNAUTHORIZED,
    problems.FORBIDDEN: _FORBIDDEN,
    problems.SCOPE_MISSING: _FORBIDDEN,
    problems.INTERNAL: Kind("INTERNAL_SERVER_ERROR", 500, "Internal server error"),
    problems.OVERLOADED: _UNAVAILABLE,
    problems.QUERY_TIMEOUT: _UNAVAILABLE,
    problems.DATABASE_UNAVAILABLE: _UNAVAILABLE,
}  # fmt: skip

#: Of an operation whose document knows one code for all that is wrong with a request.
ONE_CODE: Final[Mapping[Kind, Kind]] = dict.fromkeys(
    (problems.INVALID, problems.INVALID_BODY, problems.INVALID_PARAMETER), BAD_REQUEST
) | dict.fromkeys((registry.AUTHORITY_MISSING, registry.CERTIFICATE_LIMIT), registry.PLANT_REFUSED)

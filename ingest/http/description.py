"""What the ingest face takes and gives, as a part of an OpenAPI 3.1 document, for whoever serves one.

The wire formats and answers are written by hand for speed, so their description is too; tests hold it to what the
running face says. Left out: the rest of the document (`api.http.openapi`).
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Final

from ingest.formats.shelly_get import FLAG_VALUES, FLAGS, NUMBERS, TEXTS
from ingest.idempotency import KEY_LENGTH_MAX
from schemas.errors import ReadingCode, RequestCode

_TAG: Final = "Ingest"
_JSON: Final = "application/json"
_TEXT: Final = {"type": "string"}
_COUNT: Final = {"type": "integer", "minimum": 0}
_NULLABLE_TEXT: Final = {"type": ["string", "null"]}
_TIME: Final = {
    "description": "RFC 3339, or an epoch in s, ms, µs or ns, told apart by size. None: stamped once, on arrival.",
    "type": ["string", "number", "null"],
}

_MEANINGS: Final = {
    RequestCode.BAD_REQUEST: "The request is not well-formed HTTP, or its body was cut off.",
    RequestCode.BAD_JSON: "The body is no JSON text in UTF-8.",
    RequestCode.BAD_ENCODING: "The body does not unpack as its Content-Encoding says.",
    RequestCode.INVALID_BODY: "The body is JSON, but not of the shape that is taken.",
    RequestCode.INVALID_PARAMETER: "A parameter or header has no value that it can have.",
    RequestCode.AUTH_REQUIRED: "A token is needed.",
    RequestCode.TOKEN_INVALID: "The token is unknown, revoked or expired.",
    RequestCode.DEVICE_SUSPENDED: "The device is suspended; its readings stand in quarantine.",
    RequestCode.DEVICE_MISMATCH: "No device that was named is one of the token's.",
    RequestCode.FORBIDDEN: "The credential is not one that sends readings.",
    RequestCode.NOT_FOUND: "Nothing is at this path.",
    RequestCode.RECEIPT_NOT_FOUND: "The receipt is damaged, too old, or of another organisation.",
    RequestCode.METHOD_NOT_ALLOWED: "The path does not take this method.",
    RequestCode.IDEMPOTENCY_CONFLICT: "Another request with this Idempotency-Key and another content came before.",
    RequestCode.REQUEST_TIMEOUT: "The request did not come in time.",
    RequestCode.BODY_TOO_LARGE: "The body is larger than may be, packed or unpacked.",
    RequestCode.TOO_MANY_READINGS: "The request has more readings, or more devices, than may be.",
    RequestCode.URI_TOO_LONG: "The path and query are too long.",
    RequestCode.UNSUPPORTED_ENCODING: "A body is plain, or packed with gzip or zstd.",
    RequestCode.UNSUPPORTED_TYPE: "The body is no JSON.",
    RequestCode.NO_READINGS: "The request holds no reading.",
    RequestCode.ALL_REFUSED: "Every reading was refused; the list says why.",
    RequestCode.RATE_LIMITED: "More than a limit allows; `limit` says which, its use, and when it begins anew.",
    RequestCode.HEAD_TOO_LARGE: "A header is too long, or there are too many.",
    RequestCode.INTERNAL: "Something broke here; it has been logged.",
    RequestCode.NOT_IMPLEMENTED: "HTTP has no such method.",
    RequestCode.OVERLOADED: "Too much is being worked on.",
    RequestCode.LOG_UNAVAILABLE: "Readings cannot be made durable right now.",
    RequestCode.OUTCOME_UNKNOWN: "It is not known whether the readings were kept: send them again, with their times.",
    RequestCode.REGISTRY_UNAVAILABLE: "Tokens that were not seen lately cannot be looked up right now.",
}
_ALWAYS: Final = (
    RequestCode.BAD_REQUEST, RequestCode.AUTH_REQUIRED, RequestCode.TOKEN_INVALID, RequestCode.DEVICE_SUSPENDED,
    RequestCode.FORBIDDEN, RequestCode.REQUEST_TIMEOUT, RequestCode.URI_TOO_LONG, RequestCode.RATE_LIMITED,
    RequestCode.HEAD_TOO_LARGE, RequestCode.INTERNAL, RequestCode.OVERLOADED, RequestCode.REGISTRY_UNAVAILABLE,
)  # fmt: skip
_READINGS: Final = (
    RequestCode.INVALID_PARAMETER, RequestCode.DEVICE_MISMATCH, RequestCode.IDEMPOTENCY_CONFLICT,
    RequestCode.BODY_TOO_LARGE, RequestCode.TOO_MANY_READINGS, RequestCode.NO_READINGS, RequestCode.ALL_REFUSED,
    RequestCode.LOG_UNAVAILABLE, RequestCode.OUTCOME_UNKNOWN,
)  # fmt: skip
_BODY: Final = (
    RequestCode.BAD_JSON, RequestCode.BAD_ENCODING, RequestCode.INVALID_BODY, RequestCode.UNSUPPORTED_ENCODING,
    RequestCode.UNSUPPORTED_TYPE,
)  # fmt: skip

_SENT: Final = {
    "ts": "2026-05-17T08:22:00Z",
    "measurements": [
        {"type": "temperature", "value": 4.2, "unit": "°C", "label": "front"},
        {"type": "temperature", "value": 4.1, "unit": "parsec"},
    ],
}
_REJECTED: Final = {
    "index": 1, "code": str(ReadingCode.UNKNOWN_UNIT), "message": "temperature takes °C, °F, K, not `parsec`",
    "retryable": False,
}  # fmt: skip
_RECEIPT: Final = "AaX2…"
_TAKEN: Final = {"accepted": 1, "rejected": [_REJECTED], "receipt": _RECEIPT, "durable": "log"}
_LANDED: Final = {"stored": 1, "duplicates": 0, "conflicts": 0, "quarantined": 1}


def described(server: str | None = None) -> dict[str, Any]:
    """The part of the document; `server` is the URL that devices send to, where that is not the document's own."""
    paths: dict[str, dict[str, Any]] = {
        "/v1/ingest": {"post": _post(), "get": _get()},
        "/v1/ingest/shelly/{token}": {"get": _shelly()},
        "/v1/receipts/{receipt}": {"get": _receipt()},
    }
    if server is not None:
        for path in paths.values():
            path["servers"] = [{"url": server}]
    return {
        "tags": [{"name": _TAG}],
        "paths": paths,
        "components": {"schemas": _schemas(), "securitySchemes": _SECURITY},
    }


# ---------------------------------------------------------------- operations


def _post() -> dict[str, Any]:
    submission = _reference("IngestSubmission")
    many = {"type": "array", "items": submission, "minItems": 1}
    return {
        "operationId": "ingest_post",
        "summary": "Send readings: of one moment, or a backlog",
        "description": (
            "Each reading is judged by itself; what is `accepted` is durable. Bodies may be packed with gzip or zstd"
            " (`Content-Encoding`)."
        ),
        "tags": [_TAG],
        "security": [{"device": []}],
        "parameters": [
            _header("X-Device-Id", "Which of the site's devices a gateway sends for; wins over `device`."),
            *_HEADERS,
        ],
        "requestBody": {
            "required": True,
            "content": {_JSON: {"schema": {"anyOf": [submission, many]}, "example": _SENT}},
        },
        "responses": _stored(_TAKEN) | _problems(*_ALWAYS, *_READINGS, *_BODY),
    }


def _get() -> dict[str, Any]:
    return {
        "operationId": "ingest_get",
        "summary": "Send readings as query parameters, as Shelly and others do",
        "description": "A parameter that nobody knows, and a placeholder not filled in, is refused by itself.",
        "tags": [_TAG],
        "security": [{"device": []}, {}],
        "parameters": [_query("token", _TEXT, "In place of the header."), *_query_parameters(), *_HEADERS],
        "responses": _stored(_TAKEN | {"rejected": []}) | _problems(*_ALWAYS, *_READINGS),
    }


def _shelly() -> dict[str, Any]:
    return _get() | {
        "operationId": "ingest_shelly",
        "summary": "The same for firmware that appends its parameters to a URL",
        "security": [],
        "parameters": [_in_path("token", "The device's token."), *_query_parameters(), *_HEADERS],
    }


def _receipt() -> dict[str, Any]:
    example = {"receipt": _RECEIPT, "state": "landed", "accepted": 1} | _LANDED
    return {
        "operationId": "ingest_receipt",
        "summary": "What became of the readings of a receipt",
        "tags": [_TAG],
        "security": [{"device": []}],
        "parameters": [_in_path("receipt", "As it was given.")],
        "responses": {"200": _answer("Where they are.", "IngestReceipt", example)}
        | _problems(*_ALWAYS, RequestCode.RECEIPT_NOT_FOUND),
    }


def _stored(example: Mapping[str, Any]) -> dict[str, Any]:
    landed = "With `Prefer: wait=stored`: the same, once the readings have landed."
    return {
        "200": _answer(landed, "IngestStored", {**example, **_LANDED}),
        "202": _answer("What is accepted is durable.", "IngestTaken", example),
    }


def _answer(description: str, schema: str, example: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "description": description,
        "content": {_JSON: {"schema": _reference(schema), "example": dict(example)}},
    }


def _problems(*codes: RequestCode) -> dict[str, Any]:
    by_status: defaultdict[int, list[RequestCode]] = defaultdict(list)
    for code in codes:
        by_status[code.status].append(code)
    return {
        str(status): {
            "description": "\n".join(f"`{code}`: {_MEANINGS[code]}" for code in by_status[status]),
            "content": {_JSON: {"schema": _reference("IngestProblem")}},
        }
        for status in sorted(by_status)
    }


# ---------------------------------------------------------------- parameters


def _in_path(name: str, meaning: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {**_TEXT, "description": meaning}}


def _header(name: str, meaning: str, **schema: Any) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": False, "schema": {**_TEXT, **schema, "description": meaning}}


_HEADERS: Final = (
    _header(
        "Idempotency-Key",
        "The same again within 24 hours counts once.",
        minLength=1,
        maxLength=KEY_LENGTH_MAX,
        pattern=r'^(?!""$)[!-~](?:[ -~]*[!-~])?$',
    ),
    _header(
        "Prefer",
        "`wait=stored`: answer once the readings have landed. `respond-async`: let a backlog in as limits permit.",
    ),
)
_SECURITY: Final = {
    "device": {
        "type": "http",
        "scheme": "bearer",
        "description": (
            "A device's (`ds_live_…`) or gateway's (`gw_live_…`) token, or that of a site's server or edge device;"
            " for receipts an API key as well."
        ),
    },
}


def _query_parameters() -> Iterable[dict[str, Any]]:
    yield _query("device", _TEXT, "Which of the site's devices a gateway sends for.")
    yield _query("ts", _TEXT, str(_TIME["description"]))
    for name, (metric, unit) in NUMBERS.items():
        yield _query(name, {"type": "number"}, f"`{metric}`" + (f" in {unit}" if unit else ""))
    for name, metric in FLAGS.items():
        yield _query(name, {**_TEXT, "enum": [*FLAG_VALUES]}, f"`{metric}`")
    for name, metric in TEXTS.items():
        yield _query(name, _TEXT, f"`{metric}`")


def _query(name: str, schema: Mapping[str, Any], meaning: str) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "schema": {**schema, "description": meaning}}


# ---------------------------------------------------------------- schemas


def _reference(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(required: Mapping[str, Any], optional: Mapping[str, Any] | None = None) -> dict[str, Any]:
    return {"type": "object", "properties": {**required, **(optional or {})}, "required": [*required]}


def _schemas() -> dict[str, Any]:
    rejections = {"type": "array", "items": _reference("IngestRejection")}
    counts = dict.fromkeys(("stored", "duplicates", "conflicts", "quarantined"), _COUNT)
    taken = {
        "accepted": _COUNT,
        "rejected": rejections,
        "receipt": _TEXT,
        "durable": {**_TEXT, "enum": ["log", "spool"], "description": "Where they are durable: in either for good."},
    }
    paced = {"paced": {"type": "boolean"}, "paced_until": {**_TEXT, "format": "date-time"}}
    limit: dict[str, Any] = dict.fromkeys(("name", "scope"), _TEXT)
    limit |= dict.fromkeys(("value", "used", "window_s", "resets_in_s"), _COUNT)
    error = {"code": _TEXT, "message": _TEXT, "request_id": _TEXT}
    return {
        "IngestMeasurement": _object(
            {
                "type": {**_TEXT, "minLength": 1, "description": "A metric: up to 64 of a-z 0-9 _ . : / -"},
                "value": {"type": ["number", "boolean", "string"]},
            },
            {"unit": _NULLABLE_TEXT, "label": _NULLABLE_TEXT, "ts": _TIME},
        ),
        "IngestSubmission": _object(
            {"measurements": {"type": "array", "items": _reference("IngestMeasurement"), "minItems": 1}},
            {"device": _NULLABLE_TEXT, "ts": {**_TIME, "description": "Of measurements that have none."}},
        ),
        "IngestRejection": _object(
            {"index": _COUNT, "code": _TEXT, "message": _TEXT, "retryable": {"type": "boolean"}}
        ),
        "IngestTaken": _object(taken, paced),
        "IngestStored": _object(taken | counts, {"erased": _COUNT}),
        "IngestReceipt": _object(
            {"receipt": _TEXT, "state": {**_TEXT, "enum": ["pending", "landed"]}, "accepted": _COUNT},
            counts | {"lost": _COUNT, "erased": _COUNT},
        ),
        "IngestProblem": _object({"error": _object(error, {"rejected": rejections, "limit": _object(limit)})}),
    }

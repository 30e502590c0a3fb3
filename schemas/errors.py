"""The codes that clients of the ingest face program against: never renamed, only added to.

A request's code carries its HTTP status; a reading's code stands in `rejected` and in the quarantine.
"""

from enum import StrEnum


class RequestCode(StrEnum):
    """Why a whole request was refused."""

    status: int

    def __new__(cls, value: str, status: int) -> "RequestCode":
        member = str.__new__(cls, value)
        member._value_ = value
        member.status = status
        return member

    BAD_REQUEST = "bad_request", 400
    """The HTTP itself is malformed."""
    BAD_JSON = "bad_json", 400
    """The body is no JSON text in UTF-8."""
    BAD_ENCODING = "bad_encoding", 400
    """The body does not unpack as its Content-Encoding says."""
    INVALID_BODY = "invalid_body", 400
    """The body is JSON, but not of the shape the route takes."""
    INVALID_PARAMETER = "invalid_parameter", 400
    AUTH_REQUIRED = "auth_required", 401
    TOKEN_INVALID = "token_invalid", 401
    DEVICE_SUSPENDED = "device_suspended", 403
    DEVICE_MISMATCH = "device_mismatch", 403
    FORBIDDEN = "forbidden", 403
    NOT_FOUND = "not_found", 404
    RECEIPT_NOT_FOUND = "receipt_not_found", 404
    METHOD_NOT_ALLOWED = "method_not_allowed", 405
    IDEMPOTENCY_CONFLICT = "idempotency_conflict", 409
    """Another request with this Idempotency-Key, and another content, came within 24 hours."""
    REQUEST_TIMEOUT = "request_timeout", 408
    BODY_TOO_LARGE = "body_too_large", 413
    TOO_MANY_READINGS = "too_many_readings", 413
    URI_TOO_LONG = "uri_too_long", 414
    UNSUPPORTED_ENCODING = "unsupported_encoding", 415
    UNSUPPORTED_TYPE = "unsupported_type", 415
    NO_READINGS = "no_readings", 422
    ALL_REFUSED = "all_refused", 422
    RATE_LIMITED = "rate_limited", 429
    """More than a limit allows; `limit` beside it says which, its use, and when it begins anew."""
    HEAD_TOO_LARGE = "head_too_large", 431
    """A header is too long, or there are too many."""
    INTERNAL = "internal_error", 500
    NOT_IMPLEMENTED = "not_implemented", 501
    """HTTP has no such method."""
    OVERLOADED = "overloaded", 503
    LOG_UNAVAILABLE = "log_unavailable", 503
    OUTCOME_UNKNOWN = "outcome_unknown", 503
    """The log did not say in time whether it kept the readings: send them again, with their own times."""
    REGISTRY_UNAVAILABLE = "registry_unavailable", 503


class ReadingCode(StrEnum):
    """Why one reading was refused at the door or set aside behind the log."""

    INVALID_MEASUREMENT = "invalid_measurement"
    INVALID_METRIC = "invalid_metric"
    INVALID_LABEL = "invalid_label"
    INVALID_UNIT = "invalid_unit"
    INVALID_VALUE = "invalid_value"
    INVALID_TIME = "invalid_time"
    NOT_FINITE = "not_finite"
    UNEXPANDED = "unexpanded_placeholder"
    OUT_OF_RANGE = "out_of_range"
    UNKNOWN_UNIT = "unknown_unit"
    UNKNOWN_PARAMETER = "unknown_parameter"
    TOO_OLD = "too_old"
    DEVICE_MISMATCH = "device_mismatch"
    DEVICE_SUSPENDED = "device_suspended"
    RATE_LIMITED = "rate_limited"
    """By MQTT, where nobody can be told to wait: more than a limit allows, for too long."""
    BAD_SIGNATURE = "bad_signature"
    """A plant's message without the signature that it has to have, or with one that is none of the plant's."""
    STALE_ENVELOPE = "stale_envelope"
    """A plant's message from outside the replay window that does not say when it was measured."""
    NONCE_REUSED = "nonce_reused"
    """A plant's message under the nonce of another one."""
    NOT_DURABLE = "not_durable"
    """Its record could not be made durable though others of the request were: send it again."""
    UNIT_MISMATCH = "unit_mismatch"
    SERIES_LIMIT = "series_limit"
    CONFLICT = "conflict"
    IDEMPOTENCY_CONFLICT = "idempotency_conflict"
    UNDECODABLE = "undecodable"
    UNKNOWN_DEVICE = "unknown_device"
    UNASSIGNED_DEVICE = "unassigned_device"
    """By MQTT: the topic names a site, and a device that the site does not have yet. Held until it is claimed."""
    REJECTED_BY_STORE = "rejected_by_store"

    @property
    def retryable(self) -> bool:
        return self is ReadingCode.NOT_DURABLE

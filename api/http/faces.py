"""The faces of the API: which paths are whose, and how each words what went wrong.

A face belongs to a document that fixes its shapes; all of them stand on one registry. Left out: their operations.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final

import orjson

from api.http.problems import Kind, Problem
from runtime.secrets import without_secrets

JSON: Final = "application/json"
PROBLEM_JSON: Final = "application/problem+json"


@dataclass(frozen=True)
class Shape:
    """How errors look: their content type, what is said of one, and the JSON Schema of that."""

    content_type: str
    content: "Callable[[Problem, Kind, str], dict[str, Any]]"
    """From a problem, its kind on this face and the request's id."""
    schema: Mapping[str, Any]


@dataclass(frozen=True)
class Face:
    """The part of the API that a document describes."""

    name: str
    title: str
    prefixes: tuple[str, ...]
    shape: Shape
    codes: Mapping[Kind, Kind] = field(default_factory=dict)
    """Where this face has a code or status of its own for something."""

    def kind(self, kind: Kind) -> Kind:
        return self.codes.get(kind, kind)

    def body(self, problem: Problem, request_id: str) -> bytes:
        content = self.shape.content(problem, self.kind(problem.kind), request_id)
        # A name is told as it was sent, which may be anything.
        return without_secrets(orjson.dumps(content).decode()).encode()


def face_of(faces: "tuple[Face, ...]", path: str) -> Face:
    """The face with the longest prefix of `path`; the last one has all others."""
    fitting = [
        (len(prefix), face) for face in faces for prefix in face.prefixes if f"{path}/".startswith(f"{prefix}/")
    ]
    return max(fitting, key=lambda one: one[0])[1] if fitting else faces[-1]


# ---------------------------------------------------------------- shapes


def _details(problem: Problem) -> list[dict[str, str]]:
    return [{"field": detail.field, "message": detail.message} for detail in problem.details]


def _enveloped(problem: Problem, kind: Kind, request_id: str) -> dict[str, Any]:
    error: dict[str, Any] = {"code": kind.code, "message": problem.message, "request_id": request_id}
    return {"error": error | ({"details": _details(problem)} if problem.details else {}) | problem.members}


def _detailed(problem: Problem, kind: Kind, _: str) -> dict[str, Any]:
    error = {"code": kind.code, "message": problem.message, "details": _details(problem)}
    return {"error": error | problem.members}


def _named(problem: Problem, kind: Kind, _: str) -> dict[str, Any]:
    return {
        "code": kind.code,
        "details": {detail.field or "body": detail.message for detail in problem.details} | problem.members,
        "error": HTTPStatus(kind.status).phrase,
        "message": problem.message,
        "statusCode": kind.status,
    }


def _problem(problem: Problem, kind: Kind, request_id: str) -> dict[str, Any]:
    content: dict[str, Any] = {
        "type": "about:blank",
        "title": kind.meaning,
        "status": kind.status,
        "detail": problem.message,
        "code": kind.code,
        "request_id": request_id,
    }
    return content | ({"errors": _details(problem)} if problem.details else {}) | problem.members


_TEXT: Final = {"type": "string"}
_DETAILS: Final = {
    "type": "array",
    "items": {"type": "object", "properties": {"field": _TEXT, "message": _TEXT}, "required": ["field", "message"]},
}


def _envelope(properties: Mapping[str, Any], required: list[str]) -> dict[str, Any]:
    error = {"type": "object", "properties": dict(properties), "required": required}
    return {"type": "object", "properties": {"error": error}, "required": ["error"]}


#: `{"error": {"code", "message", "request_id", "details"?}}`
ENVELOPE: Final = Shape(
    JSON,
    _enveloped,
    _envelope(
        {"code": _TEXT, "message": _TEXT, "request_id": _TEXT, "details": _DETAILS}, ["code", "message", "request_id"]
    ),
)
#: `{"error": {"code", "message", "details"}}`
DETAILED: Final = Shape(
    JSON,
    _detailed,
    _envelope({"code": _TEXT, "message": _TEXT, "details": _DETAILS}, ["code", "message", "details"]),
)
#: `{"code", "details", "error", "message", "statusCode"}`
STATUSED: Final = Shape(
    JSON,
    _named,
    {
        "type": "object",
        "properties": {
            "code": _TEXT,
            "details": {"type": "object", "description": "What is wrong, by the name of a field."},
            "error": {"type": "string", "description": "The status in words."},
            "message": _TEXT,
            "statusCode": {"type": "integer"},
        },
        "required": ["code", "details", "error", "message", "statusCode"],
    },
)
#: RFC 9457, with the code and the request's id beside what it names.
PROBLEM: Final = Shape(
    PROBLEM_JSON,
    _problem,
    {
        "type": "object",
        "properties": {
            "type": _TEXT,
            "title": _TEXT,
            "status": {"type": "integer"},
            "detail": _TEXT,
            "code": _TEXT,
            "request_id": _TEXT,
            "errors": _DETAILS,
        },
        "required": ["type", "title", "status", "detail", "code", "request_id"],
    },
)

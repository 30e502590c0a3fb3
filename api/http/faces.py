"""The faces of the API: which paths are whose, and how each words what went wrong.

A face belongs to a document that fixes its shapes; all of them stand on one registry. Left out: their operations.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
    content: "Callable[[Problem, str, str], dict[str, Any]]"
    """From a problem, its code on this face and the request's id."""
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
        content = self.shape.content(problem, self.kind(problem.kind).code, request_id)
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


def _enveloped(problem: Problem, code: str, request_id: str) -> dict[str, Any]:
    error: dict[str, Any] = {"code": code, "message": problem.message, "request_id": request_id}
    return {"error": error | ({"details": _details(problem)} if problem.details else {}) | problem.members}


def _detailed(problem: Problem, code: str, _: str) -> dict[str, Any]:
    error = {"code": code, "message": problem.message, "details": _details(problem)}
    return {"error": error | problem.members}


def _problem(problem: Problem, code: str, request_id: str) -> dict[str, Any]:
    content: dict[str, Any] = {
        "type": "about:blank",
        "title": problem.kind.meaning,
        "status": problem.kind.status,
        "detail": problem.message,
        "code": code,
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

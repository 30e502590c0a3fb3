"""The OpenAPI 3.1 document of the declared operations. Left out: serving it (`api.platform.documents`)."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, Final

import msgspec

from api.http import spelt
from api.http.faces import Face
from api.http.faults import FAULTS_MAX
from api.http.operations import Audience, Nothing, Operation
from api.http.problems import (
    AUTH_REQUIRED,
    BAD_REQUEST,
    BODY_TOO_LARGE,
    DATABASE_UNAVAILABLE,
    FORBIDDEN,
    HEAD_TOO_LARGE,
    IDEMPOTENCY_CONFLICT,
    INTERNAL,
    INVALID,
    INVALID_BODY,
    INVALID_PARAMETER,
    NOT_ACCEPTABLE,
    OVERLOADED,
    QUERY_TIMEOUT,
    RATE_LIMITED,
    REQUEST_TIMEOUT,
    SCOPE_MISSING,
    STALE,
    TOKEN_INVALID,
    UNSUPPORTED_ENCODING,
    UNSUPPORTED_TYPE,
    URI_TOO_LONG,
    Kind,
)
from api.http.repeats import HEADER, KEY_CHARACTERS_MAX, KEY_PATTERN

OPENAPI: Final = "3.1.0"
REFERENCE: Final = "#/components/schemas/{name}"

#: What holds for every operation.
_MANNERS: Final = (
    "`X-Request-Id`, of up to 64 letters, digits and `._:+/=-`, names a request and stands in its answer and in what"
    " is kept of it; without one, or with another, a request gets a new one. Errors name every field that is wrong,"
    f" up to {FAULTS_MAX}."
)
_METHODS: Final = frozenset({"get", "post", "put", "patch", "delete"})
_LICENSE: Final = {"name": "Apache-2.0", "identifier": "Apache-2.0"}
#: Before a path is read, or instead of it.
_UNREAD: Final = (BAD_REQUEST, REQUEST_TIMEOUT, URI_TOO_LONG, HEAD_TOO_LARGE)
_ALWAYS: Final = (*_UNREAD, RATE_LIMITED, INTERNAL, OVERLOADED, QUERY_TIMEOUT, DATABASE_UNAVAILABLE)
_WITH_BODY: Final = (INVALID_BODY, BODY_TOO_LARGE, UNSUPPORTED_ENCODING, UNSUPPORTED_TYPE, INVALID)
_WITH_CALLER: Final = (AUTH_REQUIRED, TOKEN_INVALID, FORBIDDEN)
_KEY: Final = {
    "type": "string",
    "minLength": 1,
    "maxLength": KEY_CHARACTERS_MAX,
    "pattern": KEY_PATTERN,
    "description": "The same again within a day is answered as it was, and done once.",
}
_VERSION: Final = {"type": "string", "description": "The `ETag` of the version that is to be changed."}
_HELD: Final = {"type": "string", "description": "`ETag`s of versions that need not be sent again."}


def document(
    operations: Sequence[Operation],
    *,
    version: str,
    server: str,
    last: Face,
    described: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The document as JSON types; `server` is the URL that paths are under, `last` the face of what has no path.

    `described` are parts of it that others have written, with `tags`, `paths` and `components` of their own.
    """
    faces = {operation.face.name: operation.face for operation in operations} | {last.name: last}
    shapes, schemas = schemas_of(operations)
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _described(operation, shapes)
    problems = {_problem_name(face): dict(face.shape.schema) for face in faces.values()}
    whole: dict[str, Any] = {
        "openapi": OPENAPI,
        "info": {
            "title": "Sluice",
            "version": version,
            "description": _MANNERS,
            "license": _LICENSE,
        },
        "servers": [{"url": server}],
        "tags": [{"name": face.title} for face in faces.values()],
        "paths": paths,
        "components": {
            "schemas": schemas | problems,
            "securitySchemes": {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "An API key (`sk_live_…`) or an access token.",
                }
            },
        },
    }
    for part in described:
        _join(whole, part)
    for path in whole["paths"].values():
        for method in path.keys() & _METHODS:
            _add_unread(path[method]["responses"], last)
    return whole


def _join(whole: dict[str, Any], part: Mapping[str, Any]) -> None:
    """Raises `ValueError` where both say something of the same name."""
    whole["tags"] += part["tags"]
    pairs = [(whole["paths"], part["paths"])]
    pairs += [(whole["components"][name], found) for name, found in part["components"].items()]
    for ours, theirs in pairs:
        if both := ours.keys() & theirs.keys():
            raise ValueError(f"described twice: {', '.join(sorted(both))}")
        ours.update(deepcopy(theirs))


def schemas_of(operations: Iterable[Operation]) -> tuple[dict[Any, Any], dict[str, Any]]:
    """How each type that operations take or give is referred to, and the JSON Schemas by name."""
    types = list(dict.fromkeys(kind for operation in operations for kind in _types(operation)))
    found, components = msgspec.json.schema_components(types, schema_hook=spelt.describe, ref_template=REFERENCE)
    return dict(zip(types, found, strict=True)), components


def _types(operation: Operation) -> Iterator[Any]:
    for kind in (operation.body_type, operation.answer_type, *operation.other_types.values()):
        if _is_said(kind):
            yield kind
    for struct in (operation.path_type, operation.query_type):
        for field in msgspec.structs.fields(struct):
            yield field.type


def _is_said(kind: Any) -> bool:
    return kind is not Nothing and kind is not None and kind is not type(None)


def _described(operation: Operation, shapes: Mapping[Any, Any]) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": operation.name.replace(".", "_"),
        "summary": operation.summary,
        "tags": [operation.face.title],
        "parameters": [*_parameters(operation, shapes)],
        "responses": _responses(operation, shapes),
        "security": [] if operation.needs.audience is Audience.PUBLIC else [{"bearer": []}],
    }
    if operation.description:
        described["description"] = operation.description
    if _is_said(operation.body_type):
        content: dict[str, Any] = {"schema": shapes[operation.body_type]}
        if operation.example.request is not None:
            content["example"] = operation.example.request
        described["requestBody"] = {"required": True, "content": {"application/json": content}}
    return described


def _parameters(operation: Operation, shapes: Mapping[Any, Any]) -> Iterator[dict[str, Any]]:
    for field in msgspec.structs.fields(operation.path_type):
        yield {"name": field.encode_name, "in": "path", "required": True, "schema": shapes[field.type]}
    for field in msgspec.structs.fields(operation.query_type):
        schema = _without_null(shapes[field.type])
        if field.default not in (msgspec.NODEFAULT, None, msgspec.UNSET):
            schema = {**schema, "default": field.default}
        yield {"name": field.encode_name, "in": "query", "required": field.required, "schema": schema}
    if operation.repeatable:
        yield {"name": HEADER, "in": "header", "required": False, "schema": _KEY}
    if operation.versioned:
        yield {"name": "If-None-Match", "in": "header", "required": False, "schema": _HELD}
    if STALE in operation.problems:
        yield {"name": "If-Match", "in": "header", "required": False, "schema": _VERSION}


def _without_null(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter that is left out is None here; there is no way to send null."""
    options = [one for one in schema.get("anyOf", ()) if one != {"type": "null"}]
    rest = {name: value for name, value in schema.items() if name != "anyOf"}
    if len(options) == 1:
        return {**options[0], **rest}
    return {**rest, "anyOf": options} if options else rest


def _responses(operation: Operation, shapes: Mapping[Any, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = {"description": operation.summary}
    if _is_said(operation.answer_type):
        content: dict[str, Any] = {"schema": shapes[operation.answer_type]}
        if operation.example.answer is not None:
            content["example"] = operation.example.answer
        others = {kind: {"schema": shapes[held]} if held else {} for kind, held in operation.other_types.items()}
        answer["content"] = {operation.content_type: content} | others
    responses = {str(operation.status): answer}
    if operation.versioned:
        responses["304"] = {"description": "The version that `If-None-Match` names is the newest."}
    by_status: dict[int, list[Kind]] = {}
    for kind in kinds_of(operation):
        spelt_here = operation.face.kind(operation.own(kind))
        by_status.setdefault(spelt_here.status, []).append(spelt_here)
    for status in sorted(by_status):
        responses[str(status)] = {
            "description": "\n".join(dict.fromkeys(f"`{kind.code}`: {kind.meaning}" for kind in by_status[status])),
            "content": {
                operation.face.shape.content_type: {
                    "schema": {"$ref": REFERENCE.format(name=_problem_name(operation.face))}
                }
            },
        }
    return responses


def _add_unread(responses: Mapping[str, Any], last: Face) -> None:
    """What is no HTTP, or comes too slowly, may be refused before its path is read: in the last face's shape."""
    for kind in _UNREAD:
        content = responses[str(kind.status)]["content"]
        content.setdefault(last.shape.content_type, {"schema": {"$ref": REFERENCE.format(name=_problem_name(last))}})


def kinds_of(operation: Operation) -> list[Kind]:
    """Everything that can go wrong with an operation."""
    kinds = [*operation.problems, *_ALWAYS]
    kinds += [operation.missing_at(field.encode_name) for field in msgspec.structs.fields(operation.path_type)]
    kinds += [operation.malformed] if operation.malformed else []
    if msgspec.structs.fields(operation.query_type):
        kinds.append(INVALID_PARAMETER)
    if _is_said(operation.body_type):
        kinds += _WITH_BODY
    if operation.needs.audience is not Audience.PUBLIC:
        kinds += _WITH_CALLER
    if operation.needs.scope:
        kinds.append(SCOPE_MISSING)
    if operation.other_types:
        kinds.append(NOT_ACCEPTABLE)
    if operation.repeatable:
        kinds += (INVALID_PARAMETER, IDEMPOTENCY_CONFLICT)
    return list(dict.fromkeys(kinds))


def _problem_name(face: Face) -> str:
    return f"{face.name.capitalize()}Problem"

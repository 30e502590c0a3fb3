"""One declaration an operation: its method, path, who may call it, what it takes and gives, what can go wrong.

Routing, decoding, authorisation, the OpenAPI document and the clients' view of errors all follow from it; a handler
is the few lines that are its own. Left out: how a request runs through it (`api.http.edge`).
"""

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from functools import partial
from types import MappingProxyType
from typing import Any, Final, Generic, NamedTuple, TypeVar, get_args, get_origin, get_type_hints
from uuid import UUID

import msgspec

from api.http.faces import Face
from api.http.problems import NOT_FOUND, Kind

P = TypeVar("P", bound=msgspec.Struct)
Q = TypeVar("Q", bound=msgspec.Struct)
B = TypeVar("B")
A = TypeVar("A")

_MARK: Final = "__operation__"
BODY_BYTES_MAX: Final = 256_000


class Nothing(msgspec.Struct, forbid_unknown_fields=True):
    """No path parameters, no query parameters, or no body."""


# ---------------------------------------------------------------- who may


class Role(IntEnum):
    """What a member may do in an organisation; each may what those before it may."""

    VIEWER = 1
    MEMBER = 2
    ADMIN = 3
    OWNER = 4


class Audience(Enum):
    """Who calls an operation at all."""

    PUBLIC = "public"
    USER = "user"
    """A person who has logged in; no organisation is chosen yet."""
    ORGANISATION = "organisation"
    """A member of an organisation, or one of its API keys."""
    SITE = "site"
    """A site's own gateway: its server, or one of its edge devices."""


class Needs(NamedTuple):
    """Who may call an operation."""

    audience: Audience
    role: Role = Role.VIEWER
    """The least that a person has to be."""
    scope: str = ""
    """What an API key has to be made for; the scope `owner` has all others."""
    keeps: bool = True
    """Whether the transaction that let the caller in stays open for the handler; without, it opens its own."""
    unowned: bool = False
    """Whether a super-admin who acts for no organisation may call it, about what belongs to none."""


PUBLIC: Final = Needs(Audience.PUBLIC)
USER: Final = Needs(Audience.USER)
SITE: Final = Needs(Audience.SITE)


def needs(role: Role, scope: str) -> Needs:
    return Needs(Audience.ORGANISATION, role, scope)


class Caller(NamedTuple):
    """Who is calling: a person, an API key, a site's gateway, or nobody."""

    organisation: UUID | None
    role: Role | None
    credential: UUID | None
    """The API key, or the gateway's token."""
    user: UUID | None
    site: UUID | None = None
    """Whose gateway it is."""
    session: UUID | None = None
    """The person's login."""
    super_admin: bool = False
    scopes: frozenset[str] = frozenset()
    """Of the API key."""


# ---------------------------------------------------------------- what a handler gets and gives


@dataclass(frozen=True, slots=True)
class Call(Generic[P, Q, B]):
    """A request that was decoded and may go on. Its transaction is committed when the handler returns."""

    path: P
    query: Q
    body: B
    caller: Caller
    connection: Any
    """A session that sees the caller's organisation only; None for what everybody may call."""
    request_id: str
    versions: tuple[str, ...] | None
    """What `If-Match` names; None without one, or for any."""
    address: bytes = bytes(16)
    """Where it comes from, through trusted proxies: as `runtime.addresses` has it."""
    agent: str = ""
    """What sends it, as it says itself (`User-Agent`)."""
    accept: str = ""
    """Which forms it takes, as it says itself (`Accept`)."""
    held_versions: tuple[str, ...] = ()
    """What `If-None-Match` names: versions that the client has; `*` is any."""
    last_event_id: str = ""
    """Where a stream is to go on (`Last-Event-ID`)."""
    is_gone: Callable[[], bool] = lambda: False
    """Whether the client has closed its connection."""

    def known(self, version: str) -> bool:
        """Whether the client has it: then `unchanged(version)` is the answer, before anything is computed."""
        return version in self.held_versions or "*" in self.held_versions

    @property
    def organisation(self) -> UUID:
        """Raises `RuntimeError` in an operation that needs none."""
        if self.caller.organisation is None:
            raise RuntimeError("the operation is not declared for an organisation")
        return self.caller.organisation


@dataclass(frozen=True, slots=True)
class Reply(Generic[A]):
    """An answer that is more than its content: an `A`, that rendered already, or that piece by piece.

    Pieces are taken after the handler's transaction has ended, as fast as the client reads them.
    """

    content: A | bytes | AsyncIterator[bytes]
    status: int | None = None
    version: str | None = None
    """For `ETag`, printable ASCII without quotes, commas and semicolons."""
    is_weak: bool = False
    """Whether answers of one version may differ in bytes, though not in what they are good for (`W/`)."""
    headers: Mapping[str, str] = field(default_factory=dict)
    content_type: str | None = None


def unchanged(version: str) -> Reply[Any]:
    """The answer to whom the version is known."""
    return Reply(b"", status=304, version=version)


Handler = Callable[[Any], Awaitable[Any]]


class Example(NamedTuple):
    """A request's body and what it is answered, as a document prints them."""

    request: Any = None
    answer: Any = None


@dataclass(frozen=True)
class Operation:
    """What is declared of an operation, and what is read off its handler."""

    face: Face
    method: str
    path: str
    needs: Needs
    handler: Handler
    status: int
    problems: tuple[Kind, ...]
    missing: Kind | Mapping[str, Kind] | None
    """What a malformed id in the path means: that there is no such thing; of several, by their names in the path."""
    malformed: Kind | None
    """What it means where the document tells it from a thing that is not there."""
    codes: Mapping[Kind, Kind]
    """Where this operation has a code or status of its own for something, beside its face's."""
    body_bytes_max: int
    writes: bool
    repeatable: bool
    """Whether `Idempotency-Key` makes a repetition the same request."""
    content_type: str
    other_types: Mapping[str, Any]
    """Content types that it is answered in beside `content_type`, and what they hold if that is JSON, else None."""
    versioned: bool
    """Whether all of the answer is of its version, so that `If-None-Match` spares a client what it has."""
    example: Example
    path_type: type[msgspec.Struct]
    query_type: type[msgspec.Struct]
    body_type: Any
    answer_type: Any
    name: str
    summary: str
    description: str

    def missing_at(self, name: str) -> Kind:
        """What is not there where this field of the path is malformed."""
        kind = self.missing if isinstance(self.missing, Kind | None) else self.missing.get(name)
        return kind or NOT_FOUND

    def own(self, kind: Kind) -> Kind:
        """As this operation says it; its face may have another word for that."""
        return self.codes.get(kind, kind)


_NO_EXAMPLE: Final = Example()


def operation(
    face: Face,
    method: str,
    path: str,
    allowed: Needs,
    *,
    status: int = 200,
    problems: Sequence[Kind] = (),
    missing: Kind | Mapping[str, Kind] | None = None,
    malformed: Kind | None = None,
    codes: Mapping[Kind, Kind] = MappingProxyType({}),
    body_bytes_max: int = BODY_BYTES_MAX,
    writes: bool | None = None,
    repeatable: bool = False,
    content_type: str = "application/json",
    other_types: Mapping[str, Any] = MappingProxyType({}),
    versioned: bool = False,
    example: Example = _NO_EXAMPLE,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare a method `async def name(self, call: Call[Path, Query, Body]) -> Answer` to be an operation.

    Its docstring's first line is the summary, the rest the description. `{name}` in the path is the field of Path
    that is encoded under that name.
    """
    declared = partial(
        Operation,
        face=face,
        method=method,
        path=path,
        needs=allowed,
        status=status,
        problems=tuple(problems),
        missing=missing,
        malformed=malformed,
        codes=codes,
        body_bytes_max=body_bytes_max,
        writes=method != "GET" if writes is None else writes,
        repeatable=repeatable,
        content_type=content_type,
        other_types=other_types,
        versioned=versioned,
        example=example,
    )

    def mark(handler: Callable[..., Any]) -> Callable[..., Any]:
        setattr(handler, _MARK, declared)
        return handler

    return mark


def operations_of(*holders: object) -> Iterator[Operation]:
    """The operations that the methods of these objects are declared to be."""
    for holder in holders:
        for name, function in vars(type(holder)).items():
            declared: partial[Operation] | None = getattr(function, _MARK, None)
            if declared is not None:
                yield _bind(holder, name, function, declared)


def _bind(holder: object, name: str, function: Callable[..., Any], declared: partial[Operation]) -> Operation:
    hints = get_type_hints(function, include_extras=True)
    path_type, query_type, body_type = get_args(hints["call"])
    answer_type = hints["return"]
    if get_origin(answer_type) is Reply:
        (answer_type,) = get_args(answer_type)
    summary, _, description = inspect.cleandoc(function.__doc__ or "").partition("\n\n")
    return declared(
        handler=getattr(holder, name),
        path_type=path_type,
        query_type=query_type,
        body_type=body_type,
        answer_type=answer_type,
        name=f"{declared.keywords['face'].name}.{name}",
        summary=" ".join(summary.split()).rstrip("."),
        description=description,
    )

"""Values that a request spells in a way of their own: ids with a prefix, moments. Left out: plain JSON types."""

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, ClassVar, Final, Self
from uuid import UUID

_RFC_3339: Final = re.compile(
    r"(\d{4}-\d\d-\d\d)[Tt](\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(?:([Zz])|([+\- ])(\d\d:\d\d))", re.ASCII
)
#: Up to the year 5138, and back to 1653.
_EPOCH_SECONDS: Final = re.compile(r"(?:-[0-9]{1,10}|[0-9]{1,11})(?:\.[0-9]{1,9})?")
_HEX: Final = "[0-9a-fA-F]"
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


#: What a text has to be for the database to hold it, as the OpenAPI document says it.
STORABLE: Final = {"pattern": r"^[^\u0000]*$"}


class Spelt:
    """A value with its own spelling: `parse` reads it, `str` writes it, `schema` describes it."""

    schema: ClassVar[Mapping[str, Any]]
    texts: ClassVar[str] = ""
    """Which texts are taken, for who sent none."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises `ValueError` that says what it should look like."""
        raise NotImplementedError


class PrefixedId(Spelt):
    """A UUID behind a prefix that says what it is of; without the prefix it is understood too."""

    __slots__ = ("value",)
    prefix: ClassVar[str]
    pattern: ClassVar["re.Pattern[str]"]

    def __init__(self, value: UUID) -> None:
        self.value = value

    def __init_subclass__(cls, *, prefix: str) -> None:
        cls.prefix = prefix
        cls.pattern = re.compile(f"(?:{prefix})?(?:{_HEX}{{32}}|{_HEX}{{8}}(?:-{_HEX}{{4}}){{3}}-{_HEX}{{12}})")
        cls.schema = {
            "type": "string",
            "pattern": f"^{cls.pattern.pattern}$",
            "examples": [f"{prefix}018f3c5e7a6b7c8d9e0f1a2b3c4d5e6f"],
        }

    @classmethod
    def parse(cls, text: str) -> Self:
        if cls.pattern.fullmatch(text) is None:
            raise ValueError(f"must be `{cls.prefix}` and 32 hexadecimal digits")
        return cls(UUID(text.removeprefix(cls.prefix)))

    def __str__(self) -> str:
        return f"{self.prefix}{UUID(int=self.value.int).hex}"


class Never(Spelt):
    """No value at all: of a field that is known, and that nobody may send here."""

    why: ClassVar[str]
    schema: ClassVar[Mapping[str, Any]] = {"not": {}, "description": "Immutable."}

    def __init_subclass__(cls, *, why: str) -> None:
        cls.why = why


class Moment(Spelt):
    """RFC 3339 with an offset, or seconds since 1970, as a text; to the microsecond, later digits cut off."""

    __slots__ = ("value",)
    texts: ClassVar[str] = ": RFC 3339 with an offset, or seconds since 1970"
    schema: ClassVar[Mapping[str, Any]] = {
        "description": "RFC 3339, or seconds since 1970; a text either way",
        "anyOf": [
            {"type": "string", "format": "date-time"},
            {"type": "string", "pattern": f"^{_EPOCH_SECONDS.pattern}$"},
        ],
    }

    def __init__(self, value: datetime) -> None:
        self.value = value

    @classmethod
    def parse(cls, text: str) -> Self:
        try:
            return cls(parse_time(text))
        except (ValueError, OverflowError):
            raise ValueError("must be RFC 3339 with an offset, or seconds since 1970 as a text") from None

    def __str__(self) -> str:
        return self.value.astimezone(UTC).isoformat().replace("+00:00", "Z")


def parse_time(text: str) -> datetime:
    """RFC 3339 or seconds since 1970, to the microsecond, later digits cut off. Raises `ValueError`."""
    if _EPOCH_SECONDS.fullmatch(text):
        return _EPOCH + timedelta(microseconds=int(Decimal(text).scaleb(6)))
    match = _RFC_3339.fullmatch(text)
    if match is None:
        raise ValueError(text)
    day, clock, fraction, zulu, sign, offset = match.groups()
    # A plus sign that was not escaped in the URL arrives as a space.
    zone = "+00:00" if zulu else ("+" if sign == " " else sign) + offset
    fraction = (fraction or "").ljust(6, "0")[:6]
    return datetime.fromisoformat(f"{day}T{clock}.{fraction}{zone}").astimezone(UTC)


def read(kind: type, raw: Any) -> Any:
    """msgspec's hook for types that it does not know. Raises `ValueError`, as msgspec wants it."""
    if issubclass(kind, Never):
        raise ValueError(kind.why)  # noqa: TRY004 - what msgspec tells of
    if issubclass(kind, Spelt):
        if not isinstance(raw, str):
            raise ValueError(f"must be a text{kind.texts}")  # noqa: TRY004 - what msgspec tells of
        return kind.parse(raw)
    raise NotImplementedError(kind)


def write(value: Any) -> Any:
    """msgspec's hook for values that it does not know."""
    if isinstance(value, Spelt):
        return str(value)
    if isinstance(value, UUID):  # the driver's own kind of UUID
        return str(value)
    raise NotImplementedError(type(value))


def describe(kind: type) -> dict[str, Any]:
    """msgspec's hook for the JSON Schema of types that it does not know."""
    if issubclass(kind, Spelt):
        return dict(kind.schema)
    raise NotImplementedError(kind)

"""The one shape that every wire format decodes to. Left out: whether a reading is any good (`ingest.admit`)."""

import re
from typing import Any, Final, Protocol

import msgspec

from schemas.errors import RequestCode


class Measurement(msgspec.Struct, gc=False):
    """One reading as it was sent. Nothing is checked yet: any field may hold any JSON value."""

    type: Any
    value: Any
    label: Any = None
    unit: Any = None
    ts: Any = None


class Malformed(msgspec.Struct, gc=False):
    """Something that stands where a measurement should, and the code and message it is refused with."""

    code: str
    message: str
    payload: Any = None


class Submission(msgspec.Struct, gc=False):
    """What one device sent at once: `device` and `ts` hold for measurements that name none of their own."""

    measurements: list[Any]
    """Of `Measurement` and `Malformed`, in the order of the body."""
    device: Any = None
    ts: Any = None


class BadNumber(msgspec.Struct, frozen=True, gc=False):
    """A JSON number that no float64 holds (NaN, 1e400, 400 digits): refused by itself, as `not_finite`."""

    text: str


_PLACEHOLDERS: Final = ("${", "{{", "%{")
_PLACEHOLDER: Final = re.compile(r"\$\{[^{}]*\}|\{\{[^{}]*\}\}|%\{[^{}]*\}")


def is_unexpanded(text: str) -> bool:
    """Whether a device sent a template's placeholder (`${ev.tC}`) in place of what it stands for."""
    return text.startswith(_PLACEHOLDERS) or ("{" in text and _PLACEHOLDER.search(text) is not None)


def storable(text: str) -> bool:
    """Whether the log and the database can hold it: no NUL, no lone surrogate."""
    if "\0" in text:
        return False
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


class Said(Protocol):
    """What is known of a message beside its payload: what its topic says, and its site."""

    @property
    def words(self) -> tuple[str, ...]:
        """Of the topic, behind the device: which component, and what of it."""
        ...

    @property
    def zone(self) -> str:
        """The time zone of the site, for times that tell none."""
        ...

    @property
    def temperature_unit(self) -> str:
        """Of temperatures that tell none: °C or °F."""
        ...


class BodyError(ValueError):
    """The body as a whole cannot be decoded: `code` is the request's error code."""

    def __init__(self, code: RequestCode, message: str) -> None:
        super().__init__(message)
        self.code = code

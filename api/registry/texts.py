"""What people and machines may call things: the rules of each kind of name. Left out: which thing has which."""

import re
import secrets
import unicodedata
import zoneinfo
from collections.abc import Mapping
from typing import Any, ClassVar, Final, Self

from api.http.spelt import Spelt
from runtime.characters import BLANK, DEPENDENT, HIDDEN, HIDDEN_IN_LINES, MISPLACED, first_hidden
from schemas.device_ids import DEVICE_ID, device_id_of

_ENDING_ALPHABET: Final = "abcdefghijklmnopqrstuvwxyz0123456789"
#: Two thousand million of them: nobody guesses which are taken.
_ENDING_CHARACTERS: Final = 6
SLUG_CHARACTERS_MAX: Final = 63
HOST_CHARACTERS_MAX: Final = 253


class Text(Spelt):
    """A text that fits its kind's pattern."""

    __slots__ = ("value",)
    pattern: ClassVar["re.Pattern[str]"]
    characters_max: ClassVar[int]
    wanted: ClassVar[str]
    """What it looks like, for who sent another."""
    lines: ClassVar[bool]
    """Whether it may have more than one."""

    def __init__(self, value: str) -> None:
        self.value = value

    def __init_subclass__(
        cls, *, pattern: str, most: int, wanted: str, least: int = 1, written: bool = False, lines: bool = False
    ) -> None:
        """`written`: by a person, in any script, with characters that are good in some places only."""
        cls.pattern = re.compile(pattern)
        cls.characters_max = most
        cls.wanted = wanted
        cls.lines = lines
        cls.schema = {"type": "string", "minLength": least, "maxLength": most, "pattern": f"^{pattern}$"}
        if written:
            cls.schema = {**cls.schema, "not": {"pattern": MISPLACED}}

    @classmethod
    def parse(cls, text: str) -> Self:
        if hidden := first_hidden(text, lines=cls.lines):
            # Who sent it does not see it, least of all in what was pasted.
            raise ValueError(f"holds {hidden}, which nobody sees there: it {cls.wanted}")
        if len(text) > cls.characters_max or not cls.pattern.fullmatch(text):
            raise ValueError(cls.wanted)
        return cls(text)

    def __str__(self) -> str:
        return self.value


_MAILBOX: Final = rf"[^@<>,;:\"\\{BLANK}{HIDDEN}{DEPENDENT}]+"
_LABEL: Final = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"


def _seen(hidden: str, blank: str) -> str:
    """At least one character that is no blank, and none of those that are good nowhere."""
    return rf"[^{hidden}]*[^{blank}{hidden}{DEPENDENT}][^{hidden}]*"


_LINE: Final = _seen(HIDDEN, BLANK)


def _line_of(most: int) -> str:
    """What a text with the pattern of a line must be."""
    return f"must have 1 to {most} characters in one line, not all of them blank and none hidden"


class Name(Text, pattern=_LINE, written=True, most=200, wanted=_line_of(200)):
    """What a person calls something, in any script."""


class PlantName(Text, pattern=_LINE, written=True, most=100, wanted=_line_of(100)):
    """What a plant is called."""


class SerialNumber(Text, pattern=_LINE, written=True, most=50, wanted=_line_of(50)):
    """What stands on a plant's plate."""


class PlantText(Text, pattern=_LINE, written=True, most=120, wanted=_line_of(120)):
    """What another system calls a plant, or a word that plants are told apart by."""


class Email(
    Text,
    # Roughly: only a mail that arrives can tell whether there is such a mailbox.
    pattern=rf"{_MAILBOX}@{_MAILBOX}",
    most=254,
    wanted="must be an e-mail address",
):
    """Where a person gets mail."""


class PostalAddress(
    Text,
    pattern=_seen(HIDDEN_IN_LINES, rf"\n{BLANK}"),
    written=True,
    lines=True,
    most=500,
    wanted="must have 1 to 500 characters, not all of them blank and none hidden",
):
    """Where something is, as a person writes it."""


class Reason(
    Text,
    pattern=_seen(HIDDEN_IN_LINES, rf"\n{BLANK}"),
    written=True,
    lines=True,
    most=1_000,
    wanted="must be a text of 1 to 1000 characters that says why, none of them hidden",
):
    """Why somebody does something that is not undone."""


class Notes(
    Text,
    pattern=rf"[^{HIDDEN_IN_LINES}]*",
    written=True,
    lines=True,
    least=0,
    most=4_000,
    wanted="must have up to 4,000 characters, none of them hidden",
):
    """What a person wants to remember of something."""


class GroupDescription(
    Text,
    pattern=rf"[^{HIDDEN_IN_LINES}]*",
    written=True,
    lines=True,
    least=0,
    most=1_000,
    wanted="must have up to 1,000 characters, none of them hidden",
):
    """What a group is, for whoever meets it."""


class CommandTarget(
    Text,
    pattern=r"[A-Z0-9_-]+",
    most=32,
    wanted="must have 1 to 32 capital ASCII letters, digits, hyphens and underscores",
):
    """What a plant calls a device behind it (`externalId`)."""


class SignalName(
    Text,
    pattern=r"[a-z][a-z0-9_.]*",
    most=64,
    wanted="must have 1 to 64 small ASCII letters, digits, dots and underscores, the first a letter",
):
    """The metric that a signal is read as."""


class SignalField(
    Text,
    pattern=r"[A-Za-z0-9_.-]+",
    most=64,
    wanted="must have 1 to 64 ASCII letters, digits, dots, hyphens and underscores",
):
    """What a device calls one of its values."""


class SignalUnit(
    Text, pattern=rf"[^{HIDDEN}]+", written=True, most=16, wanted="must have 1 to 16 characters, none hidden"
):
    """The unit that a device means."""


class LocalId(
    Text,
    pattern=r"[A-Za-z0-9][A-Za-z0-9._:-]*",
    most=64,
    wanted="must have 1 to 64 ASCII letters, digits, dots, colons, hyphens and underscores, and begin with a letter "
    "or digit",
):
    """What a device is called at its site: it stands in URLs, headers and topics, where its id may stand as well."""

    @classmethod
    def parse(cls, text: str) -> Self:
        if device_id_of(text) is not None:
            raise ValueError("must not be spelt like the id of a device: a UUID, or `dev_` and its digits")
        return super().parse(text)


LocalId.schema = {**LocalId.schema, "not": {"pattern": f"^{DEVICE_ID}$"}}


class HardwareId(
    Text, pattern=r"[!-~]+", most=200, wanted="must have 1 to 200 printable ASCII characters and no blanks"
):
    """What a machine says it is: the same for as long as it is the same machine."""


class Version(Text, pattern=r"[!-~]+", most=64, wanted="must have 1 to 64 printable ASCII characters and no blanks"):
    """Of the software that a machine runs."""


class EdgeId(
    Text,
    pattern=r"[A-Za-z0-9][A-Za-z0-9._-]*",
    most=64,
    wanted="must have 1 to 64 ASCII letters, digits, dots, hyphens and underscores, and begin with a letter or digit",
):
    """What an edge device is called at its site."""


class HostName(
    Text,
    pattern=rf"{_LABEL}(?:\.{_LABEL})*",
    most=HOST_CHARACTERS_MAX,
    wanted="must be a host name: labels of ASCII letters, digits and hyphens with dots between, up to 253 characters",
):
    """The name of a machine in its network, or its IPv4 address."""


class Slug(
    Text,
    # Two hyphens after two letters begin an encoded name (xn--…), which browsers show as letters that look alike.
    pattern=r"(?!..--)[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?",
    most=SLUG_CHARACTERS_MAX,
    wanted="must have 1 to 63 lower-case ASCII letters, digits and hyphens, begin and end with a letter or digit, "
    "and have no two hyphens in its third and fourth place",
):
    """A short name for addresses: one label of a host name."""

    @classmethod
    def of(cls, name: str) -> "Slug":
        """Made from a name, as far as that has letters or digits of ASCII."""
        plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
        slug = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:SLUG_CHARACTERS_MAX].strip("-")
        return cls(slug) if slug else cls("site").ended()

    def ended(self) -> "Slug":
        """With a short random ending."""
        ending = "".join(secrets.choice(_ENDING_ALPHABET) for _ in range(_ENDING_CHARACTERS))
        return Slug(f"{self.value[: SLUG_CHARACTERS_MAX - 1 - _ENDING_CHARACTERS].rstrip('-')}-{ending}")


#: Those that this machine knows, but for what stands for none in particular.
ZONES: Final = frozenset(zoneinfo.available_timezones() - {"localtime", "Factory"} | {"UTC"})


class Zone(Spelt):
    """A time zone of the IANA database, spelt as it is there."""

    __slots__ = ("value",)
    schema: ClassVar[Mapping[str, Any]] = {"type": "string", "enum": sorted(ZONES)}

    def __init__(self, value: str) -> None:
        self.value = value

    @classmethod
    def parse(cls, text: str) -> Self:
        if text not in ZONES:
            raise ValueError("is no time zone of the IANA database, such as Australia/Sydney")
        return cls(text)

    def __str__(self) -> str:
        return self.value

"""Plants as ingest knows them: what their messages are signed with, and the templates that these are read by.

Read with the grants of their devices (`credentials`), and remembered as long. Left out: what a message holds, and
whether it may be older (`ingest.mqtt.snapshots`).
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple
from uuid import UUID

import msgspec

from runtime.secrets import BadSealError, Seal
from schemas.catalogue import Conversion
from schemas.plants import AuthMethod
from schemas.signing import is_signed

_log = logging.getLogger("sluice.plants")

#: Of the organisations' own, parsed; what is not kept is read again with its plant.
_TEMPLATES_MAX: Final = 2_000

# All that plants of these organisations may be read by: what is theirs, and the newest of each type for the devices
# behind them.
TEMPLATES: Final = """
SELECT template_id, NULL AS organisation_id, level, type, signals::text AS signals FROM system_templates
UNION ALL
SELECT template_id, organisation_id, level, type, signals::text FROM templates WHERE template_id = ANY ($1::uuid[])
UNION ALL
SELECT t.template_id, t.organisation_id, t.level, t.type, t.signals::text
FROM (SELECT DISTINCT ON (organisation_id, type) template_id FROM templates
      WHERE level = 'DEVICE' AND organisation_id = ANY ($2::uuid[])
      ORDER BY organisation_id, type, template_id DESC) newest
JOIN templates t USING (template_id)
"""


class _Signal(msgspec.Struct, gc=False):
    """As it stands in a template."""

    name: str
    bit: int | None = None
    field: str | None = None
    unit: str | None = None
    scale: float = 1.0


_signals: Final = msgspec.json.Decoder(list[_Signal])


class Bit(NamedTuple):
    """What a bit of a mask says."""

    mask: int
    name: str
    unit: str | None


class Field(NamedTuple):
    """What a value is read as."""

    name: str
    unit: str | None
    scale: Conversion | None


class Template:
    """How what a device sends is read: bits of its mask, and fields of its values."""

    __slots__ = ("bits", "fields", "type")

    def __init__(self, kind: str, signals: bytes) -> None:
        self.type = kind
        self.bits: list[Bit] = []
        self.fields: dict[str, list[Field]] = {}
        for one in _signals.decode(signals):
            if one.bit is not None:
                self.bits.append(Bit(1 << one.bit, one.name, one.unit))
            elif one.field is not None:
                scale = None if one.scale == 1.0 else Conversion(times=one.scale)
                self.fields.setdefault(one.field, []).append(Field(one.name, one.unit, scale))


class _Key(NamedTuple):
    secret: bytes
    until_us: float
    """Microseconds since 1970; infinite for the one that is not followed by another yet."""


class Plant:
    """One plant. Its secrets are in no representation of it."""

    __slots__ = ("_keys", "is_readable", "must_sign", "name", "templates")

    def __init__(
        self,
        name: str,
        keys: Sequence[_Key],
        templates: Mapping[str, Template],
        *,
        must_sign: bool,
        is_readable: bool = True,
    ) -> None:
        self.name = name
        """Its id with hyphens, as it signs it."""
        self._keys = keys
        self.templates = templates
        """By type of device: how each is read."""
        self.must_sign = must_sign
        self.is_readable = is_readable
        """Whether its secrets could be opened: otherwise nothing can be said of a signature."""

    def signed(self, given: str, parts: Sequence[str | bytes], now_us: int) -> bool:
        """Whether this is its signature of the parts, by any secret that is good now."""
        return any(is_signed(key.secret, given, *parts) for key in self._keys if now_us < key.until_us)


class Plants:
    """Makes plants of rows. Templates that are equal are one object: plants are many, and have much in common."""

    def __init__(self, seal: Seal) -> None:
        self._seal = seal
        self._parsed: dict[UUID, Template] = {}
        self._merged: dict[tuple[UUID, ...], Mapping[str, Template]] = {}
        self._told = False

    def reader(self, templates: Iterable[Any]) -> Callable[[Any], Plant]:
        """Makes plants of rows that were read along with these templates."""
        rows = {row["template_id"]: row for row in templates}
        newest: dict[UUID | None, dict[str, UUID]] = {}
        for identifier, row in rows.items():
            if row["level"] == "DEVICE":
                of_owner = newest.setdefault(row["organisation_id"], {})
                of_owner[row["type"]] = max(identifier, of_owner.get(row["type"], identifier))

        def make(row: Any) -> Plant:
            known = newest.get(None, {}) | newest.get(row["organisation_id"], {})
            own = rows.get(row["plant_template"])
            if own is not None:
                known = known | {own["type"]: own["template_id"]}
            return self._plant(row, self._templates(known.values(), rows))

        return make

    def _plant(self, row: Any, templates: Mapping[str, Template]) -> Plant:
        must_sign = row["auth_method"] != AuthMethod.MTLS
        name = str(row["device_id"])
        try:
            keys = [_Key(self._seal.open(row["secret"]), float("inf"))] if row["secret"] else []
            if row["former_secret"] and row["former_until_us"] is not None:
                keys.append(_Key(self._seal.open(row["former_secret"]), row["former_until_us"]))
        except BadSealError:
            if not self._told:
                self._told = True
                _log.error(
                    "secrets of plants cannot be opened: a key of theirs is missing, rotate those plants' secrets",
                    extra={"setting": "SLUICE_SECRET_KEYS"},
                )
            return Plant(name, (), templates, must_sign=must_sign, is_readable=False)
        return Plant(name, keys, templates, must_sign=must_sign)

    def _templates(self, wanted: Iterable[UUID], rows: Mapping[UUID, Any]) -> Mapping[str, Template]:
        """Nothing of a template changes once it is made, so one that was parsed stays good."""
        key = tuple(sorted(wanted))
        found = self._merged.get(key)
        if found is None:
            if len(self._merged) >= _TEMPLATES_MAX or len(self._parsed) >= _TEMPLATES_MAX:
                self._merged.clear()
                self._parsed.clear()
            parsed = [self._parse(rows[identifier]) for identifier in key]
            found = self._merged[key] = {template.type: template for template in parsed}
        return found

    def _parse(self, row: Any) -> Template:
        found = self._parsed.get(row["template_id"])
        if found is None:
            found = self._parsed[row["template_id"]] = Template(row["type"], row["signals"].encode())
        return found

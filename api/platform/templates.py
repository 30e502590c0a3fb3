"""Templates of what plants and the devices behind them send, as operations.

Left out: what is asked of the database (`api.registry.templates`), and decoding by them.
"""

from datetime import datetime
from typing import Annotated, Any, Final, Literal
from uuid import UUID

import msgspec

from api.access.scopes import DEVICES_READ, DEVICES_WRITE
from api.faces import PLATFORM
from api.http.lists import Cursors, CursorText, Limit, cut
from api.http.operations import Call, Nothing, Role, needs, operation
from api.http.problems import INVALID as _INVALID
from api.http.problems import Detail, Problem
from api.problems import TEMPLATE_LIMIT, TEMPLATE_NAME_TAKEN, TEMPLATE_NOT_FOUND
from api.registry import templates
from api.registry.templates import NewTemplate
from api.registry.texts import Name, SignalField, SignalName, SignalUnit
from runtime.secrets import KeyRing, Seal

PATH: Final = "/api/v1/device-templates"
_READS: Final = needs(Role.VIEWER, DEVICES_READ)
_CHANGES: Final = needs(Role.MEMBER, DEVICES_WRITE)

Level = Literal["PLANT", "DEVICE"]
Type = Literal["CABINET", "METER", "INVERTER", "BATTERY"]
_Bit = Annotated[int, msgspec.Meta(ge=0, le=31)]
_Scale = Annotated[float, msgspec.Meta(ge=-1e9, le=1e9)]


class One(msgspec.Struct):
    """Which template."""

    id: UUID


class Listed(msgspec.Struct, kw_only=True):
    """Which templates."""

    level: Level | None = None
    limit: Limit = 50
    cursor: CursorText | None = None


class Signal(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """One metric: a bit of the raw mask, or a field of the values, times `scale`."""

    name: SignalName
    bit: _Bit | msgspec.UnsetType = msgspec.UNSET
    field: SignalField | msgspec.UnsetType = msgspec.UNSET
    unit: SignalUnit | msgspec.UnsetType = msgspec.UNSET
    scale: _Scale = 1.0

    def __post_init__(self) -> None:
        if (self.bit is msgspec.UNSET) == (self.field is msgspec.UNSET):
            message = "names either a bit or a field"
            raise Problem(_INVALID, f"{self.name}: {message}", details=[Detail("bit", message)])


#: Of a struct msgspec describes each field alone.
_EITHER: Final = {"oneOf": [{"required": ["bit"]}, {"required": ["field"]}]}
_Signals = Annotated[list[Annotated[Signal, msgspec.Meta(extra_json_schema=_EITHER)]], msgspec.Meta(max_length=200)]


class TemplateToCreate(msgspec.Struct, forbid_unknown_fields=True):
    """A template to be."""

    name: Name
    level: Level
    type: Type
    signals: _Signals = []
    actions: _Signals = []


class Template(msgspec.Struct, rename="camel"):
    """How something is read: the system's, which all may use, or the organisation's own."""

    id: UUID
    is_system: bool
    level: Level
    name: str
    type: str
    signals: list[dict[str, Any]]
    actions: list[dict[str, Any]]
    version: int
    created_at: datetime
    updated_at: datetime


class Templates(msgspec.Struct):
    """A page of templates, the system's first."""

    data: list[Template]
    next_cursor: str | None


class TemplateOperations:
    """`/api/v1/device-templates`."""

    def __init__(self, ring: KeyRing) -> None:
        self._cursors: Cursors[UUID] = Cursors(Seal(ring, "templates cursor"), UUID)

    @operation(PLATFORM, "GET", PATH, _READS)
    async def device_templates(self, call: Call[Nothing, Listed, Nothing]) -> Templates:
        """List the templates that plants and devices are read by"""
        query = call.query
        mark = (str(call.organisation), "templates", query.level)
        after = self._cursors.take(mark, query.cursor)
        rows, more = cut(await templates.find(call.connection, query.level, after, query.limit + 1), query.limit)
        data = [_shown(row) for row in rows]
        return Templates(data, self._cursors.give(mark, data[-1].id) if more else None)

    @operation(
        PLATFORM, "POST", PATH, _CHANGES, status=201, repeatable=True, problems=[TEMPLATE_NAME_TAKEN, TEMPLATE_LIMIT]
    )
    async def create_device_template(self, call: Call[Nothing, Nothing, TemplateToCreate]) -> Template:
        """Create a template

        A signal is a bit (0 to 31) of the raw mask that a cabinet sends, or a field of a device's values. Nothing of
        a template changes later.
        """
        body = call.body
        new = NewTemplate(body.name.value, body.level, body.type, body.signals, body.actions)
        template = await templates.create(call.connection, call.organisation, new)
        return _shown(await templates.get(call.connection, template))

    @operation(PLATFORM, "GET", f"{PATH}/{{id}}", _READS, missing=TEMPLATE_NOT_FOUND)
    async def device_template(self, call: Call[One, Nothing, Nothing]) -> Template:
        """Get a template"""
        return _shown(await templates.get(call.connection, call.path.id))


def _shown(row: Any) -> Template:
    return Template(
        UUID(int=row["template_id"].int), row["is_system"], row["level"], row["name"], row["type"],
        msgspec.Raw(row["signals"].encode()), msgspec.Raw(row["actions"].encode()), row["version"],  # type: ignore[arg-type]
        row["created_at"], row["updated_at"],
    )  # fmt: skip

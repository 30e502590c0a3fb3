"""Templates: how what a plant, or a device behind it, sends in raw form is to be read. Left out: reading it.

Those of the system stand beside an organisation's own. Nothing of one changes: whoever wants another makes it.
"""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple
from uuid import UUID

import asyncpg
import msgspec

from api.http.problems import Problem
from api.problems import TEMPLATE_LIMIT, TEMPLATE_NAME_TAKEN, TEMPLATE_NOT_FOUND
from api.registry import audit
from api.registry.organisations import lock
from runtime.ids import uuid7

#: Of one organisation.
TEMPLATES_MAX: Final = 1_000
FIRST: Final = UUID(int=0)

_COLUMNS: Final = """
template_id, is_system, name, level, type, signals::text AS signals, actions::text AS actions, version, created_at,
updated_at"""
_PAGE: Final = f"""
SELECT {_COLUMNS} FROM known_templates WHERE template_id > $1 AND ($2::text IS NULL OR level = $2)
ORDER BY template_id LIMIT $3
"""  # noqa: S608
_ONE: Final = f"SELECT {_COLUMNS} FROM known_templates WHERE template_id = $1"  # noqa: S608
_NUMBER: Final = "SELECT count(*) FROM templates WHERE organisation_id = $1"
_INSERT: Final = """
INSERT INTO templates (template_id, organisation_id, name, level, type, signals, actions)
VALUES ($1, $2, $3, $4, $5, $6::text::jsonb, $7::text::jsonb)
"""


class NewTemplate(NamedTuple):
    """What a template is made of; signals and actions are JSON objects."""

    name: str
    level: str
    type: str
    signals: Sequence[Any]
    actions: Sequence[Any]


async def create(connection: Any, organisation: UUID, new: NewTemplate) -> UUID:
    """Raises the problems of a name that is taken, and of too many."""
    await lock(connection, organisation)
    if await connection.fetchval(_NUMBER, organisation) >= TEMPLATES_MAX:
        raise Problem(TEMPLATE_LIMIT, f"an organisation has up to {TEMPLATES_MAX} templates")
    template = uuid7()
    lists = (msgspec.json.encode(part, enc_hook=str).decode() for part in (new.signals, new.actions))
    try:
        await connection.execute(_INSERT, template, organisation, new.name, new.level, new.type, *lists)
    except asyncpg.UniqueViolationError:
        raise Problem(TEMPLATE_NAME_TAKEN) from None
    await audit.record(connection, "device_template.created", template, name=new.name, level=new.level, type=new.type)
    return template


async def find(connection: Any, level: str | None, after: UUID | None, limit: int) -> list[Any]:
    """Up to `limit` templates by id, after that one: the system's come first."""
    rows: list[Any] = await connection.fetch(_PAGE, after or FIRST, level, limit)
    return rows


async def get(connection: Any, template: UUID) -> Any:
    """Raises the problem of a template that is not there."""
    row = await connection.fetchrow(_ONE, template)
    if row is None:
        raise Problem(TEMPLATE_NOT_FOUND)
    return row

"""What `sluice quarantine …` does: an operator's way to what the API does for a key of one organisation.

It acts for the organisation that it is told, or that the row belongs to; records that nobody can read belong to none
and are reached from here alone. Left out: the options (`deploy.commands`).
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final
from uuid import UUID

import click
import orjson

from api import quarantine
from api.http.problems import Problem
from api.platform.quarantine import as_json, shown, summed_up
from api.quarantine import Filter
from api.registry.organisations import acting_for
from api.settings import ApiSettings
from deploy.database import check_up_to_date
from deploy.operating import login
from deploy.operator import LOOKUP_ROLE
from deploy.printing import say
from deploy.settings import DeploySettings
from runtime.errors import ConfigurationError
from runtime.settings import Settings

#: Sees rows without an organisation and may discard them.
UNREADABLE_ROLE: Final = "sluice_worker"
STEP_ROWS: Final = 1_000

_OWNER: Final = "SELECT organisation_id FROM quarantine WHERE quarantine_id = $1"
_ORGANISATIONS: Final = "SELECT organisation_id FROM organisations ORDER BY organisation_id LIMIT 2"
_UNREADABLE: Final = """
SELECT quarantine_id, device_id, state, code, message, request_id, received_at, quarantined_at, changed_at,
       attempts, note, octet_length(payload) AS payload_bytes, payload
FROM quarantine WHERE organisation_id IS NULL AND ($1::uuid IS NULL OR quarantine_id = $1)
  AND ($2::text IS NULL OR state = $2)
ORDER BY quarantined_at DESC LIMIT $3
"""
_DISCARD_UNREADABLE: Final = """
SELECT leave_quarantine(ARRAY(
    SELECT quarantine_id FROM quarantine
    WHERE organisation_id IS NULL AND state = 'held' AND ($1::uuid IS NULL OR quarantine_id = $1)
    ORDER BY quarantined_at LIMIT $2 FOR UPDATE SKIP LOCKED), 'discarded', $3)
"""


class Desk:
    """An operator's session with the quarantine, and how its answers are printed."""

    def __init__(self, connection: Any, *, json: bool) -> None:
        self._connection = connection
        self._json = json

    # ------------------------------------------------------------ commands

    async def list(self, organisation: UUID | None, wanted: Filter, state: str | None, limit: int) -> None:
        async with acting_for(self._connection, await self._organisation(organisation)):
            page = await quarantine.find(self._connection, wanted, state, limit)
        self._print_rows(page.rows, more=page.end is not None)

    async def list_unreadable(self, state: str | None, limit: int) -> None:
        async with self._as(UNREADABLE_ROLE):
            rows = await self._connection.fetch(_UNREADABLE, None, state, limit + 1)
        self._print_rows(rows[:limit], more=len(rows) > limit)

    async def show(self, quarantine_id: UUID) -> None:
        organisation = await self._owner(quarantine_id)
        if organisation is None:
            async with self._as(UNREADABLE_ROLE):
                row = await self._connection.fetchrow(_UNREADABLE, quarantine_id, None, 1)
        else:
            async with acting_for(self._connection, organisation):
                row = await quarantine.get(self._connection, quarantine_id)
        self._print_row(row)

    async def summary(self, organisation: UUID | None, wanted: Filter, state: str, limit: int) -> None:
        async with acting_for(self._connection, await self._organisation(organisation)):
            rows = await quarantine.summary(self._connection, wanted, state, limit)
        if self._json:
            _print_json(summed_up(rows))
            return
        for row in rows:
            say(f"{row['rows']:>8}  {row['code']:<24} {row['device_id']}  {row['oldest']:%F %T}")
        click.echo(f"{rows[0]['total'] if rows else 0:>8}  {state}")

    async def edit(self, quarantine_id: UUID, payload: str, bytes_max: int) -> None:
        checked = quarantine.checked_payload(payload.encode(), bytes_max)
        async with self._acting_on(quarantine_id):
            self._print_row(await quarantine.edit(self._connection, quarantine_id, checked))

    async def replay(self, ids: Sequence[UUID]) -> None:
        for quarantine_id in ids:
            async with self._acting_on(quarantine_id):
                row = await quarantine.replay(self._connection, quarantine_id)
            self._print_state(row)

    async def replay_found(self, organisation: UUID | None, wanted: Filter) -> None:
        """Everything that is found when it begins, step by step."""
        owner = await self._organisation(organisation)
        left = await self._held(owner, wanted)
        requested = 0
        while left > 0:
            async with acting_for(self._connection, owner):
                count = await quarantine.replay_found(self._connection, wanted, min(left, STEP_ROWS))
            requested += count
            left = left - count if count else 0
        self._print_count("requested", requested)

    async def discard(self, ids: Sequence[UUID], note: str) -> None:
        note = quarantine.checked_note(note)
        for quarantine_id in ids:
            organisation = await self._owner(quarantine_id)
            if organisation is None:
                async with self._as(UNREADABLE_ROLE):
                    await self._connection.execute(_DISCARD_UNREADABLE, quarantine_id, 1, note)
                    row = await self._connection.fetchrow(_UNREADABLE, quarantine_id, None, 1)
            else:
                async with acting_for(self._connection, organisation):
                    row = await quarantine.discard(self._connection, quarantine_id, note)
            self._print_state(row)

    async def discard_found(self, organisation: UUID | None, wanted: Filter, note: str) -> None:
        note = quarantine.checked_note(note)
        owner = await self._organisation(organisation)
        discarded, count = 0, STEP_ROWS
        while count == STEP_ROWS:
            async with acting_for(self._connection, owner):
                count = await quarantine.discard_found(self._connection, wanted, note, STEP_ROWS)
            discarded += count
        self._print_count("discarded", discarded)

    async def discard_unreadable(self, note: str) -> None:
        note = quarantine.checked_note(note)
        discarded, count = 0, STEP_ROWS
        while count == STEP_ROWS:
            async with self._as(UNREADABLE_ROLE):
                count = await self._connection.fetchval(_DISCARD_UNREADABLE, None, STEP_ROWS, note)
            discarded += count
        self._print_count("discarded", discarded)

    # ------------------------------------------------------------ whose

    @asynccontextmanager
    async def _as(self, role: str) -> AsyncIterator[None]:
        async with self._connection.transaction():
            await self._connection.execute(f"SET LOCAL ROLE {role}")
            yield

    @asynccontextmanager
    async def _acting_on(self, quarantine_id: UUID) -> AsyncIterator[None]:
        organisation = await self._owner(quarantine_id)
        if organisation is None:
            raise ConfigurationError(f"{quarantine_id} is a record that nobody can read: it can only be discarded")
        async with acting_for(self._connection, organisation):
            yield

    async def _owner(self, quarantine_id: UUID) -> UUID | None:
        async with self._as(LOOKUP_ROLE):
            row = await self._connection.fetchrow(_OWNER, quarantine_id)
        if row is None:
            raise ConfigurationError(f"there is no row {quarantine_id} in the quarantine")
        owner: UUID | None = row["organisation_id"]
        return owner

    async def _organisation(self, organisation: UUID | None) -> UUID:
        """The one that is named, or the only one there is."""
        if organisation is not None:
            return organisation
        async with self._as(LOOKUP_ROLE):
            rows = await self._connection.fetch(_ORGANISATIONS)
        if len(rows) != 1:
            raise ConfigurationError("name the organisation: --organisation ID")
        only: UUID = rows[0]["organisation_id"]
        return only

    async def _held(self, organisation: UUID, wanted: Filter) -> int:
        async with acting_for(self._connection, organisation):
            rows = await quarantine.summary(self._connection, wanted, quarantine.HELD, 1)
        return rows[0]["total"] if rows else 0

    # ------------------------------------------------------------ what is printed

    def _print_rows(self, rows: Sequence[Any], *, more: bool) -> None:
        if self._json:
            _print_json({"data": [shown(row) for row in rows], "more": more})
            return
        for row in rows:
            say(_line(row))
        if more:
            click.echo("there are more: --limit, or a filter")

    def _print_row(self, row: Any) -> None:
        found = shown(row)
        if self._json:
            _print_json(found)
            return
        for name, value in found.items():
            say(f"{name:>20}  {_text(value)}")

    def _print_state(self, row: Any) -> None:
        if self._json:
            _print_json(shown(row))
        else:
            click.echo(f"{row['quarantine_id']} {row['state']}")

    def _print_count(self, what: str, count: int) -> None:
        if self._json:
            _print_json({what: count})
        else:
            click.echo(f"{what}: {count}")


@asynccontextmanager
async def open_desk(settings: Settings) -> AsyncIterator[Desk]:
    """Raises `ConfigurationError`, also for what the API would answer with an error; `UnavailableError`."""
    await check_up_to_date(settings)
    connection = await login(settings)
    try:
        yield Desk(connection, json=settings.get(DeploySettings).json)
    except Problem as error:
        raise ConfigurationError(error.message) from None
    finally:
        await connection.close()


def payload_bytes_max(settings: Settings) -> int:
    return settings.get(ApiSettings).api_quarantine_payload_bytes_max


def _line(row: Any) -> str:
    head = f"{row['quarantine_id']} {row['received_at']:%F %T} {row['state']:<9}"
    return f"{head} {row['code']:<20} {row['device_id'] or '-'}  {row['message']}"


def _text(value: object) -> str:
    if isinstance(value, orjson.Fragment):
        return orjson.dumps(value).decode()
    return "-" if value is None else str(value)


def _print_json(content: dict[str, Any]) -> None:
    click.echo(as_json(content).decode())

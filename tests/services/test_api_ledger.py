"""The books over HTTP: an organisation's own, by hour, by day and in all, page after page, and how far they go."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from schemas.ledger import COLUMNS
from tests.databases import Database
from tests.services.test_api_readings import World, tenant, world
from tests.support import run

MIDNIGHT = datetime(2026, 11, 2, tzinfo=UTC)
HOUR = timedelta(hours=1)


async def write(here: World, statement: str, *rows: tuple[Any, ...]) -> None:
    connection = await asyncpg.connect(here.database.superuser_url)
    await connection.executemany(statement, rows)
    await connection.close()


async def book(
    here: World, hour: datetime, *counts: int, partition: int = 0, organisation: UUID | None = None
) -> None:
    places = ", ".join(f"${number}" for number in range(1, 5 + len(COLUMNS)))
    await write(
        here,
        f"INSERT INTO ledger (organisation_id, hour, source, partition, {', '.join(COLUMNS)}) VALUES ({places})",
        (
            organisation or here.organisation,
            hour,
            UUID(int=1),
            partition,
            *counts,
            *[0] * (len(COLUMNS) - len(counts)),
        ),
    )


async def get(here: World, key: str = "", **query: Any) -> tuple[int, Any]:
    sent = {name.rstrip("_"): str(value) for name, value in query.items() if value is not None}
    headers = {"Authorization": f"Bearer {key or here.key}"}
    async with here.session.get(f"{here.url}/api/v1/ledger", params=sent, headers=headers) as answer:
        return answer.status, await answer.json()


def test_hours_days_and_the_total(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as here:
            other, *_ = await tenant(any_database)
            await book(here, MIDNIGHT - HOUR, 10, 10)
            await book(here, MIDNIGHT, 11, 5, 1, 2, 2, 1, 1, 1, 1)
            await book(here, MIDNIGHT, 3, 2, 1, partition=1)
            await book(here, MIDNIGHT, 99, 99, organisation=other)
            await book(here, MIDNIGHT + 2 * HOUR, 5, 4)
            status, found = await get(here)
            assert status == 200
            assert [row["start"] for row in found["data"]] == [
                "2026-11-01T23:00:00Z",
                "2026-11-02T00:00:00Z",
                "2026-11-02T02:00:00Z",
            ]
            assert found["data"][1] == {
                "start": "2026-11-02T00:00:00Z",
                **dict(zip(COLUMNS, (14, 7, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0), strict=True)),
                "in_quarantine": 1,
                "adds_up": True,
            }
            assert [row["adds_up"] for row in found["data"]] == [True, True, False]
            days = (await get(here, by="day"))[1]["data"]
            assert [(row["start"], row["received"]) for row in days] == [
                ("2026-11-01T00:00:00Z", 10),
                ("2026-11-02T00:00:00Z", 19),
            ]
            (total,) = (await get(here, by="total", to="2026-11-02T01:00:00Z"))[1]["data"]
            assert (total["received"], total["stored"], total["adds_up"]) == (24, 17, True)
            assert [row["received"] for row in (await get(here, from_="2026-11-02T01:00:00Z"))[1]["data"]] == [5]
            (nothing,) = (await get(here, by="total", from_="2030-01-01T00:00:00Z"))[1]["data"]
            assert (nothing["start"], nothing["received"], nothing["adds_up"]) == (None, 0, True)

    run(test())


def test_by_source(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as here:
            await book(here, MIDNIGHT, 10, 10)
            await book(here, MIDNIGHT + HOUR, 1, 1, partition=1)
            await write(here, "UPDATE ledger SET source = $1 WHERE partition = 1", (UUID(int=2),))
            _, found = await get(here, by="source")
            assert [(row["source"], row["received"]) for row in found["data"]] == [
                (str(UUID(int=1)), 10),
                (str(UUID(int=2)), 1),
            ]
            assert "source" not in (await get(here))[1]["data"][0]

    run(test())


def test_pages(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as here:
            for at in range(50):
                await book(here, MIDNIGHT + at * HOUR, at, at, partition=at % 3)
            for by, limit, pages in (("hour", 20, 3), ("day", 1, 3), ("day", 3, 1)):
                found, cursor, count = [], None, 0
                while True:
                    status, body = await get(here, by=by, limit=limit, cursor=cursor)
                    assert status == 200, body
                    found += body["data"]
                    cursor = body["next_cursor"]
                    count += 1
                    if cursor is None:
                        break
                assert count == pages
                assert sum(row["received"] for row in found) == sum(range(50))
                assert sorted(found, key=lambda row: row["start"]) == found

    run(test())


def test_how_far_the_books_are_complete(database: Database) -> None:
    """The partition that is furthest behind says it; one where nothing has landed says nothing."""

    async def test() -> None:
        async with world(database) as here:
            nothing: dict[str, Any] = {"data": [], "complete_through": None, "lost_records": {"log": 0, "spool": 0}}
            assert (await get(here))[1] == nothing | {"next_cursor": None}
            old, new = uuid4(), uuid4()
            await write(
                here,
                "INSERT INTO log_generations (source, engine, identity, partitions, closed_at)"
                " VALUES ($1, 'kafka', 'x', 3, $2)",
                (old, MIDNIGHT),
                (new, None),
            )
            await write(
                here,
                "INSERT INTO log_positions (source, partition, received_through) VALUES ($1, $2, $3)",
                (old, 0, MIDNIGHT - HOUR),
                (new, 0, MIDNIGHT + HOUR),
                (new, 1, MIDNIGHT + 2 * HOUR),
                (new, 2, None),
            )
            await write(here, "UPDATE log_positions SET lost = $1 WHERE partition = 1", (7,))
            await write(here, "INSERT INTO spool_losses VALUES ($1, 0, 5, 9)", (uuid4(),))
            found = (await get(here))[1]
            assert found["complete_through"] == "2026-11-02T01:00:00Z"
            assert found["lost_records"] == {"log": 7, "spool": 4}

    run(test())


@pytest.mark.parametrize(
    "query",
    [
        {"by": "month"},
        {"from_": "yesterday"},
        {"from_": "2026-11-02T01:00:00Z", "to": "2026-11-02T00:00:00Z"},
        {"limit": 0},
        {"cursor": "made up"},
        {"organisation_id": "x"},
    ],
)
def test_parameters_that_are_none(database: Database, query: dict[str, Any]) -> None:
    async def test() -> None:
        async with world(database) as here:
            status, body = await get(here, **query)
            assert (status, body["code"]) == (400, "invalid_parameter")

    run(test())


def test_a_cursor_belongs_to_its_query_and_a_key_is_needed(database: Database) -> None:
    async def test() -> None:
        async with world(database) as here:
            for at in range(3):
                await book(here, MIDNIGHT + at * HOUR, 1, 1)
            cursor = (await get(here, limit=1))[1]["next_cursor"]
            assert (await get(here, limit=2, cursor=cursor))[0] == 200
            assert (await get(here, by="day", cursor=cursor))[0] == 400
            *_, key = await tenant(database)
            assert (await get(here, key=key, cursor=cursor))[0] == 400
            assert (await get(here, key=key))[1]["data"] == []
            assert (await get(here, key="sk_live_x"))[0] == 401

    run(test())

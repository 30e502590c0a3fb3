"""Roll-ups of a range computed again on demand. Left out: who asks and what is printed (`deploy`).

Everything in the range is marked, some series and days at a time, and repaired like what came late: meanwhile answers
are computed from readings. Whoever is stopped leaves marks that the workers repair.
"""

from collections.abc import AsyncIterator
from typing import Final, NamedTuple
from uuid import UUID

from workers.rollups import sql
from workers.rollups.repairing import Repairer
from workers.rollups.session import DAY, NEVER, Session, floored

#: What is marked at once: days of one slice.
_DAYS: Final = 28


class Wanted(NamedTuple):
    """`[first, stop)`; of one series or the series of one device, of all if neither is given; those after `after`."""

    first: int
    stop: int
    series_id: int | None
    device_id: UUID | None
    after: int


class Done(NamedTuple):
    """All series up to this one have been computed again up to this time."""

    series_id: int
    until: int
    is_last_span: bool


async def rebuild(session: Session, repairer: Repairer, wanted: Wanted) -> AsyncIterator[Done]:
    """Step by step. What is not computed yet needs no rebuilding. Raises what the database raises."""
    computed = (await session.connection.fetchrow(sql.STATE))["computed_through"]
    first, stop = floored(wanted.first), min(-floored(-wanted.stop), computed)
    first = max(first, floored(await _begins(session, stop), DAY))
    after = wanted.after
    while first < stop:
        chosen = await session.connection.fetch(sql.CHOSEN, after, wanted.series_id, wanted.device_id, sql.SLICE)
        if not chosen:
            return
        series = [row["series_id"] for row in chosen]
        after = series[-1]
        at = first
        while at < stop:
            until = min(stop, floored(at, DAY) + _DAYS * DAY)
            await session.connection.execute(sql.MARK, series, at, until)
            newest = (await session.connection.fetchrow(sql.WAITING))["newest"]
            if newest is not None:
                await repairer.repair(session, newest)
            yield Done(after, until, until == stop)
            at = until


async def _begins(session: Session, stop: int) -> int:
    """Where the first reading or roll-up stands; `stop` where there is none before it."""
    begins: list[int | None] = [stop, await session.connection.fetchval(sql.BEGINS)]
    for row in await session.connection.fetch(sql.SLICES, sql.SLICE):
        low = row["slice"] * sql.SLICE
        begins.append(await session.connection.fetchval(sql.NEXT, low, low + sql.SLICE, NEVER, stop))
    return min(one for one in begins if one is not None)

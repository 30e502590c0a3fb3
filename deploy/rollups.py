"""What `sluice rollups …` does and prints. Left out: its options (`deploy.commands`)."""

from datetime import UTC, datetime, timedelta
from typing import Final
from uuid import UUID

import click
import orjson
from prometheus_client import CollectorRegistry

from deploy.settings import DeploySettings
from runtime.errors import ConfigurationError
from runtime.postgres import PostgresSettings
from runtime.settings import Settings
from workers.rollups import sql
from workers.rollups.metrics import RollupsMetrics
from workers.rollups.rebuild import Wanted, rebuild
from workers.rollups.repairing import Repairer
from workers.rollups.session import DAY, LATEST, NEVER, open_session
from workers.rollups.settings import RollupsSettings

_EPOCH: Final = datetime(2000, 1, 1, tzinfo=UTC)
_CYCLE_YEARS: Final = 400
#: As many years have the same days as the 400 before them.
_CYCLE: Final = 146_097 * DAY
_MICROSECOND: Final = timedelta(microseconds=1)


async def print_status(settings: Settings) -> None:
    """`sluice rollups status`."""
    async with open_session(settings.get(PostgresSettings), RollupsMetrics(CollectorRegistry())) as session:
        state = await session.connection.fetchrow(sql.STATE)
        waiting = await session.connection.fetchrow(sql.WAITING)
        gone = await session.connection.fetchval(sql.GONE)
    dropped = None if gone is None else told(gone)
    closing, computed = (told(state[name]) for name in ("closing_through", "computed_through"))
    marks, age = waiting["marks"], waiting["age"]
    answer = {
        "closing_through": closing,
        "computed_through": computed,
        "readings_dropped_through": dropped,
        "marks": marks,
        "oldest_mark_s": age,
    }
    if settings.get(DeploySettings).json:
        click.echo(orjson.dumps(answer).decode())
        return
    click.echo(f"computed through {computed or 'nothing yet'}, closed through {closing or 'nothing yet'}")
    if dropped is not None:
        click.echo(f"readings are gone before {dropped} at the latest: see `sluice retention show`")
    oldest = "" if age is None else f", the oldest for {age:.0f} s"
    click.echo(f"{marks} marks wait for a repair{oldest}")


async def rebuild_all(
    settings: Settings, start: datetime, end: datetime, series_id: int | None, device_id: UUID | None, after: int
) -> None:
    """`sluice rollups rebuild`."""
    if end <= start:
        raise ConfigurationError("--to is not later than --from")
    postgres, metrics = settings.get(PostgresSettings), RollupsMetrics(CollectorRegistry())
    repairer = Repairer(postgres, settings.get(RollupsSettings), metrics)
    wanted = Wanted(_microseconds(start), _microseconds(end), series_id, device_id, after)
    through, json = None, settings.get(DeploySettings).json
    async with open_session(postgres, metrics) as session:
        async for done in rebuild(session, repairer, wanted):
            through = done.series_id
            if not json:
                resume = f"; resume with --after {done.series_id}" if done.is_last_span else ""
                click.echo(f"series up to {done.series_id}: rebuilt up to {told(done.until)}{resume}", err=True)
    if json:
        click.echo(orjson.dumps({"through_series": through}).decode())
    else:
        click.echo("nothing to rebuild" if through is None else f"rebuilt, up to series {through}")


def _microseconds(time: datetime) -> int:
    return (time - _EPOCH) // _MICROSECOND


def told(time: int) -> str | None:
    """A time in microseconds since 2000 as RFC 3339, None for none.

    The database knows years that Python does not: before 1 and behind 9999, they are spelt with a sign (ISO 8601).
    """
    if time in (NEVER, LATEST):
        return None
    cycles, rest = divmod(time, _CYCLE)
    moment = _EPOCH + rest * _MICROSECOND
    year = moment.year + cycles * _CYCLE_YEARS
    return (f"{year:04d}" if 0 < year < 10_000 else f"{year:+05d}") + moment.isoformat()[4:]

"""What `sluice retention …` does and prints. Left out: its options (`deploy.commands`)."""

from collections.abc import Sequence
from typing import Any, Final

import click
import orjson
from prometheus_client import CollectorRegistry

from deploy.database import check_up_to_date
from deploy.rollups import told
from deploy.settings import DeploySettings
from runtime.errors import UnavailableError
from runtime.postgres import PostgresSettings
from runtime.settings import Settings
from workers.retention import sql
from workers.retention.keeper import Retention
from workers.retention.metrics import RetentionMetrics
from workers.retention.planning import TIERS, Chunk, Share, Standing, retired, shares
from workers.retention.settings import RetentionSettings
from workers.rollups.metrics import RollupsMetrics
from workers.rollups.session import Session, open_session

#: Rows of an organisation in a chunk are counted up to so many.
_COUNT_MAX: Final = 100_000
_HORIZONS: Final = ("refused_through", "dropped_through", "deleted_through")


def _keeper(settings: Settings) -> tuple[Retention, RollupsMetrics]:
    rollups = RollupsMetrics(CollectorRegistry())
    metrics = RetentionMetrics(CollectorRegistry())
    postgres, retention = settings.get(PostgresSettings), settings.get(RetentionSettings)
    return Retention(postgres, retention, metrics, rollups), rollups


async def print_retention(settings: Settings) -> None:
    """`sluice retention show`."""
    await check_up_to_date(settings)
    keeper, rollups = _keeper(settings)
    async with open_session(settings.get(PostgresSettings), rollups) as session:
        standing = await keeper.look(session.connection)
    answer: dict[str, Any] = {
        "tiers": [_tier(standing, tier) for tier in TIERS],
        "commands_days": settings.get(RetentionSettings).retention_commands_days,
        "organisations": _organisations(standing),
    }
    if settings.get(DeploySettings).json:
        click.echo(orjson.dumps(answer).decode())
        return
    for tier in answer["tiers"]:
        click.echo(
            "{tier}: {chunks} chunks, {bytes} bytes, from {first}; {retired} of them beyond retention".format(**tier)
        )
    click.echo(f"commands that are over: {_days(answer['commands_days'])}")
    for one in answer["organisations"]:
        kept = ", ".join(f"{tier} {_kept(one['tiers'][tier])}" for tier in TIERS)
        click.echo(f"organisation {one['organisation_id']}: {kept}")


async def run_retention(settings: Settings, *, is_dry: bool) -> None:
    """`sluice retention run`. Raises `UnavailableError` while a worker is at it."""
    await check_up_to_date(settings)
    keeper, rollups = _keeper(settings)
    async with open_session(settings.get(PostgresSettings), rollups) as session:
        if is_dry:
            answer = await _foretold(keeper, session, settings.get(RetentionSettings))
        elif await session.connection.fetchval(sql.LEAD):
            went = await keeper.follow(session)
            rows = [_rows(share, count) for share, count in went.rows.items()]
            chunks, commands = list(map(_chunk, went.chunks)), _commands(went.commands)
            answer = {"dry_run": False, "chunks": chunks, "rows": rows, "commands": commands, "waits": keeper.doing}
        else:
            raise UnavailableError("a worker is at it: try again in a while")
    if settings.get(DeploySettings).json:
        click.echo(orjson.dumps(answer).decode())
    else:
        _say(answer)


async def _foretold(keeper: Retention, session: Session, settings: RetentionSettings) -> dict[str, Any]:
    """What a pass would let go, once it is computed."""
    standing = await keeper.look(session.connection)
    chunks = retired(standing)
    computed = await session.connection.fetchval(sql.COMPUTED)
    late = sum(one.stop > computed for one in chunks)
    waits = f"{late} chunks wait until their roll-ups are computed" if late else None
    rows = []
    for share in shares(standing):
        organisation, chunk = share
        count = await session.connection.fetchval(
            sql.COUNT[chunk.relation], organisation, chunk.first, chunk.stop, _COUNT_MAX
        )
        if count:
            rows.append(_rows(share, count, is_exact=count < _COUNT_MAX))
    days, count = settings.retention_commands_days, 0
    if days:
        count = await session.connection.fetchval(sql.COUNT_COMMANDS, days, _COUNT_MAX)
    commands = _commands(count, is_exact=count < _COUNT_MAX)
    found = list(map(_chunk, chunks))
    return {"dry_run": True, "chunks": found, "rows": rows, "commands": commands, "waits": waits}


def _say(answer: dict[str, Any]) -> None:
    verb = "would go" if answer["dry_run"] else "went"
    for one in answer["chunks"]:
        click.echo("{tier}: {chunk} {verb}, {first} to {stop}, {bytes} bytes".format(verb=verb, **one))
    for one in answer["rows"]:
        most = "" if one["is_exact"] else " or more"
        click.echo(
            "{tier}: {rows} rows{most} of organisation {organisation_id} {verb} from {chunk}".format(
                most=most, verb=verb, **one
            )
        )
    commands = answer["commands"]
    if commands["rows"]:
        most = "" if commands["is_exact"] else " or more"
        click.echo(f"{commands['rows']} commands{most} that are over {verb}")
    if not (answer["chunks"] or answer["rows"] or commands["rows"]):
        click.echo(f"nothing {verb}")
    if answer["waits"]:
        click.echo(answer["waits"])


def _chunk(one: Chunk) -> dict[str, Any]:
    first, stop = told(one.first), told(one.stop)
    return {"tier": one.tier, "chunk": one.name, "first": first, "stop": stop, "bytes": one.bytes}


def _commands(count: int, *, is_exact: bool = True) -> dict[str, Any]:
    return {"rows": count, "is_exact": is_exact}


def _rows(share: Share, count: int, *, is_exact: bool = True) -> dict[str, Any]:
    return {"organisation_id": str(share.organisation), **_chunk(share.chunk), "rows": count, "is_exact": is_exact}


def _tier(standing: Standing, tier: str) -> dict[str, Any]:
    chunks = [one for one in standing.chunks if one.tier == tier]
    gone: Sequence[Chunk] = [one for one in retired(standing) if one.tier == tier]
    first = told(min(one.first for one in chunks)) if chunks else None
    size = sum(one.bytes for one in chunks)
    return {"tier": tier, "chunks": len(chunks), "bytes": size, "first": first, "retired": len(gone)}


def _organisations(standing: Standing) -> list[dict[str, Any]]:
    found = []
    for organisation, days in standing.days.items():
        tiers = {}
        for tier, kept in zip(TIERS, days, strict=True):
            horizon = dict(zip(_HORIZONS, map(told, standing.horizon(organisation, tier)), strict=True))
            tiers[tier] = {"days": kept, **horizon}
        found.append({"organisation_id": str(organisation), "tiers": tiers})
    return found


def _kept(tier: dict[str, Any]) -> str:
    days = _days(tier["days"])
    return days if tier["dropped_through"] is None else f"{days} (gone before {tier['dropped_through']})"


def _days(days: int) -> str:
    return f"{days} days" if days else "for ever"

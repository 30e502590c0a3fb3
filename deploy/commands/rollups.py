"""`sluice rollups`: its options. Left out: what it does (`deploy.rollups`)."""

import asyncio
from datetime import datetime
from typing import Final
from uuid import UUID

import click

from deploy.commands.options import as_moment, json_option, load_settings
from deploy.rollups import print_status, rebuild_all

_SERIES_MAX: Final = 2**31 - 1


@click.group()
def rollups() -> None:
    """Look at the roll-ups, or compute some of them again."""


@rollups.command("status")
@json_option
def rollups_status(json: bool | None) -> None:
    """Say how far they go and what waits for a repair."""
    asyncio.run(print_status(load_settings(json=json)))


@rollups.command("rebuild")
@click.option("--from", "start", required=True, callback=as_moment, metavar="TIME", help="From this time on.")
@click.option("--to", "end", required=True, callback=as_moment, metavar="TIME", help="Before it.")
@click.option("--series", "series_id", type=click.IntRange(1, _SERIES_MAX), help="Of one series.")
@click.option("--device", "device_id", type=click.UUID, help="Of one device.")
@click.option("--after", type=click.IntRange(0, _SERIES_MAX), default=0, help="Go on after this series.")
@json_option
def rollups_rebuild(
    start: datetime, end: datetime, series_id: int | None, device_id: UUID | None, after: int, json: bool | None
) -> None:
    """Compute a range again, beside everything else. What it is stopped at, the workers finish."""
    asyncio.run(rebuild_all(load_settings(json=json), start, end, series_id, device_id, after))

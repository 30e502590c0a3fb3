"""`sluice retention`: its options. Left out: what it does (`deploy.retention`)."""

import asyncio

import click

from deploy.commands.options import json_option, load_settings
from deploy.retention import print_retention, run_retention


@click.group()
def retention() -> None:
    """Look at what is kept for how long, or let the rest go."""


@retention.command("show")
@json_option
def retention_show(json: bool | None) -> None:
    """Say how far each tier and organisation reaches back."""
    asyncio.run(print_retention(load_settings(json=json)))


@retention.command("run")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@json_option
def retention_run(dry_run: bool, json: bool | None) -> None:
    """Let go what nobody keeps any more, as the workers do every hour."""
    asyncio.run(run_retention(load_settings(json=json), is_dry=dry_run))

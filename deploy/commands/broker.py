"""`sluice broker`: its options. Left out: what it does (`deploy.broker`, `deploy.roles.broker`)."""

import asyncio
from pathlib import Path

import click

from deploy.commands.options import json_option, load_settings
from deploy.commands.roles import run_named_role


@click.group()
def broker() -> None:
    """Keep whom the MQTT broker knows as the registry says.

    Runs on the broker's host, as its user.
    """


@broker.command("keep")
@click.option("--metrics-listen", metavar="HOST:PORT", help="Where probes and metrics are served.")
def broker_keep(metrics_listen: str | None) -> None:
    """Bring every change to the broker.

    It is the one that SLUICE_BROKER_URL names. One process does it at a time; others stand by.
    """
    run_named_role("broker", None, {"metrics_listen": metrics_listen})


@broker.command("seed")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@json_option
def broker_seed(file: Path, json: bool | None) -> None:
    """Write what the broker's plugin reads at its start.

    The broker must not run: it would write over it. The list of revoked certificates (SLUICE_BROKER_CRL_FILE) is
    written beside it.
    """
    from deploy.broker import seed_broker  # noqa: PLC0415 - who keeps the broker does not need it

    asyncio.run(seed_broker(load_settings(json=json), file))

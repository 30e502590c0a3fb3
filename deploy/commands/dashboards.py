"""`sluice dashboard-user`: logins of the database with which dashboards see one organisation.

Left out: what such a login is (`deploy.dashboards`).
"""

import asyncio
from dataclasses import asdict
from uuid import UUID

import click
import orjson

from deploy import dashboards
from deploy.commands.options import F, json_option, load_settings
from deploy.database import check_up_to_date, connect_owner
from deploy.operating import login
from deploy.settings import DeploySettings
from runtime.errors import ConfigurationError
from runtime.postgres import PostgresSettings
from runtime.settings import Settings


@click.group("dashboard-user")
def dashboard_user() -> None:
    """Make or end logins of the database for dashboards."""


def _of_organisation(command: F) -> F:
    option = click.option("--organisation", type=click.UUID, required=True, metavar="ID", help="Whose data it sees.")
    return json_option(option(command))


@dashboard_user.command("create")
@_of_organisation
def create(organisation: UUID, json: bool | None) -> None:
    """Make an organisation's login, or give it a new password.

    The password is shown once. The login sees this organisation alone.
    """
    asyncio.run(_create(load_settings(json=json), organisation))


@dashboard_user.command("drop")
@_of_organisation
def drop(organisation: UUID, json: bool | None) -> None:
    """End an organisation's login.

    Its sessions see nothing from then on.
    """
    asyncio.run(_drop(load_settings(json=json), organisation))


async def _create(settings: Settings, organisation: UUID) -> None:
    await check_up_to_date(settings)
    owner = await connect_owner(settings.get(PostgresSettings))
    try:
        ours = await login(settings)
        try:
            made = await dashboards.create(ours, owner, organisation)
        finally:
            await ours.close()
    finally:
        await owner.close()
    if settings.get(DeploySettings).json:
        click.echo(orjson.dumps(asdict(made)).decode())
    else:
        click.echo(f"user {made.user}\npassword {made.password}\ndatabase {made.database}")


async def _drop(settings: Settings, organisation: UUID) -> None:
    owner = await connect_owner(settings.get(PostgresSettings))
    try:
        ended = await dashboards.drop(owner, organisation)
    finally:
        await owner.close()
    if not ended:
        raise ConfigurationError(f"organisation {organisation} has no login for dashboards")
    if settings.get(DeploySettings).json:
        click.echo(orjson.dumps({"dropped": dashboards.login_of(organisation)}).decode())
    else:
        click.echo(f"{dashboards.login_of(organisation)} is gone")

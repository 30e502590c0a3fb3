"""`sluice broker seed`: what the broker is to know before it starts. Left out: keeping it (`workers.broker`)."""

import json
from pathlib import Path

import click
import orjson

from api.registry.broker_passwords import broker_hash
from deploy.database import check_up_to_date
from deploy.operating import login
from deploy.printing import say
from deploy.roles.broker import current_lists, list_file, own_users
from deploy.settings import DeploySettings
from runtime.files import write_file
from runtime.settings import Settings
from workers.broker.keeper import ROLE, seeded
from workers.broker.settings import BrokerSettings


async def seed_broker(settings: Settings, file: Path) -> None:
    """Raises `ConfigurationError`, `UnavailableError`."""
    await check_up_to_date(settings)
    count = await write_seed(settings, file)
    if settings.get(DeploySettings).json:
        click.echo(orjson.dumps({"file": str(file), "clients": count}).decode())
    else:
        say(f"{count} clients: {file}; start the broker with it as its user")


async def write_seed(settings: Settings, file: Path) -> int:
    """The plugin's file, and the list of revoked certificates where the broker reads one; how many clients there are.

    Raises `ConfigurationError`, `UnavailableError`.
    """
    broker, own, lists = settings.get(BrokerSettings), own_users(settings), list_file(settings)
    hashes = {name: broker_hash(user.password) for name, user in own.items()}
    connection = await login(settings)
    try:
        await connection.execute(f"SET ROLE {ROLE}")
        content = await seeded(connection, own, hashes, broker, with_certificates=lists is not None)
    finally:
        await connection.close()
    if lists is not None:
        write_file(Path(broker.broker_crl_file), (await current_lists(settings)).pem)
    write_file(file, json.dumps(content, indent=1), secret=True)
    return len(content["clients"])

"""What the operator's commands do, and what they print. Left out: their options (`deploy.commands`)."""

import shlex
import sys
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import click
import orjson

from api.access.settings import AccessSettings
from api.platform.auth import reset_link
from api.settings import ApiSettings
from deploy import people, spool
from deploy.database import bring_up_to_date, check_up_to_date, connect_owner, migrations
from deploy.generation import Closed, Generation, follow_generation
from deploy.operator import Demo, issue_token, override_limits, seed
from deploy.settings import DeploySettings, api_url, http_address, public_url
from ingest.limits import KINDS, LimitSettings, defaults
from runtime.log import LogSettings
from runtime.migrate import exclusively, migrate
from runtime.postgres import PostgresSettings, check_role, connect
from runtime.secrets import KeyRing, SecretSettings, TokenHasher
from runtime.settings import CONFIG_VARIABLE, Settings
from runtime.sockets import parse_address


async def migrate_all(settings: Settings, *, new_generation: bool, abandon: bool) -> None:
    """`sluice migrate`."""
    closed: Closed | None = None
    if new_generation:
        connection = await connect_owner(settings.get(PostgresSettings))
        deploy = settings.get(DeploySettings)
        try:
            async with exclusively(connection):
                applied = await migrate(connection, migrations())
                closed, generation = await follow_generation(
                    connection,
                    settings.get(LogSettings),
                    deploy.log_partitions,
                    closing_url=deploy.closing_log_url,
                    abandon=abandon,
                )
        finally:
            await connection.close()
    else:
        applied, generation = await bring_up_to_date(settings)
    _print_migrated([str(migration) for migration in applied], closed, generation, settings)


def _print_migrated(applied: list[str], closed: Closed | None, generation: Generation, settings: Settings) -> None:
    if settings.get(DeploySettings).json:
        answer = {"applied": applied, "generation": asdict(generation), "closed": asdict(closed) if closed else None}
        click.echo(orjson.dumps(answer, default=str).decode())
        return
    click.echo(f"applied: {', '.join(applied)}" if applied else "the database is up to date")
    if closed is not None:
        lost = "an unknown number of records" if closed.lost is None else f"{closed.lost} records"
        click.echo(f"closed: generation {closed.generation.source} ({closed.generation.engine}), {lost} lost")
    click.echo(f"log: generation {generation.source} ({generation.engine}, {generation.partitions} partitions)")


async def login(settings: Settings) -> Any:
    """A session of the login itself, which takes the role that each step needs."""
    connection = await connect(settings.get(PostgresSettings), role=None, application="sluice operator")
    try:
        await check_role(connection)
    except BaseException:
        await connection.close()
        raise
    return connection


def _hasher(settings: Settings) -> TokenHasher:
    return TokenHasher(KeyRing.parse(settings.get(SecretSettings).secret_keys))


async def seed_demo(settings: Settings) -> None:
    """`sluice seed`."""
    hasher = _hasher(settings)
    await check_up_to_date(settings)
    connection = await login(settings)
    try:
        demo = await seed(connection, hasher)
    finally:
        await connection.close()
    print_demo(settings, demo, public_url(settings, http_address(settings)))


async def print_spools(settings: Settings) -> None:
    """`sluice spool list`."""
    connection = await login(settings)
    try:
        rows = await spool.standing(connection)
    finally:
        await connection.close()
    if settings.get(DeploySettings).json:
        click.echo(orjson.dumps(rows).decode())
        return
    for row in rows:
        lost = f", {row['lost']} lost" if row["lost"] else ""
        click.echo(f"{row['spool']}  partition {row['partition']}  landed {row['next']}{lost}  {row['updated_at']}")


async def skip_spool(settings: Settings, name: UUID, partition: int, sequence: int) -> None:
    """`sluice spool skip`."""
    connection = await login(settings)
    try:
        lost = await spool.skip(connection, name, partition, sequence)
    finally:
        await connection.close()
    if settings.get(DeploySettings).json:
        click.echo(orjson.dumps({"lost": lost}).decode())
    else:
        click.echo(f"{lost} records are counted as lost; landing goes on at {sequence} within a minute")


def print_demo(settings: Settings, demo: Demo, url: str, *, config: Path | None = None) -> None:
    """One line of JSON, or two commands to try; `config` is the file by which other commands reach the same parts.

    What is printed can be typed as it stands, where this command was.
    """
    if settings.get(DeploySettings).json:
        data_dir = str(Path(settings.get(DeploySettings).data_dir).absolute())
        known = {name: value for name, value in asdict(demo).items() if value is not None}
        known |= {} if config is None else {"config": config}
        click.echo(orjson.dumps({"url": url, **known, "data_dir": data_dir}, default=str).decode())
        return
    click.echo(
        f'curl -sS {url}/v1/ingest -H "Authorization: Bearer {demo.ingest_token or "$INGEST_TOKEN"}" '
        '-H "Content-Type: application/json" -H "Prefer: wait=stored" '
        """-d '{"measurements": [{"type": "temperature", "value": 21.5}]}'"""
    )
    click.echo(
        f'curl -sS "{url}/api/v1/readings?device_id={demo.device_id}" '
        f'-H "Authorization: Bearer {demo.api_key or "$API_KEY"}"'
    )
    click.echo(f"The organisation is {demo.organisation_id}, its device {demo.device_id}.")
    command = shlex.quote(_program())
    if config is not None:
        command = f"{CONFIG_VARIABLE}={shlex.quote(str(config))} {command}"
        click.echo(
            "Other commands reach the same parts by a file of settings. To make somebody who may do everything:\n"
            f"{command} admin create you@example.org"
        )
    if demo.ingest_token is None:
        click.echo(
            "The tokens were shown when they were made. To make others:\n"
            f"{command} token device {demo.device_id}\n{command} token api-key {demo.organisation_id}"
        )


def _program() -> str:
    """As it was called: in an environment of its own, no shell finds it by its name alone."""
    called = sys.argv[0]
    return called if Path(called).name == "sluice" else "sluice"


async def print_token(
    settings: Settings, kind: str, owner: UUID, *, name: str, scopes: list[str], expires_at: datetime | None
) -> None:
    """`sluice token device|gateway|api-key`."""
    hasher = _hasher(settings)
    await check_up_to_date(settings)
    connection = await login(settings)
    try:
        token = await issue_token(connection, hasher, kind, owner, name=name, scopes=scopes, expires_at=expires_at)
    finally:
        await connection.close()
    click.echo(orjson.dumps({"token": token}).decode() if settings.get(DeploySettings).json else token)


async def make_admin(settings: Settings, email: str, name: str, password: str) -> None:
    """`sluice admin create`."""
    await check_up_to_date(settings)
    connection = await login(settings)
    try:
        user = await people.create_admin(connection, email, name, password)
    finally:
        await connection.close()
    if settings.get(DeploySettings).json:
        click.echo(orjson.dumps({"user_id": user}).decode())
    else:
        click.echo(f"{email} may do everything from now on")


async def print_reset_link(settings: Settings, email: str) -> None:
    """`sluice admin reset-link`."""
    hasher = _hasher(settings)
    await check_up_to_date(settings)
    connection = await login(settings)
    lasts = timedelta(minutes=settings.get(AccessSettings).auth_reset_minutes)
    try:
        token = await people.make_reset(connection, hasher, email, lasts)
    finally:
        await connection.close()
    address = parse_address("SLUICE_API_LISTEN", settings.get(ApiSettings).api_listen)
    link = reset_link(api_url(settings, address), token)
    click.echo(orjson.dumps({"link": link, "token": token}).decode() if settings.get(DeploySettings).json else link)


async def print_limits(settings: Settings, what: str, owner: UUID, values: dict[str, int | None]) -> None:
    """`sluice limits show` and, with values, `set`."""
    await check_up_to_date(settings)
    connection = await login(settings)
    try:
        limits = await override_limits(connection, what, owner, values)
    finally:
        await connection.close()
    if settings.get(DeploySettings).json:
        click.echo(orjson.dumps(limits).decode())
        return
    scope = "gateway" if what == "site" else what
    for kind, default in zip(KINDS, defaults(settings.get(LimitSettings))[scope], strict=True):
        own = limits[kind.name]
        variable = f"SLUICE_LIMIT_{scope}_{kind.name}".upper()
        value, origin = (default, f"{variable} as set here") if own is None else (own, "override")
        click.echo(f"{kind.name} = {value or 'no limit'}  [{origin}]")

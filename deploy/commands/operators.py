"""`sluice migrate`, `seed`, `verify`, `token`, `admin`, `spool`, `limits`, `settings`, `version`: an operator's.

Left out: what they do.
"""

import asyncio
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from importlib.metadata import version as installed_version
from typing import Final
from uuid import UUID

import click
import orjson

from api.registry.limits import LIMITS
from deploy.auditing import verify_audit
from deploy.commands.options import F, as_moment, ask, json_option, load_settings, refuse, scope_option
from deploy.operating import (
    make_admin,
    migrate_all,
    print_limits,
    print_reset_link,
    print_spools,
    print_token,
    seed_demo,
    skip_spool,
)
from deploy.settings import DeploySettings
from deploy.verifying import verify as verify_all
from ingest.limits_table import COUNT_MAX as LIMIT_MAX
from runtime.errors import ConfigurationError, SluiceError
from runtime.secrets import KeyRing, SecretSettings, new_ring
from runtime.supervisor import EXIT_REFUSED

#: Of `sluice verify`, which says with EXIT_REFUSED that it could not tell.
EXIT_DIFFERS: Final = 1
PASSWORD_LINE_MAX: Final = 1_000


@click.command()
@click.option(
    "--new-generation", is_flag=True, help="Close the log in use and open a new one where SLUICE_LOG_URL says."
)
@click.option("--abandon", is_flag=True, help="Count what has not landed of the closed log as lost.")
@click.option("--closing-log-url", metavar="URL", help="Where the log to be closed stands, if it is another one.")
@json_option
def migrate(new_generation: bool, abandon: bool, closing_log_url: str | None, json: bool | None) -> None:
    """Bring the database to this version.

    Makes the log if there is none. May be repeated.
    """
    settings = load_settings(closing_log_url=closing_log_url, json=json)
    asyncio.run(migrate_all(settings, new_generation=new_generation, abandon=abandon))


@click.command()
@json_option
def seed(json: bool | None) -> None:
    """Make a demo organisation with a device and tokens.

    Where it is there already, its ids are printed.
    """
    asyncio.run(seed_demo(load_settings(json=json)))


@click.command()
@click.option("--since", callback=as_moment, metavar="TIME", help="Judge what was received from then on.")
@click.option("--until", callback=as_moment, metavar="TIME", help="Judge what was received before.")
@click.option("--organisation", type=click.UUID, help="Judge only what is of this organisation.")
@click.option("--rate", type=int, metavar="N", help="Readings a second at most, beside a live system; 0: no limit.")
@click.option("--audit", is_flag=True, help="Check the log of changes instead, from its first entry.")
@json_option
def verify(
    since: datetime | None,
    until: datetime | None,
    organisation: UUID | None,
    rate: int | None,
    audit: bool,
    json: bool | None,
) -> None:
    """Check that every reading of the log is accounted for.

    Reads the log again and finds every reading in the store or the quarantine, and every stored row in the log. With
    --json, each difference is a line of its own, and the summary the last one.

    Exit status: 0 when all is where it must be, 1 on any difference, 2 when that cannot be told.
    """
    try:
        settings = load_settings(verify_rate=rate, json=json)
        if audit and (since is not None or until is not None):
            raise ConfigurationError("--audit checks a chain from its first entry: it goes with --organisation alone")
        checked = (
            verify_audit(settings, organisation)
            if audit
            else verify_all(settings, since=since, until=until, organisation=organisation)
        )
        is_right = asyncio.run(checked)
    except SluiceError as error:
        refuse(error, EXIT_REFUSED)
    else:
        sys.exit(0 if is_right else EXIT_DIFFERS)


@click.group()
def token() -> None:
    """Make secret keys and tokens; each is shown once."""


@token.command("keys")
@json_option
def token_keys(json: bool | None) -> None:
    """Print a value for SLUICE_SECRET_KEYS.

    A new one, or where it is set, the present one with a newer key in front.
    """
    settings = load_settings(json=json)
    present = settings.get(SecretSettings).secret_keys
    keys = str(KeyRing.parse(present).rotated() if present else new_ring())
    click.echo(orjson.dumps({"secret_keys": keys}).decode() if settings.get(DeploySettings).json else keys)


def _token_command(kind: str, owner: str, what: str, *options: Callable[[click.Command], click.Command]) -> None:
    @token.command(kind, help=f"Make {what}.")
    @click.argument(owner, type=click.UUID)
    @click.option("--name", default="", help="To know it again by.")
    @click.option("--expires-in-days", type=click.IntRange(min=1, max=36_500), help="It ends by itself.")
    @json_option
    def make(
        name: str, expires_in_days: int | None, json: bool | None, scopes: tuple[str, ...] = (), **owners: UUID
    ) -> None:
        expires_at = None if expires_in_days is None else datetime.now(UTC) + timedelta(days=expires_in_days)
        settings = load_settings(json=json)
        asyncio.run(
            print_token(
                settings, kind, owners[owner], name=name, scopes=list(scopes) or ["owner"], expires_at=expires_at
            )
        )

    for option in options:
        option(make)


_token_command("device", "device_id", "a token with which one device sends its readings")
_token_command("gateway", "site_id", "a token with which a gateway sends for its site")
_token_command(
    "api-key",
    "organisation_id",
    "an API key, with which programs act for an organisation",
    scope_option(),
)


@click.group()
def admin() -> None:
    """Make super-admins, and links for forgotten passwords."""


@admin.command("create")
@click.argument("email")
@click.option("--name", default="Administrator", show_default=True, help="What the person is called.")
@json_option
def admin_create(email: str, name: str, json: bool | None) -> None:
    """Make a super-admin.

    Who is one may do everything in every organisation. The password is asked for, or read from standard input.
    """
    settings = load_settings(json=json)
    if sys.stdin.isatty():
        password = ask("Password", hidden=True, twice=True)
    else:
        password = sys.stdin.readline(PASSWORD_LINE_MAX).rstrip("\r\n")
    asyncio.run(make_admin(settings, email, name, password))


@admin.command("reset-link")
@click.argument("email")
@json_option
def admin_reset_link(email: str, json: bool | None) -> None:
    """Print a link with which to set a new password, once."""
    asyncio.run(print_reset_link(load_settings(json=json), email))


@click.group()
def spool() -> None:
    """Show how far spools have landed, or skip lost records."""


@spool.command("list")
@json_option
def spool_list(json: bool | None) -> None:
    """Print how far each partition has landed, newest first."""
    asyncio.run(print_spools(load_settings(json=json)))


@spool.command("skip")
@click.argument("spool_id", metavar="SPOOL", type=click.UUID)
@click.argument("partition", type=click.IntRange(min=0))
@click.argument("sequence", type=click.IntRange(min=1))
@json_option
def spool_skip(spool_id: UUID, partition: int, sequence: int, json: bool | None) -> None:
    """Go on at SEQUENCE where what is before it is lost for good.

    The records of SPOOL before it that have not landed are counted as lost.
    """
    asyncio.run(skip_spool(load_settings(json=json), spool_id, partition, sequence))


@click.group()
def limits() -> None:
    """Show or change how much may be sent.

    By a device, a site's gateways or an organisation.
    """


def _limits_of(command: F) -> F:
    for owner, whose in (("organisation", "an organisation"), ("site", "a site's gateways"), ("device", "a device")):
        command = click.option(f"--{owner}", type=click.UUID, metavar="ID", help=f"The limits of {whose}.")(command)
    return json_option(command)


def _one_owner(owners: Mapping[str, UUID | None]) -> tuple[str, UUID]:
    named = [(what, owner) for what, owner in owners.items() if owner is not None]
    if len(named) != 1:
        raise ConfigurationError("name whose limits they are, by one of --device, --site and --organisation")
    return named[0]


@limits.command("show")
@_limits_of
def limits_show(json: bool | None, **owners: UUID | None) -> None:
    """Print the limits that apply, and where they come from."""
    asyncio.run(print_limits(load_settings(json=json), *_one_owner(owners), {}))


@limits.command("set")
@click.option("--requests-per-minute", metavar="N", help="0: no limit; `default`: as the settings say.")
@click.option("--readings-per-minute", metavar="N", help="Likewise.")
@click.option("--bytes-per-day", metavar="N", help="Of bodies, unpacked, per day of UTC. Likewise.")
@_limits_of
def limits_set(
    requests_per_minute: str | None,
    readings_per_minute: str | None,
    bytes_per_day: str | None,
    json: bool | None,
    **owners: UUID | None,
) -> None:
    """Override limits; those not named stay. Running processes follow within a second."""
    values = _limits_given(requests_per_minute, readings_per_minute, bytes_per_day)
    asyncio.run(print_limits(load_settings(json=json), *_one_owner(owners), values))


def _limits_given(*texts: str | None) -> dict[str, int | None]:
    values: dict[str, int | None] = {}
    for name, text in zip(LIMITS, texts, strict=True):
        if text == "default":
            values[name] = None
        elif text is not None and text.isdecimal() and len(text) < 20 and int(text) <= LIMIT_MAX:
            values[name] = int(text)
        elif text is not None:
            option = name.replace("_", "-")
            raise ConfigurationError(f"--{option} {text!r} is neither `default` nor a number from 0 to {LIMIT_MAX}")
    if not values:
        raise ConfigurationError("name a limit to set: --requests-per-minute, --readings-per-minute, --bytes-per-day")
    return values


@click.command()
@json_option
def settings(json: bool | None) -> None:
    """List every setting: its value, origin and reason.

    Secrets are masked.
    """
    loaded = load_settings(json=json)
    if loaded.get(DeploySettings).json:
        click.echo(orjson.dumps([asdict(setting) for setting in loaded.listing]).decode())
        return
    for setting in loaded.listing:
        value = f"{setting.value} {setting.unit}".strip() or "(not set)"
        click.echo(f"{setting.variable} = {value}  [{setting.origin}]")
        click.echo(click.wrap_text(setting.why, width=100, initial_indent="    ", subsequent_indent="    "))


@click.command()
@json_option
def version(json: bool | None) -> None:
    """Print the version."""
    # Whatever the settings are: it is asked for when something is wrong with them too.
    number = installed_version("sluice")
    click.echo(orjson.dumps({"version": number}).decode() if json else number)

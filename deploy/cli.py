"""The command `sluice`: its commands and their options. Left out: what they do."""

import asyncio
import sys
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from importlib.metadata import version as installed_version
from typing import Any, Final, TextIO, TypeVar
from uuid import UUID

import click
import orjson

from api.http.spelt import parse_time
from api.quarantine import HELD, STATES, Filter
from api.registry.limits import LIMITS
from deploy.auditing import verify_audit
from deploy.commands import (
    make_admin,
    migrate_all,
    print_limits,
    print_reset_link,
    print_spools,
    print_token,
    seed_demo,
    skip_spool,
)
from deploy.quarantine import Desk, open_desk, payload_bytes_max
from deploy.remote_commands import COMMANDS
from deploy.roles import ROLES, Launch, run_role
from deploy.settings import DeploySettings, load
from deploy.up import run_up, with_port
from deploy.verifying import verify as verify_all
from ingest.limits_table import COUNT_MAX as LIMIT_MAX
from runtime.errors import ConfigurationError, SluiceError
from runtime.lifecycle import run
from runtime.logging import LoggingSettings, set_up_logging
from runtime.secrets import KeyRing, SecretSettings, new_ring
from runtime.settings import Settings
from runtime.supervisor import EXIT_REFUSED, INHERITED_OPTION, Inherited

EXIT_UNAVAILABLE: Final = 1
#: Of `sluice verify`, which says with EXIT_REFUSED that it could not tell.
EXIT_DIFFERS: Final = 1
#: More than any payload may have; read at most.
PAYLOAD_CHARACTERS_MAX: Final = 100_000
PASSWORD_LINE_MAX: Final = 1_000
F = TypeVar("F", bound=Callable[..., Any])


class Commands(click.Group):
    """Turns an error that a person can mend into one line and an exit status; loads `bench` only when asked for."""

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted([*super().list_commands(context), "bench"])

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name != "bench":
            return super().get_command(context, name)
        from bench.command import bench  # noqa: PLC0415 - no role needs it, and it is large

        return bench

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except ConfigurationError as error:
            _refuse(error, EXIT_REFUSED)
        except SluiceError as error:
            _refuse(error, EXIT_UNAVAILABLE)
        return None


def _refuse(error: Exception, status: int) -> None:
    click.echo(f"sluice: {' '.join(str(error).split())}", err=True)
    sys.exit(status)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def main() -> None:
    """Telemetry ingestion in which every acknowledged reading is accounted for.

    Every option is also a setting: `sluice settings` lists all of them.
    """


def _load(**overrides: object) -> Settings:
    """All settings, with the options given (by the names of the settings) over them, and logging as they say."""
    settings = load({name: value for name, value in overrides.items() if value is not None})
    set_up_logging(settings.get(LoggingSettings))
    return settings


def _json_option(command: F) -> F:
    return click.option("--json", "json", is_flag=True, default=None, help="Print one line of JSON.")(command)


# ---------------------------------------------------------------- roles


def _role_options(command: F) -> F:
    processes = click.option("--processes", type=int, metavar="N", help="How many processes share the work.")
    metrics = click.option("--metrics-listen", metavar="HOST:PORT", help="Where probes and metrics are served.")
    inherited = click.option(INHERITED_OPTION, hidden=True, help="For the processes that a parent starts.")
    return processes(metrics(inherited(command)))


_listen_option: Final = click.option("--listen", metavar="HOST:PORT", help="Where requests are taken.")


def _run_role(name: str, inherited: str | None, overrides: Mapping[str, object]) -> None:
    settings = _load(**overrides)
    launch = Launch(
        settings,
        ["-P", "-m", "deploy.cli", *sys.argv[1:]],
        None if inherited is None else Inherited.parse(inherited),
    )
    run(lambda stop: run_role(ROLES[name], launch, stop))


@main.command()
@_listen_option
@_role_options
def api(listen: str | None, processes: int | None, metrics_listen: str | None, inherited: str | None) -> None:
    """Answer queries over HTTP."""
    _run_role("api", inherited, {"api_listen": listen, "api_processes": processes, "metrics_listen": metrics_listen})


@main.command()
@_listen_option
@_role_options
def ingest(listen: str | None, processes: int | None, metrics_listen: str | None, inherited: str | None) -> None:
    """Take readings in over HTTP."""
    overrides = {"http_listen": listen, "http_processes": processes, "metrics_listen": metrics_listen}
    _run_role("ingest", inherited, overrides)


@main.command()
@_role_options
def worker(processes: int | None, metrics_listen: str | None, inherited: str | None) -> None:
    """Land what stands in the log in the database."""
    _run_role("worker", inherited, {"worker_processes": processes, "metrics_listen": metrics_listen})


@main.command()
@click.option("--data", "data_dir", metavar="DIR", help="Where everything is kept.")
@click.option("--port", type=click.IntRange(0, 65_535), help="Of the one address for devices and queries; 0: any.")
@click.option("--metrics-listen", metavar="HOST:PORT", help="Where probes and metrics are served.")
@_json_option
def up(data_dir: str | None, port: int | None, metrics_listen: str | None, json: bool | None) -> None:
    """Run everything in one process, on a PostgreSQL and a log of its own."""
    given = {"data_dir": data_dir, "metrics_listen": metrics_listen, "json": json}
    overrides: dict[str, object] = {name: value for name, value in given.items() if value is not None}
    if port is not None:
        overrides["http_listen"] = with_port(_load(**overrides), port)
    settings = _load(**overrides)
    run(lambda stop: run_up(settings, overrides, stop))


# ---------------------------------------------------------------- operators


@main.command()
@click.option(
    "--new-generation", is_flag=True, help="Close the log in use and open a new one where SLUICE_LOG_URL says."
)
@click.option("--abandon", is_flag=True, help="Count what has not landed of the closed log as lost.")
@click.option("--closing-log-url", metavar="URL", help="Where the log to be closed stands, if it is another one.")
@_json_option
def migrate(new_generation: bool, abandon: bool, closing_log_url: str | None, json: bool | None) -> None:
    """Bring the database to this version, and make the log if there is none. May be repeated."""
    settings = _load(closing_log_url=closing_log_url, json=json)
    asyncio.run(migrate_all(settings, new_generation=new_generation, abandon=abandon))


@main.command()
@_json_option
def seed(json: bool | None) -> None:
    """Make a demo organisation with a site, a device and tokens, unless it is there."""
    asyncio.run(seed_demo(_load(json=json)))


def _moment(context: click.Context, parameter: click.Parameter, text: str | None) -> datetime | None:
    try:
        return None if text is None else parse_time(text)
    except (ValueError, OverflowError):
        said = "neither RFC 3339 with an offset nor seconds since 1970"
        raise click.BadParameter(said, context, parameter) from None


@main.command()
@click.option("--since", callback=_moment, metavar="TIME", help="Judge what was received from then on.")
@click.option("--until", callback=_moment, metavar="TIME", help="Judge what was received before.")
@click.option("--organisation", type=click.UUID, help="Judge only what is of this organisation.")
@click.option("--rate", type=int, metavar="N", help="Readings a second at most, beside a live system; 0: no limit.")
@click.option("--audit", is_flag=True, help="Check the log of changes instead, from its first entry.")
@_json_option
def verify(
    since: datetime | None,
    until: datetime | None,
    organisation: UUID | None,
    rate: int | None,
    audit: bool,
    json: bool | None,
) -> None:
    """Read the log again and find every reading in the store or the quarantine, and every stored row in the log.

    Exit status: 0 when all is where it must be, 1 on any difference, 2 when that cannot be told.
    """
    try:
        settings = _load(verify_rate=rate, json=json)
        if audit and (since is not None or until is not None):
            raise ConfigurationError("--audit checks a chain from its first entry: it goes with --organisation alone")
        checked = (
            verify_audit(settings, organisation)
            if audit
            else verify_all(settings, since=since, until=until, organisation=organisation)
        )
        is_right = asyncio.run(checked)
    except SluiceError as error:
        _refuse(error, EXIT_REFUSED)
    else:
        sys.exit(0 if is_right else EXIT_DIFFERS)


@main.group()
def token() -> None:
    """Make secret keys and tokens; each is shown once."""


@token.command("keys")
def token_keys() -> None:
    """Print a value for SLUICE_SECRET_KEYS: new, or the present one with a newer key in front."""
    present = _load().get(SecretSettings).secret_keys
    click.echo(str(KeyRing.parse(present).rotated() if present else new_ring()))


def _token_command(kind: str, owner: str, what: str, *options: Callable[[click.Command], click.Command]) -> None:
    @token.command(kind, help=f"Make {what}.")
    @click.argument(owner, type=click.UUID)
    @click.option("--name", default="", help="To know it again by.")
    @click.option("--expires-in-days", type=click.IntRange(min=1, max=36_500), help="It ends by itself.")
    @_json_option
    def make(
        name: str, expires_in_days: int | None, json: bool | None, scopes: tuple[str, ...] = (), **owners: UUID
    ) -> None:
        expires_at = None if expires_in_days is None else datetime.now(UTC) + timedelta(days=expires_in_days)
        settings = _load(json=json)
        asyncio.run(
            print_token(
                settings, kind, owners[owner], name=name, scopes=list(scopes) or ["owner"], expires_at=expires_at
            )
        )

    for option in options:
        option(make)


_token_command("device", "device_id", "a token with which one device sends its readings")
_token_command("gateway", "site_id", "a token with which a gateway sends for every device of its site")
_token_command(
    "api-key",
    "organisation_id",
    "a key that may read (and later change) what an organisation owns",
    click.option("--scope", "scopes", multiple=True, help="What it may do: owner (all), readings:read."),
)


@main.group()
def admin() -> None:
    """What only an operator does about people."""


@admin.command("create")
@click.argument("email")
@click.option("--name", default="Administrator", show_default=True, help="What the person is called.")
@_json_option
def admin_create(email: str, name: str, json: bool | None) -> None:
    """Make a super-admin, who may do everything in every organisation; the password is asked for, or read."""
    settings = _load(json=json)
    if sys.stdin.isatty():
        password = click.prompt("Password", hide_input=True, confirmation_prompt=True)
    else:
        password = sys.stdin.readline(PASSWORD_LINE_MAX).rstrip("\r\n")
    asyncio.run(make_admin(settings, email, name, password))


@admin.command("reset-link")
@click.argument("email")
@_json_option
def admin_reset_link(email: str, json: bool | None) -> None:
    """Print a link with which a person may set a new password; it is shown once."""
    asyncio.run(print_reset_link(_load(json=json), email))


@main.group()
def spool() -> None:
    """Show how far spools have landed, or go on where their records are lost for good."""


@spool.command("list")
@_json_option
def spool_list(json: bool | None) -> None:
    """Print how far each partition of each spool has landed, newest first."""
    asyncio.run(print_spools(_load(json=json)))


@spool.command("skip")
@click.argument("spool_id", metavar="SPOOL", type=click.UUID)
@click.argument("partition", type=click.IntRange(min=0))
@click.argument("sequence", type=click.IntRange(min=1))
@_json_option
def spool_skip(spool_id: UUID, partition: int, sequence: int, json: bool | None) -> None:
    """Count the records of SPOOL before SEQUENCE that have not landed as lost, and let landing go on there."""
    asyncio.run(skip_spool(_load(json=json), spool_id, partition, sequence))


@main.group()
def limits() -> None:
    """Show or change what a device, a site's gateways or an organisation may send."""


def _limits_of(command: F) -> F:
    for owner, whose in (("organisation", "an organisation"), ("site", "a site's gateways"), ("device", "a device")):
        command = click.option(f"--{owner}", type=click.UUID, metavar="ID", help=f"The limits of {whose}.")(command)
    return _json_option(command)


def _one_owner(owners: Mapping[str, UUID | None]) -> tuple[str, UUID]:
    named = [(what, owner) for what, owner in owners.items() if owner is not None]
    if len(named) != 1:
        raise ConfigurationError("name whose limits they are, by one of --device, --site and --organisation")
    return named[0]


@limits.command("show")
@_limits_of
def limits_show(json: bool | None, **owners: UUID | None) -> None:
    """Print the limits that apply, and where they come from."""
    asyncio.run(print_limits(_load(json=json), *_one_owner(owners), {}))


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
    asyncio.run(print_limits(_load(json=json), *_one_owner(owners), values))


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


# ---------------------------------------------------------------- quarantine


@main.group("quarantine")
def quarantine_group() -> None:
    """Look at what was set aside, mend it, replay it, or throw it away."""


def _at_the_desk(json: bool | None, do: Callable[[Desk, Settings], Coroutine[Any, Any, None]]) -> None:
    settings = _load(json=json)

    async def work() -> None:
        async with open_desk(settings) as desk:
            await do(desk, settings)

    asyncio.run(work())


def _filter_options(command: F) -> F:
    for option in (
        click.option("--attempts-max", type=click.IntRange(min=1), help="1: what was never replayed."),
        click.option("--to", "end", callback=_moment, metavar="TIME", help="Received before it."),
        click.option("--from", "start", callback=_moment, metavar="TIME", help="Received from it on."),
        click.option("--request-id", help="Of the request that brought it."),
        click.option("--device", "device_id", type=click.UUID, help="Of one device."),
        click.option("--code", help="Set aside for this reason."),
        click.option("--organisation", type=click.UUID, help="Whose; may be left out where there is only one."),
    ):
        command = option(command)
    return command


_state_option: Final = click.option("--state", type=click.Choice(STATES), help="What became of it.")
_unreadable_option: Final = click.option(
    "--unreadable", is_flag=True, help="Records that nobody can read, which belong to no organisation."
)
_note_option: Final = click.option("--note", required=True, help="Why; it is kept.")
_ids_argument: Final = click.argument("ids", type=click.UUID, nargs=-1)


@quarantine_group.command("list")
@_filter_options
@_state_option
@_unreadable_option
@click.option("--limit", type=click.IntRange(1, 10_000), default=100, show_default=True)
@_json_option
def quarantine_list(
    json: bool | None, organisation: UUID | None, state: str | None, unreadable: bool, limit: int, **wanted: Any
) -> None:
    """List rows, newest first."""
    found = Filter(**wanted)
    if unreadable and (organisation is not None or found.names_something):
        raise ConfigurationError("--unreadable goes with --state and --limit alone")
    if unreadable:
        _at_the_desk(json, lambda desk, _: desk.list_unreadable(state, limit))
    else:
        _at_the_desk(json, lambda desk, _: desk.list(organisation, found, state, limit))


@quarantine_group.command("show")
@click.argument("quarantine_id", metavar="ID", type=click.UUID)
@_json_option
def quarantine_show(quarantine_id: UUID, json: bool | None) -> None:
    """Show one row with its payload, and the one it had before it was edited."""
    _at_the_desk(json, lambda desk, _: desk.show(quarantine_id))


@quarantine_group.command("summary")
@_filter_options
@_state_option
@_json_option
def quarantine_summary(json: bool | None, organisation: UUID | None, state: str | None, **wanted: Any) -> None:
    """Count rows by code and device; held ones, unless another state is named."""
    _at_the_desk(json, lambda desk, _: desk.summary(organisation, Filter(**wanted), state or HELD, 1_000))


@quarantine_group.command("edit")
@click.argument("quarantine_id", metavar="ID", type=click.UUID)
@click.argument("payload", type=click.File("r"), default="-")
@_json_option
def quarantine_edit(quarantine_id: UUID, payload: TextIO, json: bool | None) -> None:
    """Replace a held row's payload with the measurement in a file, or on the standard input."""
    text = payload.read(PAYLOAD_CHARACTERS_MAX)
    _at_the_desk(json, lambda desk, settings: desk.edit(quarantine_id, text, payload_bytes_max(settings)))


@quarantine_group.command("replay")
@_ids_argument
@_filter_options
@click.option("--all", "everything", is_flag=True, help="Everything that is held.")
@_json_option
def quarantine_replay(
    ids: tuple[UUID, ...], json: bool | None, organisation: UUID | None, everything: bool, **wanted: Any
) -> None:
    """Have rows judged and stored again, by their ids or by a filter. A running ingest does it."""
    found = _which(ids, organisation, everything, wanted)
    if ids:
        _at_the_desk(json, lambda desk, _: desk.replay(ids))
    else:
        _at_the_desk(json, lambda desk, _: desk.replay_found(organisation, found))


@quarantine_group.command("discard")
@_ids_argument
@_filter_options
@_unreadable_option
@_note_option
@_json_option
def quarantine_discard(
    ids: tuple[UUID, ...], json: bool | None, organisation: UUID | None, unreadable: bool, note: str, **wanted: Any
) -> None:
    """Throw rows away for good, by their ids or by a filter."""
    found = _which(ids, organisation, unreadable, wanted)
    if unreadable:
        _at_the_desk(json, lambda desk, _: desk.discard_unreadable(note))
    elif ids:
        _at_the_desk(json, lambda desk, _: desk.discard(ids, note))
    else:
        _at_the_desk(json, lambda desk, _: desk.discard_found(organisation, found, note))


def _which(ids: tuple[UUID, ...], organisation: UUID | None, flagged: bool, wanted: Mapping[str, Any]) -> Filter:
    """Raises `ConfigurationError` unless exactly one of ids, a filter and a flag says what is meant."""
    found = Filter(**wanted)
    if bool(ids) + found.names_something + flagged != 1 or (ids and organisation is not None):
        raise ConfigurationError("say what is meant by ids, or by a filter, or by an option for everything")
    return found


@main.command()
@_json_option
def settings(json: bool | None) -> None:
    """List every setting with its value, where that comes from, and why it is what it is. Secrets are masked."""
    loaded = _load(json=json)
    if loaded.get(DeploySettings).json:
        click.echo(orjson.dumps([asdict(setting) for setting in loaded.listing]).decode())
        return
    for setting in loaded.listing:
        value = f"{setting.value} {setting.unit}".strip() or "(not set)"
        click.echo(f"{setting.variable} = {value}  [{setting.origin}]")
        click.echo(click.wrap_text(setting.why, width=100, initial_indent="    ", subsequent_indent="    "))


@main.command()
def version() -> None:
    """Print the version."""
    click.echo(installed_version("sluice"))


for _command in COMMANDS:
    main.add_command(_command)

if __name__ == "__main__":
    main()

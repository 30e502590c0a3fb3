"""The command `sluice`: its commands and their options. Left out: what they do."""

import asyncio
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from importlib.metadata import version as installed_version
from typing import Any, Final, TypeVar
from uuid import UUID

import click
import orjson

from deploy.commands import migrate_all, print_token, seed_demo
from deploy.roles import ROLES, Launch, run_role
from deploy.settings import DeploySettings, load
from deploy.up import run_up, with_port
from runtime.errors import ConfigurationError, SluiceError
from runtime.lifecycle import run
from runtime.logging import LoggingSettings, set_up_logging
from runtime.secrets import KeyRing, SecretSettings, new_ring
from runtime.settings import Settings
from runtime.supervisor import EXIT_REFUSED, INHERITED_OPTION, Inherited

EXIT_UNAVAILABLE: Final = 1
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


@main.group()
def token() -> None:
    """Make secret keys and tokens; each is shown once."""


@token.command("keys")
def token_keys() -> None:
    """Print a value for SLUICE_SECRET_KEYS: new, or the present one with a newer key in front."""
    present = _load().get(SecretSettings).secret_keys
    click.echo(str(KeyRing.parse(present).rotated() if present else new_ring()))


def _token_command(kind: str, owner: str, what: str) -> None:
    @token.command(kind, help=f"Make {what}.")
    @click.argument(owner, type=click.UUID)
    @click.option("--name", default="", help="To know it again by.")
    @click.option("--expires-in-days", type=click.IntRange(min=1, max=36_500), help="It ends by itself.")
    @click.option("--scope", "scopes", multiple=True, help="Of an API key: owner (all), readings:read.")
    @_json_option
    def make(
        name: str, expires_in_days: int | None, scopes: tuple[str, ...], json: bool | None, **owners: UUID
    ) -> None:

        if scopes and kind != "api-key":
            raise ConfigurationError("--scope is for API keys")
        expires_at = None if expires_in_days is None else datetime.now(UTC) + timedelta(days=expires_in_days)
        settings = _load(json=json)
        asyncio.run(
            print_token(
                settings, kind, owners[owner], name=name, scopes=list(scopes) or ["owner"], expires_at=expires_at
            )
        )


_token_command("device", "device_id", "a token with which one device sends its readings")
_token_command("gateway", "site_id", "a token with which a gateway sends for every device of its site")
_token_command("api-key", "organisation_id", "a key that may read (and later change) what an organisation owns")


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


if __name__ == "__main__":
    main()

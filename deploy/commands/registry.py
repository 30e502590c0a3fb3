"""`sluice login`, `org`, `site`, `device`, `key`: the registry from a terminal, over the HTTP API.

Tables for people, `--json` for programs: then an answer is printed as it came. Left out: requests (`deploy.remote`).
"""

import json as json_text
import sys
from collections.abc import Sequence
from typing import Any, Final, TypeVar

import click
from click.shell_completion import get_completion_class

from deploy.remote import Login, Remote, address, keep, kept, with_tokens
from runtime.errors import ConfigurationError
from runtime.secrets import API_KEY_PREFIX

F = TypeVar("F")

_ORGANISATIONS: Final = ("api", "v1", "organisations")
_KEYS: Final = ("api", "v1", "api-keys")
_DEVICES: Final = ("v1", "devices")
_ERASURES: Final = ("api", "v1", "erasures")
_ROWS: Final = 200


def _json_option(command: F) -> F:
    return click.option("--json", "json", is_flag=True, help="Print the answer as JSON.")(command)  # type: ignore[type-var]


def _print(answer: Any, json: bool, columns: Sequence[str] = ()) -> None:
    """An answer, or rows of a list as a table of these columns."""
    if json:
        click.echo(json_text.dumps(answer))
    elif isinstance(answer, list):
        _print_table(answer, columns)
    elif answer is not None:
        for name, value in answer.items():
            click.echo(f"{name:<22} {_cell(value)}")


def _print_table(rows: Sequence[Any], columns: Sequence[str]) -> None:
    lines = [list(columns), *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[number]) for line in lines) for number in range(len(columns))]
    for line in lines:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else json_text.dumps(value)


def _given(**values: object) -> dict[str, object]:
    return {name: value for name, value in values.items() if value is not None}


def _location(latitude: float | None, longitude: float | None, site_address: str | None) -> dict[str, object] | None:
    return _given(latitude=latitude, longitude=longitude, address=site_address) or None


# ---------------------------------------------------------------- logging in


@click.command()
@click.argument("url")
@click.option("--email", help="Who you are; asked for where it is needed.")
@click.option(
    "--api-key", is_flag=True, help="Log in with an API key, which is asked for or read from standard input."
)
@click.option("--organisation", metavar="ID", help="Which of yours; of an API key the one that it belongs to.")
def login(url: str, email: str | None, api_key: bool, organisation: str | None) -> None:
    """Log in to the API at URL, for the commands org, site, device and key."""
    base = address(url)
    if api_key:
        key = _secret("API key")
        if not key.startswith(API_KEY_PREFIX):
            raise ConfigurationError(f"an API key begins with {API_KEY_PREFIX}")
        remote = Remote(Login(base, organisation, api_key=key))
        if organisation is None:
            remote.login = Login(base, remote.ask("GET", "api", "v1", "organisation")["organisation_id"], key)
    else:
        body = {"email": email or click.prompt("E-mail"), "password": _secret("Password")}
        tokens = Remote(Login(base, api_key="")).ask(
            "POST", "api", "v1", "auth", "login", body=body | _given(organisation_id=organisation)
        )
        remote = Remote(with_tokens(Login(base), tokens))
    keep(remote.login)
    chosen = remote.login.organisation or "none yet, see `sluice org list`"
    click.echo(f"logged in to {base}, organisation {chosen}")


def _secret(what: str) -> str:
    if sys.stdin.isatty():
        return str(click.prompt(what, hide_input=True))
    return sys.stdin.readline().strip()


@click.command()
def logout() -> None:
    """End the session, and forget it here."""
    remote = Remote(kept())
    if remote.login.refresh_token is not None:
        remote.ask("POST", "api", "v1", "auth", "logout")
    keep(None)
    click.echo("logged out")


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what makes SHELL complete commands and options: for its start-up file."""
    made = get_completion_class(shell)
    if made is None:
        raise ConfigurationError(f"there is no completion for {shell}")
    command = click.get_current_context().find_root().command
    click.echo(made(command, {}, "sluice", "_SLUICE_COMPLETE").source())


# ---------------------------------------------------------------- organisations


@click.group()
def org() -> None:
    """Organisations."""


@org.command("list")
@_json_option
def list_organisations(json: bool) -> None:
    """Those that you belong to."""
    _print(Remote(kept()).all(*_ORGANISATIONS), json, ("organisation_id", "name", "role"))


@org.command("show")
@_json_option
def show_organisation(json: bool) -> None:
    """The one that was chosen."""
    remote = Remote(kept())
    _print(remote.ask("GET", *_ORGANISATIONS, remote.organisation), json)


@org.command("create")
@click.argument("name")
@_json_option
def create_organisation(name: str, json: bool) -> None:
    """Make one, of which you are the owner."""
    _print(Remote(kept()).ask("POST", *_ORGANISATIONS, body={"name": name}), json)


@org.command("use")
@click.argument("organisation")
def use_organisation(organisation: str) -> None:
    """Choose the one that the other commands are about."""
    remote = Remote(kept())
    tokens = remote.ask("POST", "api", "v1", "auth", "organisation", body={"organisation_id": organisation})
    keep(with_tokens(remote.login, tokens))
    click.echo(f"organisation {organisation}")


@org.command("retention")
@click.option("--raw", "raw_retention_days", type=click.IntRange(1, 36_600), metavar="DAYS", help="Readings.")
@click.option(
    "--5m", "rollups_5m_days", type=click.IntRange(0, 36_600), metavar="DAYS", help="Roll-ups of 5 minutes."
)
@click.option("--1h", "rollups_1h_days", type=click.IntRange(0, 36_600), metavar="DAYS", help="Roll-ups of an hour.")
@click.option("--1d", "rollups_1d_days", type=click.IntRange(0, 36_600), metavar="DAYS", help="Roll-ups of a day.")
@_json_option
def change_retention(json: bool, **days: int | None) -> None:
    """Say how long it keeps its readings; roll-ups for ever with 0. What is older goes for good."""
    remote = Remote(kept())
    body = {name: value for name, value in days.items() if value is not None}
    _print(remote.ask("PATCH", *_ORGANISATIONS, remote.organisation, body=body), json)


@org.command("members")
@_json_option
def list_members(json: bool) -> None:
    """Who belongs to it."""
    remote = Remote(kept())
    rows = remote.all(*_ORGANISATIONS, remote.organisation, "members")
    _print(rows, json, ("user_id", "email", "name", "role"))


# ---------------------------------------------------------------- sites


@click.group()
def site() -> None:
    """Sites: places at which devices stand."""


def _sites(remote: Remote, *more: str) -> tuple[str, ...]:
    return ("api", "organisations", remote.organisation, "sites", *more)


def _site_options(command: F) -> F:
    for option in (
        click.option("--address", "site_address", help="As a letter has it."),
        click.option("--longitude", type=float, help="Degrees east."),
        click.option("--latitude", type=float, help="Degrees north."),
        click.option("--timezone", help="As the IANA names it: Europe/Prague."),
    ):
        command = option(command)  # type: ignore[type-var]
    return command


@site.command("list")
@_json_option
def list_sites(json: bool) -> None:
    """All sites."""
    remote = Remote(kept())
    rows = remote.all(*_sites(remote), cursor_name="nextCursor", limit=_ROWS)
    _print(rows, json, ("id", "name", "url", "status", "deviceCount"))


@site.command("show")
@click.argument("site_id")
@_json_option
def show_site(site_id: str, json: bool) -> None:
    """One site in full."""
    remote = Remote(kept())
    _print(remote.ask("GET", *_sites(remote, site_id)), json)


@site.command("create")
@click.argument("name")
@click.option("--slug", help="Its short name; made from NAME where it is left out.")
@_site_options
@_json_option
def create_site(
    name: str, slug: str | None, timezone: str | None, latitude: float | None, longitude: float | None,
    site_address: str | None, json: bool,
) -> None:  # fmt: skip
    """Make a site."""
    remote = Remote(kept())
    location = _location(latitude, longitude, site_address)
    body = _given(name=name, slug=slug, timezone=timezone or "UTC", location=location)
    _print(remote.ask("POST", *_sites(remote), body=body), json)


@site.command("update")
@click.argument("site_id")
@click.option("--name")
@_site_options
@_json_option
def update_site(
    site_id: str, name: str | None, timezone: str | None, latitude: float | None, longitude: float | None,
    site_address: str | None, json: bool,
) -> None:  # fmt: skip
    """Change what is given of a site."""
    remote = Remote(kept())
    body = _given(name=name, timezone=timezone, location=_location(latitude, longitude, site_address))
    _print(remote.ask("PUT", *_sites(remote, site_id), body=body), json)


@site.command("delete")
@click.argument("site_id")
@click.confirmation_option(prompt="Everything that was recorded there goes for good. Go on?")
def delete_site(site_id: str) -> None:
    """Erase a site with all that was recorded there."""
    remote = Remote(kept())
    remote.ask("DELETE", *_sites(remote, site_id))
    click.echo("the site is being erased: `sluice site erasures` tells how far")


@site.command("erasures")
@_json_option
def list_erasures(json: bool) -> None:
    """Deleted sites, and how far each is erased."""
    rows = Remote(kept()).all(*_ERASURES, limit=_ROWS)
    _print(rows, json, ("site_id", "state", "requested_at", "finished_at", "readings", "quarantined"))


# ---------------------------------------------------------------- devices


@click.group()
def device() -> None:
    """Devices."""


@device.command("list")
@click.option("--site", "site_id", help="Of one site; without it, of the organisation.")
@click.option("--online/--offline", default=None, help="Those that are heard, or are not.")
@click.option("--model", help="Part of a model's name.")
@_json_option
def list_devices(site_id: str | None, online: bool | None, model: str | None, json: bool) -> None:
    """Devices, in the order in which they were made."""
    remote = Remote(kept())
    rows = remote.all(
        *_DEVICES,
        site_id=site_id,
        account_id=None if site_id else remote.organisation,
        online=None if online is None else str(online).lower(),
        model=model,
        limit=_ROWS,
    )
    _print(rows, json, ("id", "local_id", "name", "model", "online", "last_seen_at"))


@device.command("show")
@click.argument("device_id")
@_json_option
def show_device(device_id: str, json: bool) -> None:
    """One device."""
    _print(Remote(kept()).ask("GET", *_DEVICES, device_id), json)


@device.command("create")
@click.argument("local_id")
@click.option("--site", "site_id", help="Where it stands.")
@click.option("--name", help="For people; LOCAL_ID where it is left out.")
@click.option("--model", required=True, help="See `sluice device models`.")
@_json_option
def create_device(local_id: str, site_id: str | None, name: str | None, model: str, json: bool) -> None:
    """Make a device; its token is shown this once."""
    body = _given(local_id=local_id, site_id=site_id, name=name or local_id, model=model)
    _print(Remote(kept()).ask("POST", *_DEVICES, body=body), json)


@device.command("update")
@click.argument("device_id")
@click.option("--name")
@click.option("--local-id")
@click.option("--notes")
@_json_option
def update_device(device_id: str, name: str | None, local_id: str | None, notes: str | None, json: bool) -> None:
    """Change what is given of a device."""
    body = _given(name=name, local_id=local_id, notes=notes)
    _print(Remote(kept()).ask("PATCH", *_DEVICES, device_id, body=body), json)


@device.command("move")
@click.argument("device_id")
@click.argument("site_id")
@click.option("--at", "effective_at", metavar="TIME", help="From when on (RFC 3339); now where it is left out.")
@_json_option
def move_device(device_id: str, site_id: str, effective_at: str | None, json: bool) -> None:
    """Let a device stand at another site."""
    body = _given(to_site_id=site_id, effective_at=effective_at)
    _print(Remote(kept()).ask("POST", *_DEVICES, device_id, "move", body=body), json)


@device.command("rotate-token")
@click.argument("device_id")
@_json_option
def rotate_token(device_id: str, json: bool) -> None:
    """Give a device another token, shown this once; the old one ends at once."""
    _print(Remote(kept()).ask("POST", *_DEVICES, device_id, "rotate-token"), json)


@device.command("delete")
@click.argument("device_id")
@click.confirmation_option(prompt="Its token ends; its readings stay. Go on?")
def delete_device(device_id: str) -> None:
    """Delete a device; its readings stay."""
    Remote(kept()).ask("DELETE", *_DEVICES, device_id)
    click.echo("deleted")


@device.command("models")
@_json_option
def list_models(json: bool) -> None:
    """The models that a device can be of."""
    rows = Remote(kept()).ask("GET", "v1", "models")["data"]
    _print(rows, json, ("model", "name", "vendor", "ingest_url_kind"))


# ---------------------------------------------------------------- keys


@click.group()
def key() -> None:
    """API keys."""


@key.command("list")
@_json_option
def list_keys(json: bool) -> None:
    """Those of the organisation, without their secrets."""
    columns = ("credential_id", "name", "scopes", "created_at", "expires_at", "last_used_at", "revoked_at")
    _print(Remote(kept()).all(*_KEYS), json, columns)


@key.command("create")
@click.argument("name")
@click.option("--scope", "scopes", multiple=True, required=True, help="What it may do; several are possible.")
@click.option("--expires-at", metavar="TIME", help="RFC 3339; without it, never.")
@_json_option
def create_key(name: str, scopes: tuple[str, ...], expires_at: str | None, json: bool) -> None:
    """Make a key, shown this once."""
    body = _given(name=name, scopes=list(scopes), expires_at=expires_at)
    _print(Remote(kept()).ask("POST", *_KEYS, body=body), json)


@key.command("revoke")
@click.argument("credential_id")
def revoke_key(credential_id: str) -> None:
    """End a key at once."""
    Remote(kept()).ask("DELETE", *_KEYS, credential_id)
    click.echo("revoked")

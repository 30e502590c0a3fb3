"""`sluice login`, `org`, `site`, `device`, `key`: the registry from a terminal, over the HTTP API.

Tables for people, `--json` for programs: then an answer is printed as it came. Left out: requests (`deploy.remote`).
"""

import json as json_text
import sys
from collections.abc import Sequence
from typing import Any, Final

import click

from deploy.commands.options import F, ask, confirmation_option, json_option, scope_option
from deploy.printing import say, say_table
from deploy.remote import Login, Remote, address, keep, kept, with_tokens
from runtime.errors import ConfigurationError
from runtime.secrets import API_KEY_PREFIX

_ORGANISATIONS: Final = ("api", "v1", "organisations")
_KEYS: Final = ("api", "v1", "api-keys")
_DEVICES: Final = ("v1", "devices")
_ERASURES: Final = ("api", "v1", "erasures")
_UNASSIGNED: Final = ("api", "v1", "unassigned-devices")
_ROWS: Final = 200


def _print(answer: Any, json: bool | None, columns: Sequence[str] = ()) -> None:
    """An answer, or rows of a list as a table of these columns."""
    if json:
        click.echo(json_text.dumps(answer))
    elif isinstance(answer, list):
        say_table([columns, *([_cell(row.get(column)) for column in columns] for row in answer)])
    elif answer is not None:
        for name, value in answer.items():
            say(f"{name:<22} {_cell(value)}")


def _print_done(sentence: str, json: bool | None, **answer: object) -> None:
    """What was done, where the API answers nothing that says so."""
    if json:
        click.echo(json_text.dumps(answer))
    else:
        say(sentence)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else json_text.dumps(value, ensure_ascii=False)


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
@json_option
def login(url: str, email: str | None, api_key: bool, organisation: str | None, json: bool | None) -> None:
    """Log in to the API at URL.

    The commands org, site, device and key go there from then on, until `sluice logout`. The password or key is asked
    for, or read from standard input. What the API gives for a password, or the key itself, is kept in a file that
    only you can read.
    """
    base = address(url)
    if api_key:
        key = _secret("API key")
        if not key.startswith(API_KEY_PREFIX):
            raise ConfigurationError(f"an API key begins with {API_KEY_PREFIX}")
        remote = Remote(Login(base, organisation, api_key=key))
        if organisation is None:
            remote.login = Login(base, remote.ask("GET", "api", "v1", "organisation")["organisation_id"], key)
    else:
        body = {"email": email or ask("E-mail"), "password": _secret("Password")}
        tokens = Remote(Login(base, api_key="")).ask(
            "POST", "api", "v1", "auth", "login", body=body | _given(organisation_id=organisation)
        )
        remote = Remote(with_tokens(Login(base), tokens))
    keep(remote.login)
    chosen = remote.login.organisation
    sentence = f"logged in to {base}, organisation {chosen or 'none yet, see `sluice org list`'}"
    _print_done(sentence, json, url=base, organisation_id=chosen)


def _secret(what: str) -> str:
    if sys.stdin.isatty():
        return ask(what, hidden=True)
    return sys.stdin.readline().strip()


@click.command()
@json_option
def logout(json: bool | None) -> None:
    """End the session, and forget it here."""
    remote = Remote(kept())
    if remote.login.refresh_token is not None:
        remote.ask("POST", "api", "v1", "auth", "logout")
    keep(None)
    _print_done("logged out", json, logged_out=remote.login.url)


# ---------------------------------------------------------------- organisations


@click.group()
def org() -> None:
    """Organisations: make them, and choose the one to work for.

    Over the HTTP API: `sluice login` comes first.
    """


@org.command("list")
@json_option
def list_organisations(json: bool | None) -> None:
    """List those that you belong to."""
    _print(Remote(kept()).all(*_ORGANISATIONS), json, ("organisation_id", "name", "role"))


@org.command("show")
@json_option
def show_organisation(json: bool | None) -> None:
    """Show the one that is chosen."""
    remote = Remote(kept())
    _print(remote.ask("GET", *_ORGANISATIONS, remote.organisation), json)


@org.command("create")
@click.argument("name")
@json_option
def create_organisation(name: str, json: bool | None) -> None:
    """Make one, of which you are the owner; `use` chooses it."""
    _print(Remote(kept()).ask("POST", *_ORGANISATIONS, body={"name": name}), json)


@org.command("use")
@click.argument("organisation", metavar="ID")
@json_option
def use_organisation(organisation: str, json: bool | None) -> None:
    """Choose the one that the other commands are about."""
    remote = Remote(kept())
    tokens = remote.ask("POST", "api", "v1", "auth", "organisation", body={"organisation_id": organisation})
    keep(with_tokens(remote.login, tokens))
    # What was answered are tokens, which are kept and not shown.
    _print_done(f"organisation {organisation}", json, organisation_id=tokens["organisation_id"])


@org.command("retention")
@click.option("--raw", "raw_retention_days", type=click.IntRange(1, 36_600), metavar="DAYS", help="Readings.")
@click.option(
    "--5m", "rollups_5m_days", type=click.IntRange(0, 36_600), metavar="DAYS", help="Roll-ups of 5 minutes."
)
@click.option("--1h", "rollups_1h_days", type=click.IntRange(0, 36_600), metavar="DAYS", help="Roll-ups of an hour.")
@click.option("--1d", "rollups_1d_days", type=click.IntRange(0, 36_600), metavar="DAYS", help="Roll-ups of a day.")
@json_option
def change_retention(json: bool | None, **days: int | None) -> None:
    """Say how long it keeps its readings; roll-ups for ever with 0. What is older goes for good."""
    remote = Remote(kept())
    body = {name: value for name, value in days.items() if value is not None}
    _print(remote.ask("PATCH", *_ORGANISATIONS, remote.organisation, body=body), json)


@org.command("members")
@json_option
def list_members(json: bool | None) -> None:
    """List who belongs to it, in which role."""
    remote = Remote(kept())
    rows = remote.all(*_ORGANISATIONS, remote.organisation, "members")
    _print(rows, json, ("user_id", "email", "name", "role"))


# ---------------------------------------------------------------- sites


@click.group()
def site() -> None:
    """Sites, the places at which devices stand.

    Over the HTTP API: `sluice login` comes first.
    """


def _sites(remote: Remote, *more: str) -> tuple[str, ...]:
    return ("api", "organisations", remote.organisation, "sites", *more)


def _site_options(command: F) -> F:
    for option in (
        click.option("--address", "site_address", help="Its postal address."),
        click.option("--longitude", type=float, help="Degrees east."),
        click.option("--latitude", type=float, help="Degrees north."),
        click.option("--timezone", help="Such as Europe/Prague; UTC for a new site without it."),
    ):
        command = option(command)
    return command


@site.command("list")
@json_option
def list_sites(json: bool | None) -> None:
    """List all sites, with their ids."""
    remote = Remote(kept())
    rows = remote.all(*_sites(remote), cursor_name="nextCursor", limit=_ROWS)
    _print(rows, json, ("id", "name", "url", "status", "deviceCount"))


@site.command("show")
@click.argument("site_id")
@json_option
def show_site(site_id: str, json: bool | None) -> None:
    """Show one site in full."""
    remote = Remote(kept())
    _print(remote.ask("GET", *_sites(remote, site_id)), json)


@site.command("create")
@click.argument("name")
@click.option("--slug", help="Its short name; made from NAME where it is left out.")
@_site_options
@json_option
def create_site(
    name: str, slug: str | None, timezone: str | None, latitude: float | None, longitude: float | None,
    site_address: str | None, json: bool | None,
) -> None:  # fmt: skip
    """Make a site."""
    remote = Remote(kept())
    location = _location(latitude, longitude, site_address)
    body = _given(name=name, slug=slug, timezone=timezone or "UTC", location=location)
    _print(remote.ask("POST", *_sites(remote), body=body), json)


@site.command("update")
@click.argument("site_id")
@click.option("--name", help="What people call it.")
@_site_options
@json_option
def update_site(
    site_id: str, name: str | None, timezone: str | None, latitude: float | None, longitude: float | None,
    site_address: str | None, json: bool | None,
) -> None:  # fmt: skip
    """Change a site; what is not given stays as it is."""
    remote = Remote(kept())
    body = _given(name=name, timezone=timezone, location=_location(latitude, longitude, site_address))
    _print(remote.ask("PUT", *_sites(remote, site_id), body=body), json)


@site.command("delete")
@click.argument("site_id")
@confirmation_option("Everything that was recorded there goes for good. Go on?")
@json_option
def delete_site(site_id: str, json: bool | None) -> None:
    """Erase a site with all that was recorded there."""
    remote = Remote(kept())
    answer = remote.ask("DELETE", *_sites(remote, site_id))
    _print_done("the site is being erased: `sluice site erasures` tells how far", json, **answer)


@site.command("erasures")
@json_option
def list_erasures(json: bool | None) -> None:
    """List deleted sites, and how far each is erased."""
    rows = Remote(kept()).all(*_ERASURES, limit=_ROWS)
    _print(rows, json, ("site_id", "state", "requested_at", "finished_at", "readings", "quarantined"))


@site.group("mqtt")
def site_mqtt() -> None:
    """How a site's own devices come in over MQTT: Shelly, Tasmota."""


@site_mqtt.command("show")
@click.argument("site_id")
@json_option
def show_site_mqtt(site_id: str, json: bool | None) -> None:
    """Show what its devices are to be set to."""
    remote = Remote(kept())
    _print(remote.ask("GET", *_sites(remote, site_id, "mqtt")), json)


@site_mqtt.command("issue")
@click.argument("site_id")
@json_option
def issue_site_mqtt(site_id: str, json: bool | None) -> None:
    """Issue its password; it is shown this once.

    One from before ends.
    """
    remote = Remote(kept())
    _print(remote.ask("POST", *_sites(remote, site_id, "mqtt", "password")), json)


@site_mqtt.command("update")
@click.argument("site_id")
@click.option("--temperature-unit", type=click.Choice(["C", "F"]), required=True, help="As its devices are set.")
@json_option
def update_site_mqtt(site_id: str, temperature_unit: str, json: bool | None) -> None:
    """Say in what its devices measure temperatures."""
    remote = Remote(kept())
    body = {"temperatureUnit": temperature_unit}
    _print(remote.ask("PATCH", *_sites(remote, site_id, "mqtt"), body=body), json)


@site_mqtt.command("revoke")
@click.argument("site_id")
@json_option
def revoke_site_mqtt(site_id: str, json: bool | None) -> None:
    """End its password.

    Nobody publishes for the site until another is issued.
    """
    remote = Remote(kept())
    remote.ask("DELETE", *_sites(remote, site_id, "mqtt", "password"))
    _print_done("revoked", json, revoked=site_id)


@site.command("tray")
@click.argument("site_id")
@json_option
def list_tray(site_id: str, json: bool | None) -> None:
    """List devices that publish for it and that nobody has claimed."""
    rows = Remote(kept()).all(*_UNASSIGNED, site_id=site_id, limit=_ROWS)
    _print(rows, json, ("unassigned_id", "name", "format", "held", "first_seen_at", "last_seen_at"))


# ---------------------------------------------------------------- devices


@click.group()
def device() -> None:
    """Devices: make, list, change, move and delete them.

    Over the HTTP API: `sluice login` comes first.
    """


@device.command("list")
@click.option("--site", "site_id", help="Only those of one site.")
@click.option("--online/--offline", default=None, help="Only those that are heard, or are not.")
@click.option("--model", help="Only those with this in their model's name.")
@json_option
def list_devices(site_id: str | None, online: bool | None, model: str | None, json: bool | None) -> None:
    """List devices in the order in which they were made."""
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
@json_option
def show_device(device_id: str, json: bool | None) -> None:
    """Show one device."""
    _print(Remote(kept()).ask("GET", *_DEVICES, device_id), json)


@device.command("create")
@click.argument("local_id")
@click.option("--site", "site_id", help="Where it stands; nowhere without it.")
@click.option("--name", help="For people; LOCAL_ID where it is left out.")
@click.option("--model", required=True, help="See `sluice device models`.")
@json_option
def create_device(local_id: str, site_id: str | None, name: str | None, model: str, json: bool | None) -> None:
    """Make a device; its token is shown this once.

    LOCAL_ID is what its site knows it by, as the device or its gateway sends it.
    """
    body = _given(local_id=local_id, site_id=site_id, name=name or local_id, model=model)
    _print(Remote(kept()).ask("POST", *_DEVICES, body=body), json)


@device.command("claim")
@click.argument("unassigned_id")
@click.option("--device", "device_id", help="One that stands at the site already; a new one without it.")
@click.option("--name", help="For people; what it calls itself where it is left out.")
@click.option("--model", help="See `sluice device models`.")
@json_option
def claim_device(
    unassigned_id: str, device_id: str | None, name: str | None, model: str | None, json: bool | None
) -> None:
    """Claim a device in its site's tray.

    It is a new one, or one that stands there; what is held of it is replayed as its readings.
    """
    body = _given(device_id=device_id, name=name, model=model)
    _print(Remote(kept()).ask("POST", *_UNASSIGNED, unassigned_id, "claim", body=body), json)


@device.command("update")
@click.argument("device_id")
@click.option("--name", help="What people call it.")
@click.option("--local-id", help="What its site knows it by from now on.")
@click.option("--notes", help="What is to be remembered of it.")
@json_option
def update_device(
    device_id: str, name: str | None, local_id: str | None, notes: str | None, json: bool | None
) -> None:
    """Change a device; what is not given stays as it is."""
    body = _given(name=name, local_id=local_id, notes=notes)
    _print(Remote(kept()).ask("PATCH", *_DEVICES, device_id, body=body), json)


@device.command("move")
@click.argument("device_id")
@click.argument("site_id")
@click.option("--at", "effective_at", metavar="TIME", help="From when on (RFC 3339); now where it is left out.")
@json_option
def move_device(device_id: str, site_id: str, effective_at: str | None, json: bool | None) -> None:
    """Let a device stand at another site.

    What it measured before stays with the site where it stood.
    """
    body = _given(to_site_id=site_id, effective_at=effective_at)
    _print(Remote(kept()).ask("POST", *_DEVICES, device_id, "move", body=body), json)


@device.command("rotate-token")
@click.argument("device_id")
@json_option
def rotate_token(device_id: str, json: bool | None) -> None:
    """Give a device a new token; the old one ends at once.

    It is shown this once.
    """
    _print(Remote(kept()).ask("POST", *_DEVICES, device_id, "rotate-token"), json)


@device.command("delete")
@click.argument("device_id")
@confirmation_option("Its token ends; its readings stay. Go on?")
@json_option
def delete_device(device_id: str, json: bool | None) -> None:
    """Delete a device; its readings stay."""
    Remote(kept()).ask("DELETE", *_DEVICES, device_id)
    _print_done("deleted", json, deleted=device_id)


@device.command("models")
@json_option
def list_models(json: bool | None) -> None:
    """List the models that a device can be of."""
    rows = Remote(kept()).ask("GET", "v1", "models")["data"]
    _print(rows, json, ("model", "name", "vendor", "ingest_url_kind"))


# ---------------------------------------------------------------- keys


@click.group()
def key() -> None:
    """API keys, with which programs use the API.

    Over the HTTP API: `sluice login` comes first.
    """


@key.command("list")
@json_option
def list_keys(json: bool | None) -> None:
    """List the organisation's keys, without their secrets."""
    columns = ("credential_id", "name", "scopes", "created_at", "expires_at", "last_used_at", "revoked_at")
    _print(Remote(kept()).all(*_KEYS), json, columns)


@key.command("create")
@click.argument("name")
@scope_option(required=True)
@click.option("--expires-at", metavar="TIME", help="RFC 3339; without it, never.")
@json_option
def create_key(name: str, scopes: tuple[str, ...], expires_at: str | None, json: bool | None) -> None:
    """Make a key; it is shown this once."""
    body = _given(name=name, scopes=list(scopes), expires_at=expires_at)
    _print(Remote(kept()).ask("POST", *_KEYS, body=body), json)


@key.command("revoke")
@click.argument("credential_id")
@json_option
def revoke_key(credential_id: str, json: bool | None) -> None:
    """End a key at once."""
    Remote(kept()).ask("DELETE", *_KEYS, credential_id)
    _print_done("revoked", json, revoked=credential_id)

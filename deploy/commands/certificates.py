"""`sluice ca`: its options. Left out: what it does (`deploy.certificates`)."""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, get_args
from uuid import UUID

import click

from api.certificates.issuing import Reason
from deploy import certificates
from deploy.certificates import CERTIFICATE_FILE, KEY_FILE, NAME_DEFAULT, Office, open_office
from deploy.commands.options import F, ask, confirmation_option, json_option, load_settings
from runtime.settings import Settings

_LINE_MAX: Final = 1_000
_FILE: Final = click.Path(dir_okay=False, path_type=Path)
_DIRECTORY: Final = click.Path(file_okay=False, exists=True, path_type=Path)


@click.group()
def ca() -> None:
    """Make and keep the authority that signs certificates."""


def _name_option(command: F) -> F:
    return click.option(
        "--name", default=NAME_DEFAULT, show_default=True, help="What a new authority's name begins with."
    )(command)


def _output_option(command: F) -> F:
    return click.option("--output", type=_FILE, metavar="FILE", help="Where to write it; else it is printed.")(
        command
    )


@ca.command("init")
@_name_option
@json_option
def ca_init(name: str, json: bool | None) -> None:
    """Make a root and an issuing authority.

    Their keys are sealed under SLUICE_SECRET_KEYS in the database: keep copies of both.
    """
    _do(load_settings(json=json), lambda office: office.init(name))


@ca.command("import")
@click.option(
    "--certificate", required=True, type=_FILE, metavar="FILE",
    help="PEM: the authority's certificate, then those above it, up to the root.",
)  # fmt: skip
@click.option("--key", required=True, type=_FILE, metavar="FILE", help="PEM: its key.")
@click.option("--passphrase", "has_passphrase", is_flag=True, help="Ask for the key's passphrase.")
@_name_option
@json_option
def ca_import(certificate: Path, key: Path, has_passphrase: bool, name: str, json: bool | None) -> None:
    """Sign with an authority that was made elsewhere.

    Below a root that may have others below it, an issuing authority is made. It signs from then on.
    """
    passphrase = _passphrase() if has_passphrase else None
    _do(load_settings(json=json), lambda office: office.bring(certificate, key, passphrase, name))


@ca.command("renew")
@click.option("--root-key", type=_FILE, metavar="FILE", help="The root's key, where it was taken away.")
@_name_option
@json_option
def ca_renew(root_key: Path | None, name: str, json: bool | None) -> None:
    """Make the next issuing authority.

    It signs from then on: bring `sluice ca export` to the brokers at once. What the others have signed stays good.
    """
    passphrase = None if root_key is None else _passphrase()
    _do(load_settings(json=json), lambda office: office.renew(name, root_key, passphrase))


@ca.command("take-root-key")
@click.argument("file", type=_FILE)
@confirmation_option("From then on the key is in that file alone. Go on?")
@json_option
def ca_take_root_key(file: Path, json: bool | None) -> None:
    """Move the root's key out of the database.

    Into FILE, under a passphrase. It is needed again for `sluice ca renew` only.
    """
    passphrase = _passphrase(twice=True)
    _do(load_settings(json=json), lambda office: office.take_root_key(file, passphrase))


@ca.command("reseal")
@json_option
def ca_reseal(json: bool | None) -> None:
    """Seal the keys under the newest secret key.

    Before an older one is dropped from SLUICE_SECRET_KEYS.
    """
    _do(load_settings(json=json), Office.seal_again)


@ca.command("show")
@json_option
def ca_show(json: bool | None) -> None:
    """Say which authorities there are, and until when."""
    _do(load_settings(json=json), Office.show)


@ca.command("export")
@_output_option
@json_option
def ca_export(output: Path | None, json: bool | None) -> None:
    """Give the certificates that brokers and devices trust."""
    _do(load_settings(json=json), lambda office: office.export(output))


@ca.command("server-certificate")
@click.option(
    "--name", "names", required=True, multiple=True, metavar="HOST",
    help="A name or address that clients reach the broker by; given several times for several.",
)  # fmt: skip
@click.option(
    "--output", type=_DIRECTORY, default=".", metavar="DIR",
    help=f"Where to write {CERTIFICATE_FILE} and {KEY_FILE}; by default here.",
)  # fmt: skip
@json_option
def ca_server_certificate(names: tuple[str, ...], output: Path, json: bool | None) -> None:
    """Make a key and a certificate for a broker."""
    _do(load_settings(json=json), lambda office: office.server_certificate(names, output))


@ca.command("crl")
@_output_option
@json_option
def ca_crl(output: Path | None, json: bool | None) -> None:
    """Give the lists of revoked certificates.

    They tell of everything that was revoked before, and are made anew where they have to.
    """
    _do(load_settings(json=json), lambda office: office.revocation_list(output))


@ca.command("revoke")
@click.argument("device", type=click.UUID)
@click.option(
    "--reason", type=click.Choice(get_args(Reason)), default="unspecified", show_default=True,
    help="What the list says of it.",
)  # fmt: skip
@json_option
def ca_revoke(device: UUID, reason: Reason, json: bool | None) -> None:
    """Revoke the certificates of DEVICE."""
    asyncio.run(certificates.revoke(load_settings(json=json), device, reason))


def _do(settings: Settings, work: Callable[[Office], Awaitable[Any]]) -> None:
    async def run() -> None:
        async with open_office(settings) as office:
            await work(office)

    asyncio.run(run())


def _passphrase(*, twice: bool = False) -> bytes:
    """Typed, or a line of standard input."""
    if sys.stdin.isatty():
        return ask("Passphrase", hidden=True, twice=twice).encode()
    return sys.stdin.readline(_LINE_MAX).rstrip("\r\n").encode()

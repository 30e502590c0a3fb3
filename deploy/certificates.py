"""What `sluice ca …` does, and what it prints: the certificate authority as an operator has it.

Everything happens in one transaction of a role that answers no requests. Files appear whole or not at all, and those
with a key are their owner's alone. Left out: the options (`deploy.commands`), and how things are signed.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import click
import orjson
from cryptography import x509

from api.certificates import issuing
from api.certificates.authorities import ISSUING, ROOT, Authorities, Authority, Standing, trusted
from api.certificates.building import (
    Signer,
    Span,
    fingerprint_of,
    key_pem_of,
    make_issuing,
    make_root,
    new_key,
    pem_of,
    serial_of,
    sign_server,
    utc_now,
)
from api.certificates.checking import FILE_BYTES_MAX, brought, read_key
from api.certificates.issuing import Reason
from api.certificates.revocation import Listed, RevocationLists
from api.certificates.settings import CertificateSettings
from api.http.problems import Problem
from api.registry import audit
from api.registry.organisations import acting_for
from api.registry.texts import HostName, Name
from deploy.database import check_up_to_date
from deploy.operating import login
from deploy.operator import organisation_of
from deploy.people import ADMIN_ROLE, parsed
from deploy.printing import say, say_table
from deploy.settings import DeploySettings
from runtime.errors import ConfigurationError
from runtime.files import write_file
from runtime.secrets import KeyRing, SecretSettings
from runtime.settings import Settings

PASSPHRASE_CHARACTERS_MIN: Final = 12
CERTIFICATE_FILE: Final = "server.crt"
KEY_FILE: Final = "server.key"
NAME_DEFAULT: Final = "Sluice"
NAME_CHARACTERS_MAX: Final = 40


class Office:
    """An operator's transaction with the authorities."""

    def __init__(self, connection: Any, settings: Settings) -> None:
        ring = KeyRing.parse(settings.get(SecretSettings).secret_keys)
        self._connection = connection
        self._json = settings.get(DeploySettings).json
        self._settings = settings.get(CertificateSettings)
        self._authorities = Authorities(ring)
        self._lists = RevocationLists(ring, self._settings)
        self._now = utc_now()

    # ------------------------------------------------------------ authorities

    async def init(self, name: str) -> None:
        """A root and an issuing authority, where there are none."""
        await self._none_yet()
        key = new_key()
        root = Signer(make_root(_checked(name), key, Span.of(self._now, self._settings.certificate_root_days)), key)
        await self._authorities.add(self._connection, ROOT, root)
        await self._add_issuing(name, root)
        await self.show()

    async def bring(self, certificate: Path, key: Path, passphrase: bytes | None, name: str) -> None:
        """One that somebody made elsewhere; below one that may have others below it, an issuing one is made."""
        found = brought(_read(certificate), _read(key), passphrase, self._now)
        await self._authorities.hold(self._connection)
        if await self._authorities.knows(self._connection, found.signer.certificate):
            raise ConfigurationError("this authority is here already: `sluice ca show`")
        if found.signs_authorities and not found.chain:
            await self._authorities.add(self._connection, ROOT, found.signer)
            await self._add_issuing(name, found.signer)
        else:
            await self._authorities.add(self._connection, ISSUING, found.signer, found.chain_pem)
            await self._recorded("ca.imported", found.signer.certificate)
        await self.show()

    async def renew(self, name: str, root_key: Path | None, passphrase: bytes | None) -> None:
        """Another issuing authority below the newest root, which signs from now on."""
        await self._authorities.hold(self._connection)
        root = await self._root(root_key, passphrase)
        await self._add_issuing(name, root)
        await self.show()

    async def take_root_key(self, file: Path, passphrase: bytes) -> None:
        """The root's key into a file, under a passphrase, and out of the database."""
        if len(passphrase) < PASSPHRASE_CHARACTERS_MIN:
            raise ConfigurationError(f"the passphrase has {PASSPHRASE_CHARACTERS_MIN} characters at least")
        await self._authorities.hold(self._connection)
        root = await self._authorities.root(self._connection)
        if root is None:
            raise ConfigurationError("no key of a root is here: `sluice ca show`")
        write_file(file, key_pem_of(root.signer.key, passphrase), secret=True, is_new=True)
        # Nothing else has it from here on.
        if read_key(_read(file), passphrase).private_numbers() != root.signer.key.private_numbers():
            raise ConfigurationError(f"{file} does not hold what was written: the key stays")
        await self._authorities.take_root_key(self._connection, root.authority)
        await self._recorded("ca.root_key_taken", root.signer.certificate)
        self._tell({"file": str(file)}, f"the root's key is in {file} alone, under the passphrase: keep both apart")

    async def seal_again(self) -> None:
        await self._authorities.hold(self._connection)
        count = await self._authorities.seal_again(self._connection)
        self._tell({"keys": count}, f"{count} keys are sealed under the newest secret key")

    async def show(self) -> None:
        found = await self._authorities.standing(self._connection)
        lists = {one.authority: one for one in await self._lists.kept(self._connection) if one.number}
        if self._json:
            told = [_standing(one) | _listed(lists.get(one.authority)) for one in found]
            click.echo(orjson.dumps({"authorities": told}).decode())
            return
        if not found:
            say("there is no certificate authority: `sluice ca init`")
            return
        say_table(_line(one) for one in found)
        for one in lists.values():
            say(f"revoked: {one.entries}, list {one.number} good until {_moment(one.next_update)}")
        for text in self._warnings(found):
            say(text, err=True)

    def _warnings(self, found: Sequence[Standing]) -> list[str]:
        days = self._settings.certificate_device_days
        newest = next((one for one in found if one.kind == ISSUING), None)
        if newest is None or newest.certificate.not_valid_after_utc > self._now + timedelta(days=days):
            return []
        return [
            f"the issuing authority ends within {days} days, and what it signs with it: `sluice ca renew`, then "
            "`sluice ca export` for the brokers"
        ]

    async def _none_yet(self) -> None:
        await self._authorities.hold(self._connection)
        if await self._authorities.standing(self._connection):
            raise ConfigurationError("there is a certificate authority: `sluice ca show`, `sluice ca renew`")

    async def _root(self, root_key: Path | None, passphrase: bytes | None) -> Signer:
        if root_key is None:
            kept = await self._authorities.root(self._connection)
            if kept is None:
                raise ConfigurationError("no key of a root is here: name its file with --root-key")
            return kept.signer
        key = read_key(_read(root_key), passphrase)
        for one in await self._authorities.standing(self._connection):
            if one.kind == ROOT and one.certificate.public_key() == key.public_key():
                return Signer(one.certificate, key)
        raise ConfigurationError(f"{root_key} is the key of no root here: `sluice ca show`")

    async def _add_issuing(self, name: str, root: Signer) -> None:
        name = _checked(name)
        if root.certificate.not_valid_after_utc <= self._now:
            raise ConfigurationError("the root has ended: `sluice ca import` another")
        key = new_key()
        span = Span.of(self._now, self._settings.certificate_issuing_days)
        certificate = make_issuing(name, key, root, span)
        await self._authorities.add(self._connection, ISSUING, Signer(certificate, key), pem_of(root.certificate))
        await self._recorded("ca.created", certificate)

    async def _recorded(self, action: str, certificate: x509.Certificate) -> None:
        name, serial = certificate.subject.rfc4514_string(), serial_of(certificate)
        await audit.record(self._connection, action, fingerprint_of(certificate), name=name, serial=serial)

    # ------------------------------------------------------------ what it signs

    async def export(self, file: Path | None) -> None:
        found = await trusted(self._connection)
        if not found:
            raise ConfigurationError("there is no certificate authority: `sluice ca init`")
        self._give(file, found, "certificates")

    async def server_certificate(self, names: Sequence[str], directory: Path) -> None:
        hosts = [name if _is_address(name) else parsed(HostName, "the name", name) for name in names]
        authority = await self._issuing()
        key = new_key()
        span = Span.of(self._now, self._settings.certificate_server_days)
        certificate = sign_server(authority.signer, key.public_key(), hosts, span)
        await self._recorded("ca.server_certificate", certificate)
        write_file(directory / KEY_FILE, key_pem_of(key), secret=True)
        write_file(directory / CERTIFICATE_FILE, pem_of(certificate) + authority.chain)
        told = {
            "certificate": str(directory / CERTIFICATE_FILE),
            "key": str(directory / KEY_FILE),
            "not_after": _moment(certificate.not_valid_after_utc),
        }
        self._tell(told, "{certificate} and {key}, good until {not_after}".format(**told))

    async def revocation_list(self, file: Path | None) -> None:
        found = await self._lists.current(self._connection)
        if not found:
            raise ConfigurationError("there is no certificate authority: `sluice ca init`")
        self._give(file, "".join(one.pem for one in found), "revocation lists", **_listed(found[0]))

    async def _issuing(self) -> Authority:
        return await self._authorities.issuing(self._connection)

    # ------------------------------------------------------------ how it is told

    def _give(self, file: Path | None, pem: str, what: str, **more: Any) -> None:
        if file is not None:
            write_file(file, pem)
            self._tell({"file": str(file), **more}, f"{what}: {file}")
        elif self._json:
            click.echo(orjson.dumps({"pem": pem, **more}).decode())
        else:
            click.echo(pem, nl=False)

    def _tell(self, told: dict[str, Any], text: str) -> None:
        if self._json:
            click.echo(orjson.dumps(told).decode())
        else:
            say(text)


@asynccontextmanager
async def open_office(settings: Settings) -> AsyncIterator[Office]:
    """Raises `ConfigurationError`, also for what the API would answer with an error; `UnavailableError`."""
    await check_up_to_date(settings)
    connection = await login(settings)
    try:
        async with connection.transaction():
            await connection.execute(f"SET LOCAL ROLE {ADMIN_ROLE}")
            yield Office(connection, settings)
    except Problem as error:
        raise ConfigurationError(error.message) from None
    finally:
        await connection.close()


async def revoke(settings: Settings, device: UUID, reason: Reason) -> None:
    """`sluice ca revoke`."""
    await check_up_to_date(settings)
    connection = await login(settings)
    try:
        organisation = await organisation_of(connection, "device", device)
        async with acting_for(connection, organisation):
            count = await issuing.revoke(connection, organisation, device, reason)
    finally:
        await connection.close()
    if settings.get(DeploySettings).json:
        click.echo(orjson.dumps({"revoked": count}).decode())
    else:
        say(f"{count} certificates are revoked")


def _checked(name: str) -> str:
    """What certificates have room for beside what an authority is."""
    if len(parsed(Name, "the name", name)) > NAME_CHARACTERS_MAX:
        raise ConfigurationError(f"the name has up to {NAME_CHARACTERS_MAX} characters")
    return name


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


# ---------------------------------------------------------------- as lines


def _standing(one: Standing) -> dict[str, Any]:
    certificate = one.certificate
    return {
        "authority_id": str(one.authority),
        "kind": one.kind,
        "subject": certificate.subject.rfc4514_string(),
        "serial": serial_of(certificate),
        "fingerprint": one.fingerprint,
        "not_before": _moment(certificate.not_valid_before_utc),
        "not_after": _moment(certificate.not_valid_after_utc),
        "key": one.key,
    }


def _listed(one: Listed | None) -> dict[str, Any]:
    if one is None:
        return {}
    found = {"number": one.number, "entries": one.entries, "next_update": _moment(one.next_update)}
    return {"revocation_list": found}


def _line(one: Standing) -> list[str]:
    told = _standing(one)
    return [one.kind, told["subject"], f"until {told['not_after']}", f"key {one.key}", one.fingerprint]


def _moment(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")


# ---------------------------------------------------------------- files


def _read(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            raw = opened.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be read: {error.strerror or error}") from error
    if len(raw) > FILE_BYTES_MAX:
        raise ConfigurationError(f"{file} has more than {FILE_BYTES_MAX} bytes")
    return raw

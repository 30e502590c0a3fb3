"""What the tests of certificates share: an authority in a database, requests, and openssl's view of what was made.

Left out: what is expected of them.
"""

import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import NameOID

from api.certificates.authorities import ISSUING, ROOT, Authorities, trusted
from api.certificates.building import Signer, Span, make_issuing, make_root, new_key, pem_of, utc_now
from api.certificates.issuing import Issuer
from api.certificates.revocation import Listed, RevocationLists
from api.certificates.settings import CertificateSettings
from api.registry.devices import add_device
from api.registry.organisations import acting_for, add_organisation
from runtime.ids import uuid7
from runtime.postgres import connect
from runtime.secrets import KeyRing
from tests.databases import Database
from tests.people_rig import RING, People, people

ADMIN_ROLE: Final = "sluice_worker"


@dataclass
class Registry:
    """An installation with an authority, and an organisation in it with a device."""

    database: Database
    ring: KeyRing
    settings: CertificateSettings
    organisation: UUID
    device: UUID

    @property
    def issuer(self) -> Issuer:
        return Issuer(self.ring, self.settings)

    @asynccontextmanager
    async def acting(self, organisation: UUID | None = None) -> AsyncIterator[Any]:
        """A transaction of the API, for the organisation."""
        connection = await connect(self.database.settings, role=None, application="test")
        try:
            async with acting_for(connection, organisation or self.organisation):
                yield connection
        finally:
            await connection.close()

    @asynccontextmanager
    async def app(self) -> AsyncIterator[Any]:
        """A transaction of the API, for nobody."""
        connection = await connect(self.database.settings, role="sluice_app", application="test")
        try:
            async with connection.transaction():
                yield connection
        finally:
            await connection.close()

    async def another_device(self, name: str) -> UUID:
        async with self.acting() as connection:
            return await add_device(connection, self.organisation, None, name, name)

    async def lists(self) -> list[Listed]:
        async with self.app() as connection:
            return await RevocationLists(self.ring, self.settings).current(connection)

    async def list(self) -> x509.CertificateRevocationList:
        """The newest authority's."""
        return x509.load_pem_x509_crl((await self.lists())[0].pem.encode())

    async def trusted(self) -> str:
        async with self.app() as connection:
            return await trusted(connection)


async def add_authority(database: Database, ring: KeyRing = RING, *, end: datetime | None = None) -> Signer:
    """A root and an issuing authority, as `sluice ca init` makes them; the issuing one, which signs."""
    span = Span.of(utc_now(), 100) if end is None else Span.of(utc_now(), 100)._replace(end=end)
    key, own = new_key(), new_key()
    root = Signer(make_root("Test", key, Span.of(utc_now(), 100)), key)
    issuing = Signer(make_issuing("Test", own, root, span), own)
    connection = await connect(database.settings, role=ADMIN_ROLE, application="test")
    async with connection.transaction():
        await Authorities(ring).add(connection, ROOT, root)
        await Authorities(ring).add(connection, ISSUING, issuing, pem_of(root.certificate))
    await connection.close()
    return issuing


@asynccontextmanager
async def people_with_authority(database: Database, **settings: Any) -> AsyncIterator[People]:
    """`settings` are those of `people`."""
    async with people(database, **settings) as here:
        await add_authority(database)
        yield here


async def registry(database: Database, *, ring: KeyRing = RING, **settings: int) -> Registry:
    """`settings` are those of `CertificateSettings`."""
    await add_authority(database, ring)
    return await beside(Registry(database, ring, CertificateSettings(**settings), uuid7(), uuid7()))


async def beside(there: Registry) -> Registry:
    """Another organisation of the installation."""
    organisation, database = uuid7(), there.database
    connection = await connect(database.settings, role=None, application="test")
    async with acting_for(connection, organisation):
        await add_organisation(connection, organisation, "Test")
        device = await add_device(connection, organisation, None, "Device", "device")
    await connection.close()
    return replace(there, organisation=organisation, device=device)


def request_for(key: Any = None, name: str = "somebody else", **more: Any) -> str:
    """A certificate request in PEM, signed with its key, a new one by default."""
    signed = new_key() if key is None else key
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    made = x509.CertificateSigningRequestBuilder().subject_name(subject)
    for extension in more.get("extensions", ()):
        made = made.add_extension(extension, critical=True)
    request = made.sign(signed, more.get("algorithm", hashes.SHA256()))
    return request.public_bytes(serialization.Encoding.PEM).decode()


def openssl(*arguments: str | Path, input_: str = "", is_refused: bool = False) -> str:
    """What openssl prints, on either stream."""
    done = subprocess.run(
        ["openssl", *map(str, arguments)],
        input=input_, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode != 0) is is_refused, done.stdout
    return done.stdout

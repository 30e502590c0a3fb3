"""`sluice ca` as an operator uses it, and a real Mosquitto that lets in whom its certificates and lists let in.

Left out: what is issued over HTTP (`tests.services.test_registration`).
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from cryptography import x509

from api.certificates.authorities import Authorities
from api.certificates.building import (
    PrivateKey,
    Signer,
    Span,
    key_pem_of,
    make_issuing,
    make_root,
    new_key,
    pem_of,
    sign_client,
    utc_now,
)
from api.certificates.issuing import Issued, Issuer
from api.certificates.settings import CertificateSettings
from api.registry.devices import add_device
from api.registry.organisations import acting_for
from runtime.ids import uuid7
from runtime.postgres import connect
from runtime.secrets import KeyRing, new_ring
from runtime.supervisor import EXIT_REFUSED
from tests.certificate_rig import openssl
from tests.databases import Database
from tests.mosquitto import Client, broker
from tests.support import eventually, run
from tests.system.roles import clean_environment, refusal, sluice

PASSPHRASE = "a passphrase of some length"


@dataclass
class Installation:
    """A database that is up to date, and the environment in which commands reach it."""

    database: Database
    environment: dict[str, str]
    ring: KeyRing
    directory: Path

    def ca(self, *arguments: str) -> Any:
        return json.loads(sluice(self.environment, "ca", *arguments, "--json"))

    def asked(self, *arguments: str, answer: str = PASSPHRASE) -> tuple[int, str]:
        """A command that asks for a passphrase: its exit status and what it says."""
        done = subprocess.run(
            [sys.executable, "-m", "deploy.cli", "ca", *arguments],
            env=self.environment, input=f"{answer}\n", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=60, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout

    def refused(self, *arguments: str) -> str:
        return refusal(self.environment, "ca", *arguments)

    def path(self, name: str) -> str:
        return str(self.directory / name)


@pytest.fixture
def there(bare_database: Database, tmp_path: Path) -> Installation:
    ring = new_ring()
    environment = clean_environment(
        **bare_database.environment,
        SLUICE_LOG_URL=f"sqlite:///{tmp_path / 'log'}",
        SLUICE_SECRET_KEYS=str(ring),
    )
    sluice(environment, "migrate")
    (tmp_path / "ca").mkdir()
    return Installation(bare_database, environment, ring, tmp_path / "ca")


def write(there: Installation, name: str, *parts: x509.Certificate | PrivateKey, passphrase: str = "") -> str:
    texts = [
        pem_of(part) if isinstance(part, x509.Certificate) else key_pem_of(part, passphrase.encode() or None)
        for part in parts
    ]
    (there.directory / name).write_text("".join(texts))
    return there.path(name)


# ---------------------------------------------------------------- the authority


def test_an_authority_is_made_once_shown_and_exported(there: Installation) -> None:
    assert "sluice ca init" in there.refused("export")
    assert there.ca("show") == {"authorities": []}
    assert "sluice ca init" in there.refused("server-certificate", "--name", "broker.example")
    made = there.ca("init", "--name", "Ours")["authorities"]
    assert [(one["kind"], one["key"]) for one in made] == [("issuing", "kept"), ("root", "kept")]
    assert made[0]["subject"].startswith("CN=Ours Issuing CA ")
    assert there.ca("show")["authorities"] == made
    assert "sluice ca renew" in there.refused("init")
    assert "up to 40 characters" in there.refused("renew", "--name", "x" * 41)
    shown = sluice(there.environment, "ca", "show")
    assert made[1]["fingerprint"] in shown
    assert there.ca("export", "--output", there.path("roots.pem")) == {"file": there.path("roots.pem")}
    pem = sluice(there.environment, "ca", "export")
    assert (there.directory / "roots.pem").read_text() == pem == there.ca("export")["pem"]
    assert {one.subject.rfc4514_string() for one in x509.load_pem_x509_certificates(pem.encode())} == {
        one["subject"] for one in made
    }


def test_a_broker_s_pair_fits_and_is_its_user_s_alone(there: Installation) -> None:
    there.ca("init")
    there.ca("export", "--output", there.path("roots.pem"))
    names = ("--name", "broker.example", "--name", "::1", "--name", "127.0.0.1")
    told = there.ca("server-certificate", *names, "--output", str(there.directory))
    assert (told["certificate"], told["key"]) == (there.path("server.crt"), there.path("server.key"))
    assert Path(told["key"]).stat().st_mode & 0o777 == 0o600
    public = openssl("pkey", "-in", told["key"], "-pubout")
    assert public == openssl("x509", "-in", told["certificate"], "-noout", "-pubkey")
    checked = ("-purpose", "sslserver", "-verify_hostname", "broker.example", "-CAfile", there.path("roots.pem"))
    openssl("verify", *checked, told["certificate"])
    assert "a host name" in there.refused("server-certificate", "--name", "no host", "--output", there.path(""))


def test_the_root_s_key_goes_and_is_needed_for_the_next_issuing_authority_alone(there: Installation) -> None:
    there.ca("init")
    file = there.path("root.key")
    assert there.asked("take-root-key", file, "--yes", answer="too short") == (
        EXIT_REFUSED, "sluice: the passphrase has 12 characters at least\n",
    )  # fmt: skip
    (there.directory / "taken").write_text("another key")
    status, said = there.asked("take-root-key", there.path("taken"), "--yes")
    assert (status, (there.directory / "taken").read_text()) == (EXIT_REFUSED, "another key"), said
    status, said = there.asked("take-root-key", file, "--yes")
    assert status == 0, said
    assert "ENCRYPTED" in Path(file).read_text()
    assert Path(file).stat().st_mode & 0o777 == 0o600
    openssl("pkey", "-in", file, "-noout", "-passin", f"pass:{PASSPHRASE}")
    states = {one["kind"]: one["key"] for one in there.ca("show")["authorities"]}
    assert states == {"root": "taken away", "issuing": "kept"}
    rows = run(rows_of(there, "SELECT kind FROM certificate_authority_keys"))
    assert [row["kind"] for row in rows] == ["issuing"]
    there.ca("server-certificate", "--name", "broker.example", "--output", str(there.directory))
    assert "--root-key" in there.refused("renew")
    status, said = there.asked("renew", "--root-key", file, answer="a wrong passphrase")
    assert (status, "the passphrase is wrong" in said) == (EXIT_REFUSED, True)
    status, said = there.asked("renew", "--root-key", file, "--json")
    assert status == 0, said
    made = json.loads(said)["authorities"]
    assert [one["kind"] for one in made] == ["issuing", "issuing", "root"]
    assert made[0]["subject"] != made[1]["subject"]
    other = write(there, "other.key", new_key(), passphrase=PASSPHRASE)
    status, said = there.asked("renew", "--root-key", other)
    assert (status, "the key of no root" in said) == (EXIT_REFUSED, True)


async def rows_of(there: Installation, sql: str) -> list[Any]:
    connection = await connect(there.database.settings, role="sluice_worker", application="test")
    try:
        return list(await connection.fetch(sql))
    finally:
        await connection.close()


def test_keys_are_sealed_again_before_a_secret_key_is_dropped(there: Installation) -> None:
    there.ca("init")
    both = there.ring.rotated()
    newest = {**there.environment, "SLUICE_SECRET_KEYS": str(KeyRing(both.keys[:1]))}
    dropped = json.loads(sluice(newest, "ca", "show", "--json"))["authorities"]
    assert {one["key"] for one in dropped} == {"sealed away"}
    assert "SLUICE_SECRET_KEYS" in refusal(newest, "ca", "crl")
    assert "SLUICE_SECRET_KEYS" in refusal(newest, "ca", "reseal")
    there.environment["SLUICE_SECRET_KEYS"] = str(both)
    assert there.ca("reseal") == {"keys": 2}
    assert "BEGIN X509 CRL" in sluice(newest, "ca", "crl")


# ---------------------------------------------------------------- brought along


def root_of(span: Span) -> Signer:
    key = new_key()
    return Signer(make_root("Elsewhere", key, span), key)


def elsewhere() -> tuple[Signer, Signer]:
    """A root and an issuing authority that somebody made without us."""
    root, own = root_of(Span.of(utc_now(), 100)), new_key()
    return root, Signer(make_issuing("Elsewhere", own, root, Span.of(utc_now(), 50)), own)


def test_an_issuing_authority_is_brought_along_with_its_chain(there: Installation) -> None:
    root, issuing = elsewhere()
    certificates = write(there, "issuing.pem", issuing.certificate, root.certificate)
    key = write(there, "issuing.key", issuing.key, passphrase=PASSPHRASE)
    pair = ("import", "--certificate", certificates, "--key", key)
    assert "needs a passphrase" in there.refused(*pair)
    status, said = there.asked(*pair, "--passphrase", answer="wrong")
    assert (status, "the passphrase is wrong" in said) == (EXIT_REFUSED, True)
    status, said = there.asked(*pair, "--passphrase", "--json")
    assert status == 0, said
    (one,) = json.loads(said)["authorities"]
    assert (one["kind"], one["subject"]) == ("issuing", issuing.certificate.subject.rfc4514_string())
    there.ca("export", "--output", there.path("roots.pem"))
    told = there.ca("server-certificate", "--name", "broker.example", "--output", str(there.directory))
    openssl("verify", "-purpose", "sslserver", "-CAfile", there.path("roots.pem"), told["certificate"])
    status, said = there.asked(*pair, "--passphrase")
    assert (status, "is here already" in said) == (EXIT_REFUSED, True)


def test_below_a_root_that_is_brought_along_an_issuing_authority_is_made(there: Installation) -> None:
    root, _ = elsewhere()
    certificates, key = write(there, "root.pem", root.certificate), write(there, "root.key", root.key)
    made = there.ca("import", "--certificate", certificates, "--key", key)["authorities"]
    assert [one["kind"] for one in made] == ["issuing", "root"]
    there.ca("export", "--output", there.path("roots.pem"))
    told = there.ca("server-certificate", "--name", "broker.example", "--output", str(there.directory))
    openssl("verify", "-CAfile", certificates, "-untrusted", there.path("roots.pem"), told["certificate"])


def test_what_is_no_authority_is_refused_with_what_is_wrong(there: Installation) -> None:
    root, issuing = elsewhere()
    other, _ = elsewhere()
    now = utc_now()
    old = root_of(Span(now - timedelta(days=9), now - timedelta(days=1)))
    coming = root_of(Span(now + timedelta(days=1), now + timedelta(days=9)))
    leaf_key = new_key()
    leaf = sign_client(issuing, leaf_key.public_key(), uuid7(), uuid7(), Span.of(now, 1))
    for parts, key, said in (
        ([root.certificate], other.key, "the key is not that of the certificate"),
        ([root.certificate, issuing.certificate], root.key, "was not signed by"),
        ([issuing.certificate], issuing.key, "those above it are missing"),
        ([issuing.certificate, other.certificate], issuing.key, "was not signed by"),
        ([old.certificate], old.key, "ended at"),
        ([coming.certificate], coming.key, "is good from"),
        ([leaf, issuing.certificate, root.certificate], leaf_key, "is no authority's"),
    ):
        files = ("--certificate", write(there, "x.pem", *parts), "--key", write(there, "x.key", key))
        assert said in there.refused("import", *files)
    good = write(there, "root.pem", root.certificate), write(there, "root.key", root.key)
    (there.directory / "nonsense").write_text("nonsense")
    for certificate, file, said in (
        (there.path("nonsense"), good[1], "holds none in PEM"),
        (good[0], there.path("nonsense"), "holds none in PEM"),
        (there.path("none"), good[1], "cannot be read"),
    ):
        assert said in there.refused("import", "--certificate", certificate, "--key", file)
    assert there.ca("show") == {"authorities": []}


# ---------------------------------------------------------------- a broker


async def _issued(there: Installation, organisation: UUID, device: UUID) -> Issued:
    connection = await connect(there.database.settings, role=None, application="test")
    try:
        async with acting_for(connection, organisation):
            issuer = Issuer(there.ring, CertificateSettings())
            return await issuer.issue(connection, organisation, device, None)
    finally:
        await connection.close()


async def _signer(there: Installation) -> Signer:
    connection = await connect(there.database.settings, role="sluice_worker", application="test")
    try:
        return (await Authorities(there.ring).issuing(connection)).signer
    finally:
        await connection.close()


async def _another_device(there: Installation, organisation: UUID) -> UUID:
    connection = await connect(there.database.settings, role=None, application="test")
    try:
        async with acting_for(connection, organisation):
            return await add_device(connection, organisation, None, "Other", "other")
    finally:
        await connection.close()


def client_of(there: Installation, name: str, made: Issued) -> Client:
    return Client.of(there.directory, name, made.presented, made.private_key or "")


def test_mosquitto_lets_in_whom_the_certificates_and_the_list_let_in(
    there: Installation, services: dict[str, str]
) -> None:
    there.ca("init")
    demo = json.loads(sluice(there.environment, "seed", "--json"))
    organisation, device = UUID(demo["organisation_id"]), UUID(demo["device_id"])
    other = run(_another_device(there, organisation))
    good = client_of(there, "good", run(_issued(there, organisation, other)))
    made = run(_issued(there, organisation, device))
    bad = client_of(there, "bad", made)
    now, key = utc_now(), new_key()
    ended = Span(now - timedelta(days=9), now - timedelta(minutes=1))
    old = sign_client(run(_signer(there)), key.public_key(), organisation, other, ended)
    expired = Client.of(there.directory, "expired", pem_of(old), key_pem_of(key))
    stranger = sign_client(elsewhere()[1], key.public_key(), organisation, other, Span.of(now, 9))
    foreign = Client.of(there.directory, "foreign", pem_of(stranger), key_pem_of(key))

    there.ca("export", "--output", there.path("roots.pem"))
    there.ca("crl", "--output", there.path("crl.pem"))
    there.ca("server-certificate", "--name", "127.0.0.1", "--output", str(there.directory))
    with broker(there.directory, acl="pattern readwrite cpi/%u/#\n") as running:
        assert running.lets_in(good)
        assert running.lets_in(bad)
        assert not running.lets_in(expired)
        assert not running.lets_in(foreign)
        # The common name is who is there: what another publishes under it does not arrive.
        spoofed, own = (bad, f"cpi/{other}/alarm"), (good, f"cpi/{other}/telemetry")
        assert running.hears(good, f"cpi/{other}/#", [spoofed, own]) == [f"cpi/{other}/telemetry 1"]

        told = there.ca("revoke", str(device), "--reason", "keyCompromise")
        assert told == {"revoked": 1}
        listed = there.ca("crl", "--output", there.path("crl.pem"))["revocation_list"]
        assert listed["entries"] == 1
        running.reload()
        eventually("the revoked one is refused", lambda: not running.lets_in(bad))
        assert running.lets_in(good)
        assert made.serial_number in openssl("crl", "-in", there.path("crl.pem"), "-noout", "-text").lower()

        # Another issuing authority: its devices are let in once the broker has its list, and the others still are.
        there.ca("renew")
        next_one = client_of(there, "next", run(_issued(there, organisation, device)))
        assert not running.lets_in(next_one)
        there.ca("crl", "--output", there.path("crl.pem"))
        running.reload()
        eventually("the next one is let in", lambda: running.lets_in(next_one))
        assert running.lets_in(good)
        assert not running.lets_in(bad)

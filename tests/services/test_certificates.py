"""Certificates of devices and the lists of revoked ones, on real databases, and read by openssl.

Left out: HTTP (`test_registration`), the command line and brokers (`tests.system.test_authority`).
"""

import asyncio
from datetime import timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID

from api.certificates.authorities import Authorities
from api.certificates.building import Span, pem_of, sign_server, utc_now
from api.certificates.issuing import HOLD, Issued, newest_of, release, revoke
from api.certificates.revocation import RevocationLists
from api.certificates.settings import CertificateSettings
from api.certificates.standing import certificate_stats
from api.http.problems import Problem
from api.registry import devices
from runtime.errors import ConfigurationError
from runtime.ids import uuid7
from runtime.postgres import connect
from runtime.secrets import KeyRing, new_ring
from tests.certificate_rig import Registry, add_authority, beside, openssl, registry, request_for
from tests.databases import Database
from tests.people_rig import RING
from tests.support import run


async def issued(there: Registry, device: Any = None, request: str | None = None) -> Issued:
    async with there.acting() as connection:
        return await there.issuer.issue(connection, there.organisation, device or there.device, request)


async def refused(there: Registry, device: Any = None, request: str | None = None) -> str:
    with pytest.raises(Problem) as problem:
        await issued(there, device, request)
    return problem.value.kind.code


async def revoked(there: Registry, reason: Any = "keyCompromise", device: Any = None) -> int:
    async with there.acting() as connection:
        return await revoke(connection, there.organisation, device or there.device, reason)


def loaded(made: Issued) -> x509.Certificate:
    return x509.load_pem_x509_certificate(made.certificate.encode())


async def reasons(there: Registry) -> dict[str, str | None]:
    """By serial, what the list says of each: None for no reason."""
    found = {}
    for one in await there.list():
        reason = next((extension.value.reason.value for extension in one.extensions), None)
        found[f"{one.serial_number:x}"] = reason
    return found


# ---------------------------------------------------------------- what openssl sees


def test_openssl_verifies_what_was_issued_and_reads_whose_it_is(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        there = await registry(any_database)
        made = await issued(there)
        leaf, chain, roots = tmp_path / "leaf.pem", tmp_path / "chain.pem", tmp_path / "roots.pem"
        leaf.write_text(made.certificate)
        chain.write_text(made.chain)
        roots.write_text(await there.trusted())
        openssl("verify", "-x509_strict", "-purpose", "sslclient", "-CAfile", roots, leaf)
        openssl("verify", "-x509_strict", "-purpose", "sslclient", "-CAfile", roots, "-untrusted", chain, leaf)
        openssl("verify", "-purpose", "sslserver", "-CAfile", roots, leaf, is_refused=True)
        shown = openssl("x509", "-in", leaf, "-noout", "-text", "-subject", "-nameopt", "RFC2253")
        assert f"subject=CN={there.device},O={there.organisation}" in shown
        for said in (
            "CA:FALSE", "Digital Signature", "TLS Web Client Authentication", "X509v3 Authority Key Identifier",
            "X509v3 Subject Key Identifier", "ASN1 OID: prime256v1",
        ):  # fmt: skip
            assert said in shown
        certificate = loaded(made)
        assert certificate.not_valid_after_utc == made.not_after
        assert timedelta(days=99) < made.not_after - utc_now() <= timedelta(days=100)  # its authority ends then
        key = openssl("pkey", "-pubout", input_=made.private_key or "")
        assert key == openssl("x509", "-in", leaf, "-noout", "-pubkey")
        told = openssl("x509", "-in", leaf, "-noout", "-fingerprint", "-sha256", "-serial")
        assert made.fingerprint == told.partition("=")[2].partition("\n")[0].replace(":", "").lower()
        assert made.serial_number == told.rpartition("serial=")[2].strip().lower().lstrip("0")

    run(test())


def test_authorities_may_do_what_they_are_for(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        there = await registry(database)
        issuing, root = x509.load_pem_x509_certificates((await issued(there)).chain.encode())
        (tmp_path / "root.pem").write_text(pem_of(root))
        (tmp_path / "issuing.pem").write_text(pem_of(issuing))
        openssl("verify", "-x509_strict", "-CAfile", tmp_path / "root.pem", tmp_path / "issuing.pem")
        for file, length in (("root.pem", 1), ("issuing.pem", 0)):
            shown = openssl("x509", "-in", tmp_path / file, "-noout", "-text")
            assert f"CA:TRUE, pathlen:{length}" in shown
            assert "Certificate Sign, CRL Sign" in shown

    run(test())


def test_a_broker_s_certificate_is_for_its_names_and_nothing_else(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        there = await registry(database)
        async with there.app() as connection:
            signer = (await Authorities(RING).issuing(connection)).signer
        hosts = ["broker.example", "127.0.0.1", "::1"]
        made = sign_server(signer, ec.generate_private_key(ec.SECP256R1()).public_key(), hosts, Span.of(utc_now(), 9))
        (tmp_path / "server.pem").write_text(pem_of(made))
        (tmp_path / "roots.pem").write_text(await there.trusted())
        verify = ("verify", "-x509_strict", "-CAfile", tmp_path / "roots.pem")
        for named in (["-verify_hostname", "broker.example"], ["-verify_ip", "127.0.0.1"], ["-verify_ip", "::1"]):
            openssl(*verify, "-purpose", "sslserver", *named, tmp_path / "server.pem")
        openssl(*verify, "-verify_hostname", "other.example", tmp_path / "server.pem", is_refused=True)
        openssl(*verify, "-purpose", "sslclient", tmp_path / "server.pem", is_refused=True)

    run(test())


def test_openssl_refuses_by_the_list_what_was_revoked_and_that_alone(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        there = await registry(any_database)
        good = await issued(there, await there.another_device("other"))
        bad = await issued(there)
        (tmp_path / "roots.pem").write_text(await there.trusted())
        for name, made in (("good", good), ("bad", bad)):
            (tmp_path / name).write_text(made.certificate)
        verify = ("verify", "-crl_check", "-CAfile", tmp_path / "roots.pem", "-CRLfile", tmp_path / "list.pem")

        async def write() -> None:
            (tmp_path / "list.pem").write_text("".join(one.pem for one in await there.lists()))

        await write()
        openssl(*verify, tmp_path / "good")
        openssl(*verify, tmp_path / "bad")
        await revoked(there)
        await write()
        openssl(*verify, tmp_path / "good")
        assert "certificate revoked" in openssl(*verify, tmp_path / "bad", is_refused=True)
        shown = openssl("crl", "-in", tmp_path / "list.pem", "-noout", "-text", "-CAfile", tmp_path / "roots.pem")
        assert "verify OK" in shown
        assert "Key Compromise" in shown
        assert "X509v3 CRL Number" in shown
        assert "X509v3 Authority Key Identifier" in shown

    run(test())


# ---------------------------------------------------------------- requests


def test_of_a_request_only_the_key_is_believed(database: Database) -> None:
    async def test() -> None:
        there = await registry(database)
        key = ec.generate_private_key(ec.SECP384R1())
        wishes = [
            x509.BasicConstraints(ca=True, path_length=None),
            x509.SubjectAlternativeName([x509.DNSName("broker.example")]),
        ]
        made = await issued(there, request=request_for(key, str(uuid7()), extensions=wishes))
        certificate = loaded(made)
        assert made.private_key is None
        assert certificate.public_key() == key.public_key()
        names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        assert [name.value for name in names] == [str(there.device)]
        assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        with pytest.raises(x509.ExtensionNotFound):
            certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)

    run(test())


def test_a_request_that_is_not_good_is_refused_and_leaves_nothing(database: Database) -> None:
    forged = request_for()
    # A byte of the signature, at the end of the DER.
    raw = x509.load_pem_x509_csr(forged.encode())
    body = "".join(forged.splitlines()[1:-1])
    swapped = body[:-8] + ("A" if body[-8] != "A" else "B") + body[-7:]
    broken = f"-----BEGIN CERTIFICATE REQUEST-----\n{swapped}\n-----END CERTIFICATE REQUEST-----\n"
    assert raw.is_signature_valid
    bad = [
        "", "nonsense", "é" * 10, "x" * 9_000, broken, forged.replace("REQUEST", "THING"),
        request_for(rsa.generate_private_key(65_537, 1_024)),
        request_for(ec.generate_private_key(ec.SECP521R1())),
        request_for(ed25519.Ed25519PrivateKey.generate(), algorithm=None),
    ]  # fmt: skip

    async def test() -> None:
        there = await registry(database)
        for request in bad:
            assert await refused(there, request=request) == "invalid", request[:80]
        async with there.acting() as connection:
            assert await newest_of(connection, there.organisation, there.device) is None
        assert await issued(there, request=request_for(rsa.generate_private_key(65_537, 2_048)))

    run(test())


def test_only_a_device_of_one_s_own_that_is_there_gets_one(database: Database) -> None:
    async def test() -> None:
        there = await registry(database)
        other = await beside(there)
        assert await refused(there, uuid7()) == "device_not_found"
        assert await refused(there, other.device) == "device_not_found"
        async with there.acting() as connection:
            await devices.remove(connection, there.device, None)
        assert await refused(there) == "device_not_found"

    run(test())


# ---------------------------------------------------------------- renewing and revoking


def test_a_renewed_certificate_stays_good_for_a_while_and_ends_by_itself(database: Database) -> None:
    async def test() -> None:
        there = await registry(database)
        first, second = await issued(there), await issued(there)
        assert await reasons(there) == {}
        async with there.acting() as connection:
            row = await connection.fetchrow("SELECT * FROM certificates WHERE fingerprint = $1", first.fingerprint)
            assert (row["replaced_by"], row["reason"]) == (second.fingerprint, "superseded")
            assert row["revoked_at"] - row["issued_at"] >= timedelta(hours=there.settings.certificate_overlap_hours)
            newest = await newest_of(connection, there.organisation, there.device)
            assert (newest["serial"], newest["revoked_at"]) == (second.serial_number, None)
        await superuser(there, "UPDATE certificates SET revoked_at = clock_timestamp() + interval '300 ms'"
                               " WHERE replaced_by IS NOT NULL")  # fmt: skip
        assert await reasons(there) == {}
        async with asyncio.timeout(30):
            while not (found := await reasons(there)):  # noqa: ASYNC110 - the database's clock decides
                await asyncio.sleep(0.05)
        assert found == {first.serial_number: "superseded"}

    run(test())


async def superuser(there: Registry, sql: str, *values: Any) -> list[Any]:
    connection = await asyncpg.connect(there.database.superuser_url)
    try:
        return list(await connection.fetch(sql, *values))
    finally:
        await connection.close()


def test_revoking_ends_all_that_a_device_has_with_its_reason_once(any_database: Database) -> None:
    async def test() -> None:
        there = await registry(any_database)
        first, second = await issued(there), await issued(there)
        assert await revoked(there, "privilegeWithdrawn") == 2
        assert await revoked(there, "keyCompromise") == 0
        withdrawn = {first.serial_number: "privilegeWithdrawn", second.serial_number: "privilegeWithdrawn"}
        assert await reasons(there) == withdrawn
        third = await issued(there)
        assert await revoked(there, "unspecified") == 1
        assert await reasons(there) == withdrawn | {third.serial_number: None}

    run(test())


def test_what_is_held_is_released_or_revoked_for_good(database: Database) -> None:
    async def test() -> None:
        there = await registry(database)
        first = (await issued(there)).serial_number
        assert await revoked(there, HOLD) == 1
        assert await revoked(there, HOLD) == 0
        assert await reasons(there) == {first: "certificateHold"}
        async with there.acting() as connection:
            assert await release(connection, there.organisation, there.device) == 1
            assert await release(connection, there.organisation, there.device) == 0
        assert await reasons(there) == {}
        await revoked(there, HOLD)
        second = (await issued(there)).serial_number
        async with there.acting() as connection:
            await release(connection, there.organisation, there.device)
        assert await reasons(there) == {first: "superseded"}
        await revoked(there, HOLD)
        assert await revoked(there, "keyCompromise") == 1
        async with there.acting() as connection:
            assert await release(connection, there.organisation, there.device) == 0
        assert await reasons(there) == {first: "superseded", second: "keyCompromise"}

    run(test())


def test_a_device_that_is_deleted_ends_with_its_certificate_and_the_list_outlives_it(any_database: Database) -> None:
    async def test() -> None:
        there = await registry(any_database)
        serial = (await issued(there)).serial_number
        async with there.acting() as connection:
            await devices.remove(connection, there.device, None)
        assert await reasons(there) == {serial: "cessationOfOperation"}
        # As it goes when its site is erased.
        await superuser(there, "DELETE FROM device_sites")
        await superuser(there, "DELETE FROM devices")
        assert await superuser(there, "SELECT FROM certificates") == []
        await superuser(there, "UPDATE certificate_revocation_lists SET is_stale = true")
        assert await reasons(there) == {serial: "cessationOfOperation"}

    run(test())


def test_who_is_issued_one_while_the_device_is_deleted_has_none_that_is_good(database: Database) -> None:
    async def test() -> None:
        there = await registry(database)
        async with there.acting() as connection:
            made = await there.issuer.issue(connection, there.organisation, there.device, None)

            async def remove() -> None:
                async with there.acting() as other:
                    await devices.remove(other, there.device, None)

            removing = asyncio.create_task(remove())
            await waits(there)
        await removing
        assert await reasons(there) == {made.serial_number: "cessationOfOperation"}

    run(test())


async def waits(there: Registry) -> None:
    """Until some session waits for another's lock."""
    sql = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    while not await superuser(there, sql):  # noqa: ASYNC110 - no event tells it
        await asyncio.sleep(0.02)


# ---------------------------------------------------------------- lists


def test_a_list_is_made_when_something_changed_and_each_is_younger_than_the_last(database: Database) -> None:
    async def test() -> None:
        there = await registry(database)
        await issued(there)
        first = await there.list()
        assert await there.list() == first
        found = [first]
        for reason in (HOLD, "superseded"):
            await revoked(there, reason)
            found.append(await there.list())
        numbers = [one.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number for one in found]
        times = [one.last_update_utc for one in found]
        assert sorted(set(numbers)) == numbers
        assert sorted(set(times)) == times
        assert times[-1] < utc_now() < found[-1].next_update_utc  # type: ignore[operator]
        await superuser(there, "UPDATE certificate_revocation_lists SET made_at = now() - interval '25 hours'")
        assert (await there.list()).last_update_utc > times[-1]

    run(test())


def test_what_is_revoked_while_a_list_is_made_is_in_the_next(any_database: Database) -> None:
    async def test() -> None:
        there = await registry(any_database)
        serial = (await issued(there)).serial_number
        await there.list()
        await superuser(there, "UPDATE certificate_revocation_lists SET is_stale = true")
        async with there.app() as connection:
            await RevocationLists(there.ring, there.settings).current(connection)
            revoking = asyncio.create_task(revoked(there))
            await waits(there)
        assert await revoking == 1
        assert set(await reasons(there)) == {serial}

    run(test())


def test_several_who_ask_for_a_list_get_the_same(database: Database) -> None:
    async def test() -> None:
        there = await registry(database)
        await issued(there)
        await revoked(there)
        found = await asyncio.gather(*(there.list() for _ in range(5)))
        assert all(one == found[0] for one in found)

    run(test())


def test_what_has_ended_leaves_the_list_in_time(database: Database) -> None:
    async def test() -> None:
        there = await registry(database)
        await issued(there)
        await revoked(there)
        for days, left in ((29, 1), (31, 0)):
            await superuser(there, f"UPDATE certificate_revocations SET expires_at = now() - interval '{days} days'")
            for _ in range(2):
                await superuser(there, "UPDATE certificate_revocation_lists SET is_stale = true")
                found = await there.list()
            assert len(found) == left

    run(test())


def test_each_authority_has_a_list_of_its_own_until_it_ends(database: Database) -> None:
    async def test() -> None:
        there = await registry(database)
        old = await issued(there)
        await add_authority(database)
        new = await issued(there, await there.another_device("other"))
        assert loaded(old).issuer != loaded(new).issuer
        await revoked(there)
        newest, oldest = [x509.load_pem_x509_crl(one.pem.encode()) for one in await there.lists()]
        assert (newest.issuer, oldest.issuer) == (loaded(new).issuer, loaded(old).issuer)
        assert [one.serial_number for one in oldest] == [loaded(old).serial_number]
        assert len(newest) == 0

    run(test())


def test_lists_that_would_end_before_the_next_one_are_refused() -> None:
    settings = CertificateSettings(crl_lifetime_hours=24, crl_renewal_hours=24)
    with pytest.raises(ConfigurationError, match="SLUICE_CRL_LIFETIME_HOURS"):
        RevocationLists(RING, settings)


# ---------------------------------------------------------------- bounds


def test_an_organisation_has_up_to_so_many_and_revoking_makes_no_room(database: Database) -> None:
    async def test() -> None:
        there = await registry(database, certificates_per_organisation_max=2)
        await issued(there)
        await issued(there)
        await revoked(there)
        assert await refused(there) == "certificate_limit"
        other = await beside(there)
        assert await issued(other)
        await superuser(
            there, "UPDATE certificates SET not_after = now() WHERE organisation_id = $1", there.organisation
        )
        assert await issued(there)

    run(test())


def test_nothing_is_issued_while_the_lists_are_full(database: Database) -> None:
    async def test() -> None:
        there = await registry(database, crl_entries_max=1)
        await issued(there)
        await revoked(there)
        await there.list()
        assert await refused(there) == "certificate_limit"

    run(test())


def test_nothing_is_signed_without_an_authority_or_with_one_that_has_ended(database: Database) -> None:
    async def test() -> None:
        there = await registry(database)
        await superuser(there, "UPDATE certificate_authorities SET not_after = now()")
        assert await refused(there) == "authority_missing"
        assert await there.lists() == []
        await add_authority(database, end=utc_now() + timedelta(days=1))
        made = await issued(there)
        assert made.not_after <= utc_now() + timedelta(days=1)

    run(test())


# ---------------------------------------------------------------- keys


def test_keys_are_sealed_and_sealed_again_before_a_secret_key_goes(database: Database) -> None:
    async def test() -> None:
        old = new_ring()
        there = await registry(database, ring=old)
        rows = await superuser(there, "SELECT sealed_private FROM certificate_authority_keys")
        assert len(rows) == 2
        assert all("PRIVATE" not in row[0] and len(row[0]) > 150 for row in rows)
        both = old.rotated()
        newest = KeyRing(both.keys[:1])
        there.ring = newest
        assert await refused(there) == "authority_missing"
        worker = await connect(database.settings, role="sluice_worker", application="test")
        async with worker.transaction():
            states = {one.key for one in await Authorities(newest).standing(worker)}
            assert states == {"sealed away"}
            assert await Authorities(both).seal_again(worker) == 2
        await worker.close()
        assert await issued(there)

    run(test())


def test_the_api_signs_with_an_issuing_key_and_reaches_no_root_s(any_database: Database) -> None:
    async def test() -> None:
        there = await registry(any_database)
        await issued(there)
        async with there.app() as connection:
            kinds = [row[0] for row in await connection.fetch("SELECT kind FROM certificate_authority_keys")]
            assert kinds == ["issuing"]
        for sql in (
            "DELETE FROM certificate_revocations",
            "INSERT INTO certificate_authority_keys SELECT * FROM certificate_authority_keys",
            "UPDATE certificate_authority_keys SET sealed_private = ''",
            "INSERT INTO certificate_authorities SELECT * FROM certificate_authorities",
            "UPDATE certificates SET device_id = device_id",
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                async with there.acting() as connection:
                    await connection.execute(sql)

    run(test())


def test_certificates_of_others_are_not_there(any_database: Database) -> None:
    async def test() -> None:
        there = await registry(any_database)
        other = await beside(there)
        await issued(there)
        await issued(other)
        async with other.acting() as connection:
            assert await connection.fetchval("SELECT count(*) FROM certificates") == 1
            assert await revoke(connection, there.organisation, there.device, "keyCompromise") == 0
        async with other.app() as connection:
            assert await connection.fetchval("SELECT count(*) FROM certificates") == 0
        assert await reasons(there) == {}

    run(test())


# ---------------------------------------------------------------- how they stand


def test_each_device_stands_where_its_newest_certificate_does(database: Database) -> None:
    async def test() -> None:
        there = await registry(database, certificate_overlap_hours=0)
        names = ("active", "renewed", "soon", "sooner", "gone", "revoked", "deleted")
        found = {name: await there.another_device(name) for name in names}
        for device in (*found.values(), found["renewed"]):
            await issued(there, device)
        for name, days in (("active", 90), ("renewed", 80), ("soon", 20), ("sooner", 10), ("gone", -1)):
            await superuser(
                there,
                "UPDATE certificates SET not_after = now() + make_interval(days => $2) WHERE device_id = $1",
                found[name], days,
            )  # fmt: skip
        await revoked(there, device=found["revoked"])
        async with there.acting() as connection:
            await devices.remove(connection, found["deleted"], None)
            stats = await certificate_stats(connection, there.organisation, 30, 2)
            (now,) = await connection.fetchrow("SELECT now()")
            assert (stats.active, stats.expiring_soon, stats.expired, stats.revoked) == (2, 2, 1, 1)
            assert stats.next_renewal_at is not None
            assert abs(stats.next_renewal_at - (now - timedelta(days=20))) < timedelta(minutes=1)
            assert [(row["device_id"], row["name"]) for row in stats.at_risk] == [
                (found["gone"], "gone"), (found["sooner"], "sooner"),
            ]  # fmt: skip
            assert stats.at_risk[0]["not_after"] < now
            nobody = await certificate_stats(connection, uuid7(), 30, 2)
            assert nobody[:5] == (0, 0, 0, 0, None)

    run(test())

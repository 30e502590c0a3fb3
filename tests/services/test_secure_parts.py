"""TLS and logins towards a real Kafka and a real PostgreSQL: that they work, and what is said when they do not."""

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from runtime.errors import ConfigurationError, UnavailableError
from runtime.log import Expected, LogSettings, create_log, open_log
from runtime.postgres import PostgresSettings, connect, open_pool
from tests.certificates import Authority
from tests.contract.conftest import read_all, run
from tests.secure_parts import SecureParts, secure_parts

VERSION = "SELECT version FROM pg_stat_ssl WHERE pid = pg_backend_pid() AND ssl"
TLS = ("TLSv1.2", "TLSv1.3")
WRONG = "not-the-password"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureParts]:
    with secure_parts(tmp_path_factory.mktemp("secure")) as parts:
        yield parts


@pytest.fixture
def stranger(tmp_path: Path) -> str:
    """The file of an authority that signed nothing here."""
    return Authority(tmp_path).file


def password_in(url: str) -> str:
    return url.partition("@")[0].rpartition(":")[2]


async def make(url: str) -> Expected:
    source = uuid4()
    name = f"test.{source}"
    identity = await create_log(LogSettings(log_url=url), source=source, name=name, partitions=2)
    return Expected(source, name, identity, 2)


# ---------------------------------------------------------------- Kafka


@pytest.mark.parametrize("mechanism", ["SCRAM-SHA-512", "PLAIN"])
def test_records_go_over_tls_with_a_login(parts: SecureParts, mechanism: str) -> None:
    url = f"{parts.log_url}&mechanism={mechanism}"

    async def test() -> None:
        expected = await make(url)
        log = await open_log(LogSettings(log_url=url), expected, client_id="test")
        try:
            assert [await log.append(0, b"one"), await log.append(0, b"two"), await log.append(1, b"three")] == [
                0,
                1,
                0,
            ]
            assert await read_all(log) == {0: [b"one", b"two"], 1: [b"three"]}
        finally:
            await log.close()

    run(test())


def test_a_login_that_kafka_refuses_stops_the_start(parts: SecureParts, caplog: pytest.LogCaptureFixture) -> None:
    password = password_in(parts.log_url)
    wrong = parts.log_url.replace(password, WRONG)
    cases = [
        wrong,
        f"{wrong}&mechanism=PLAIN",
        parts.log_url.replace("kafkas://sluice:", "kafkas://nobody:"),
        f"{parts.log_url}&mechanism=SCRAM-SHA-256",  # this login was made for SCRAM-SHA-512
    ]

    async def test() -> None:
        for url in cases:
            with pytest.raises(ConfigurationError, match="SLUICE_LOG_URL: the login is refused by ") as told:
                await make(url)
            assert WRONG not in str(told.value)
            assert password not in str(told.value)

    with caplog.at_level(logging.DEBUG):
        run(test())
    assert WRONG not in caplog.text
    assert password not in caplog.text


def test_a_broker_that_cannot_be_trusted_is_named(parts: SecureParts, stranger: str) -> None:
    bare, _, file = parts.log_url.partition("?cafile=")
    cases = [
        (f"{bare}?cafile={stranger}", "SLUICE_LOG_URL: the certificate of 127.0.0.1.*is not trusted: .*cafile="),
        (bare, "SLUICE_LOG_URL: the certificate of 127.0.0.1.*is not trusted: .*cafile="),
        (parts.log_url.replace("@127.0.0.1", "@localhost"), "SLUICE_LOG_URL: the certificate of localhost.*ismatch"),
    ]

    async def test() -> None:
        for url, message in cases:
            with pytest.raises(UnavailableError, match=message) as told:
                await make(url)
            assert password_in(bare) not in str(told.value)

    run(test())
    assert Path(file).exists()


def test_files_that_a_log_url_names_are_looked_at(parts: SecureParts, tmp_path: Path) -> None:
    bare = parts.log_url.partition("?")[0]
    junk = tmp_path / "junk"
    junk.write_text("no PEM")
    files = Authority(tmp_path).sign("client", "client")
    locked = Authority(tmp_path).sign("locked", "client", passphrase=b"geheim")
    cases = [
        ("cafile=/not/there", "cafile=/not/there cannot be read"),
        (f"cafile={junk}", "cafile is not what it should be, in PEM"),
        (f"certfile={files.certificate}&keyfile=/not/there", "keyfile=/not/there cannot be read"),
        (f"certfile={files.certificate}&keyfile={junk}", "certfile or keyfile is not"),
        (f"certfile={locked.certificate}&keyfile={locked.key}", "certfile or keyfile is not .* the key is encrypted"),
    ]

    async def test() -> None:
        for options, message in cases:
            with pytest.raises(ConfigurationError, match=f"SLUICE_LOG_URL: {message}"):
                await make(f"{bare}?{options}")

    run(test())


# ---------------------------------------------------------------- PostgreSQL


def test_sessions_go_over_tls_with_a_name_that_was_checked(parts: SecureParts) -> None:
    settings = PostgresSettings(database_url=parts.database_url)
    assert "sslmode=verify-full" in parts.database_url

    async def test() -> None:
        pool = await open_pool(settings, role="sluice_app", application="test")
        try:
            async with pool.acquire() as pooled:
                await pooled.execute("SET ROLE NONE")  # a session's TLS is shown to its login alone
                assert await pooled.fetchval(VERSION) in TLS
        finally:
            await pool.close()
        connection = await connect(settings, role=None, application="test")
        try:
            assert await connection.fetchval(VERSION) in TLS
        finally:
            await connection.close()

    run(test())


def test_what_is_wrong_with_the_database_s_tls_is_named(
    parts: SecureParts, stranger: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bare, _, file = parts.database_url.partition("&sslrootcert=")
    junk = tmp_path / "junk"
    junk.write_text("no PEM")
    password = password_in(bare)
    cases: list[tuple[str, type[Exception], str]] = [
        (
            bare.replace(password, WRONG) + f"&sslrootcert={file}",
            ConfigurationError,
            "SLUICE_DATABASE_URL is refused",
        ),
        (
            f"{bare}&sslrootcert={stranger}",
            UnavailableError,
            "SLUICE_DATABASE_URL: .* is not trusted: .*sslrootcert=",
        ),
        (
            parts.database_url.replace("@127.0.0.1", "@localhost"),
            UnavailableError,
            "SLUICE_DATABASE_URL: .* is not trusted: Hostname mismatch",
        ),
        (f"{bare}&sslrootcert=/not/there", ConfigurationError, "SLUICE_DATABASE_URL: sslrootcert=/not/there cannot"),
        (f"{bare}&sslrootcert={junk}", ConfigurationError, "SLUICE_DATABASE_URL: sslrootcert=.* in PEM"),
        (bare, ConfigurationError, "SLUICE_DATABASE_URL .*root certificate"),
    ]

    async def test() -> None:
        for url, kind, message in cases:
            settings = PostgresSettings(database_url=url)
            for attempt in (
                connect(settings, role="sluice_app", application="test"),
                open_pool(settings, role="sluice_app", application="test"),
            ):
                with pytest.raises(kind, match=message) as told:
                    await attempt
                assert password not in str(told.value)
                assert WRONG not in str(told.value)

    with caplog.at_level(logging.DEBUG):
        asyncio.run(test())
    assert password not in caplog.text

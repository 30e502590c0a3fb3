"""What ingest answers while the database or the log is away, slow, full, or takes only a part."""

import asyncio
import logging
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from bench.proxy import Mode, Proxy
from runtime.errors import OutcomeUnknownError, OverloadedError, UnavailableError
from runtime.log import Log
from runtime.secrets import make_token
from schemas.topics import log_name, partition_of
from tests.ingest_rig import Face, Installation, Reply, Tenant, measured
from tests.landing_rig import until
from tests.support import run

ONE = measured(("temperature", 21.5))


def told_to_retry(reply: Reply, code: str) -> bool:
    assert (reply.status, reply.code) == (503, code)
    return 1 <= int(reply.headers["retry-after"]) <= 5


# ---------------------------------------------------------------- the database


@asynccontextmanager
async def proxied(installation: Installation, **settings: Any) -> AsyncIterator[tuple[Face, Proxy]]:
    """A face whose way to the database can be cut."""
    url = urlsplit(installation.database.url)
    assert url.port is not None
    async with Proxy(0, url.port) as proxy:
        assert proxy._server is not None
        port = proxy._server.sockets[0].getsockname()[1]
        through = installation.database.url.replace(f":{url.port}/", f":{port}/")
        async with installation.face(database_url=through, **settings) as face:
            yield face, proxy


def go_away(proxy: Proxy) -> None:
    proxy.refuse = True
    proxy.cut()


async def serves_known(face: Face, tenant: Tenant) -> None:
    """Whoever was seen before is served."""
    for reply in (
        await face.post(tenant.token, ONE),
        await face.get(f"/v1/ingest/shelly/{tenant.token}?temp=4"),
        await face.post(tenant.gateway, ONE | {"device": "fridge"}),
    ):
        assert reply.status == 202


def test_without_the_database_who_is_known_goes_on_and_who_is_not_may_try_again(
    installation: Installation, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        tenant, later = await installation.tenant(), await installation.tenant()
        await installation.add_device(tenant, "d2")
        unknown = make_token("ds_live_")
        async with proxied(installation, wait_stored_s=0.1) as (face, proxy):
            await serves_known(face, tenant)
            assert (await face.post(unknown, ONE)).status == 401
            assert (await face.post(tenant.gateway, ONE | {"device": "nobody"})).status == 403
            go_away(proxy)
            await until(lambda: _noticed(face))
            for _ in range(3):
                await serves_known(face, tenant)
                for token in (unknown, later.token, later.gateway, make_token("gw_live_")):
                    assert told_to_retry(await face.post(token, ONE), "registry_unavailable")
                for name in ("d2", "nobody"):
                    reply = await face.post(tenant.gateway, ONE | {"device": name})
                    assert told_to_retry(reply, "registry_unavailable")
                assert (await face.post(unknown[:-1] + "!", ONE)).status == 401  # its checksum needs no look-up
                await asyncio.sleep(0.4)  # past the second for which the last look is believed
            reply = await face.post(tenant.token, ONE, Prefer="wait=stored")
            assert reply.status == 202
            receipt = await face.get(f"/v1/receipts/{reply.json()['receipt']}", tenant.token)
            assert told_to_retry(receipt, "registry_unavailable")
            proxy.refuse = False
            await until(lambda: _status(face, later.token, 202))
            await until(lambda: _status(face, unknown, 401))
            await serves_known(face, tenant)
            await until(lambda: _noticed(face, away=False))

    with caplog.at_level(logging.INFO):
        run(test())
    said = [record.getMessage() for record in caplog.records if record.name == "sluice.credentials"]
    assert len(said) == 2  # that it went, and that it is back


async def _noticed(face: Face, *, away: bool = True) -> bool:
    return (face.service._callers._credentials.trouble is not None) == away


async def _status(face: Face, token: str, status: int) -> bool:
    return (await face.post(token, ONE)).status == status


def test_a_database_that_does_not_answer_is_not_waited_for_by_who_is_known(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ingest.credentials._LOOKUP_TIMEOUT_S", 5.0)

    async def test() -> None:
        tenant = await installation.tenant()
        async with proxied(installation) as (face, proxy):
            await serves_known(face, tenant)
            proxy.set_mode(Mode.BLACKHOLE)
            asking = asyncio.create_task(face.post(make_token("ds_live_"), ONE))
            served = 0
            while not asking.done():
                await serves_known(face, tenant)
                served += 1
                await asyncio.sleep(0.05)
            # Who waited for the database would be served once or twice in that time.
            assert served > 4
            assert told_to_retry(await asking, "registry_unavailable")
            proxy.cut()

    run(test())


def test_a_revocation_before_the_database_went_away_holds(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with proxied(installation) as (face, proxy):
            await serves_known(face, tenant)
            await installation.execute(tenant, "UPDATE credentials SET revoked_at = now() WHERE kind = 'device'")
            await until(lambda: _status(face, tenant.token, 401))
            go_away(proxy)
            await until(lambda: _status(face, tenant.token, 503))
            assert (await face.post(tenant.gateway, ONE | {"device": "fridge"})).status == 202

    run(test())


# ---------------------------------------------------------------- the log


@contextmanager
def locked(installation: Installation, face: Face) -> Iterator[None]:
    """Another process holds the log's file: nothing can be written."""
    path = Path(urlsplit(installation.log_settings.log_url).path[1:]) / f"{log_name(face.log.source)}.db"
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        connection.execute("ROLLBACK")
        connection.close()


def test_without_the_log_nothing_is_acknowledged_and_nothing_acknowledged_is_missing(
    installation: Installation,
) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        acknowledged = 0
        async with installation.open_log(log_append_timeout_ms=100) as log, installation.face(log=log) as face:
            acknowledged += (await face.post(tenant.token, ONE)).status == 202
            with locked(installation, face):
                replies = await asyncio.gather(*(face.post(tenant.token, ONE) for _ in range(20)))
                assert {reply.status for reply in replies} == {503}
                assert {reply.code for reply in replies} <= {"log_unavailable", "outcome_unknown"}
                assert {1 <= int(reply.headers["retry-after"]) <= 5 for reply in replies} == {True}
                assert told_to_retry(await face.post(tenant.token, ONE), "log_unavailable")
                assert face.service.trouble is not None
                assert (await face.post(tenant.token, measured(("temperature", None)))).status == 503
            await until(lambda: _status(face, tenant.token, 202))
            acknowledged += 1
            assert sum(record.accepted for record in await face.records_of(tenant.device)) == acknowledged

    run(test())


class Partial:
    """A real log of which some partitions take nothing."""

    def __init__(self, log: Log, failures: dict[int, Exception], *, at_once: bool) -> None:
        self._log = log
        self._failures = failures
        self._at_once = at_once

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)

    def append(self, partition: int, body: bytes) -> "asyncio.Future[int]":
        error = self._failures.get(partition)
        if error is None:
            return self._log.append(partition, body)
        if self._at_once:
            raise error
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        future.set_exception(error)
        return future


async def spread(installation: Installation, tenant: Tenant, log: Log) -> tuple[str, str]:
    """Names of two devices on different partitions, the second on that of `tenant.device`."""
    wanted = partition_of(tenant.device.bytes, log.partitions)
    for number in range(100):
        device = await installation.add_device(tenant, f"d{number}")
        if partition_of(device.bytes, log.partitions) != wanted:
            return f"d{number}", "fridge"
    raise AssertionError("100 devices on one partition")


def test_a_suspended_device_is_told_so_only_once_its_readings_are_kept(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        await installation.execute(tenant, "UPDATE devices SET status = 'suspended'")
        async with installation.open_log(log_append_timeout_ms=100) as log, installation.face(log=log) as face:
            with locked(installation, face):
                assert (await face.post(tenant.token, ONE)).status == 503
                assert (await face.get(f"/v1/ingest/shelly/{tenant.token}?temp=4")).status == 503
                assert told_to_retry(await face.post(tenant.token, ONE), "log_unavailable")
            await until(lambda: _status(face, tenant.token, 403))
            assert [record.accepted for record in await face.records_of(tenant.device)] == [0]

    run(test())


FAILURES: list[tuple[Callable[[str], Exception], bool, str]] = [
    (OverloadedError, True, "overloaded"),
    (UnavailableError, True, "log_unavailable"),
    (UnavailableError, False, "log_unavailable"),
    (OutcomeUnknownError, False, "outcome_unknown"),
]


@pytest.mark.parametrize(("failure", "at_once", "code"), FAILURES)
def test_a_batch_that_is_durable_in_part_says_which_part_to_send_again(
    installation: Installation, failure: Callable[[str], Exception], at_once: bool, code: str
) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.open_log() as log:
            good, bad = await spread(installation, tenant, log)
            failing = partition_of(tenant.device.bytes, log.partitions)
            partial: Any = Partial(log, {failing: failure("no")}, at_once=at_once)
            async with installation.face(log=partial) as face:
                readings = (("co2", 1), ("co2", None), ("co2", 2))
                batch = [measured(*readings, device=name) for name in (bad, good, bad)]
                reply = await face.post(tenant.gateway, batch)
                assert (reply.status, reply.json()["accepted"]) == (202, 2)
                assert [(one["index"], one["code"], one["retryable"]) for one in reply.json()["rejected"]] == [
                    (0, "not_durable", True),
                    (1, "invalid_value", False),
                    (2, "not_durable", True),
                    (4, "invalid_value", False),
                    (6, "not_durable", True),
                    (7, "invalid_value", False),
                    (8, "not_durable", True),
                ]
                assert await face.records_of(tenant.device) == []
                assert told_to_retry(await face.post(tenant.token, ONE), code)
                # What is durable holds refusals only: the client has to send again, so it is told to.
                batch = [measured(("co2", 1), device=bad), measured(("co2", None), device=good)]
                assert told_to_retry(await face.post(tenant.gateway, batch), code)

    run(test())


def test_when_too_much_waits_for_the_log_it_is_503_at_once(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        texts = {"measurements": [{"type": "state", "value": "x" * 900}] * 400}
        log_settings = {"log_queue_bytes_max": 1_000_000, "log_append_timeout_ms": 1_000}
        async with installation.open_log(**log_settings) as log, installation.face(log=log) as face:
            await face.post(tenant.token, ONE)
            with locked(installation, face):
                waiting = [asyncio.create_task(face.post(tenant.token, texts)) for _ in range(2)]
                await until(lambda: _queued(log, 700_000))
                assert told_to_retry(await face.post(tenant.token, texts), "overloaded")
                assert log.queued_bytes <= 1_000_000
            replies = await asyncio.gather(*waiting)
            assert {reply.status for reply in replies} == {202}

    run(test())


async def _queued(log: Log, size: int) -> bool:
    return log.queued_bytes >= size


def test_a_fault_of_ours_is_500_and_logged_without_the_token(
    installation: Installation, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.open_log() as log:
            failing: dict[int, Exception] = {partition: KeyError("bug") for partition in range(log.partitions)}
            broken: Any = Partial(log, failing, at_once=True)
            async with installation.face(log=broken) as face:
                for reply in (
                    await face.post(tenant.token, ONE),
                    await face.get(f"/v1/ingest/shelly/{tenant.token}?temp=1"),
                ):
                    assert (reply.status, reply.code) == (500, "internal_error")
                    assert tenant.token not in reply.body.decode() + caplog.text

    run(test())
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 2

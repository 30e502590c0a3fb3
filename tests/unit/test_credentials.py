"""The cache of credentials: what it believes and for how long, interleaving by interleaving."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID, uuid4

import pytest
from prometheus_client import CollectorRegistry

from ingest.credentials import Credentials, Grant, UnknownTokenError
from ingest.metrics import IngestMetrics
from ingest.settings import IngestSettings
from runtime.clock import ManualClock
from runtime.errors import ConfigurationError, UnavailableError
from tests.support import run

A, B = b"a" * 32, b"b" * 32
SITE = uuid4()


async def passed(condition: Callable[[], bool]) -> None:
    """Let the others run until it holds."""
    async with asyncio.timeout(60):
        while True:
            if condition():
                return
            await asyncio.sleep(0)


class Registry:
    """The database and its notifications, as far as the cache can tell; every query is noted in `asked`."""

    def __init__(self) -> None:
        self.asked: list[list[bytes] | str] = []
        self.polls = 0
        self.epoch = 0
        self.changes: list[dict[str, Any]] = []
        self.grants: dict[bytes, dict[str, Any]] = {}
        self.devices: dict[str, dict[str, Any]] = {}
        self.failure: Exception | None = None
        self.gate: asyncio.Event | None = None
        self.notify: Callable[..., None] = lambda: None

    async def fetch(self, query: str, *arguments: Any) -> list[Any]:
        if query.startswith("SELECT epoch FROM credential_epoch"):
            self.polls += 1
            answer: list[Any] = [{"epoch": self.epoch}]
        elif "credential_changes" in query:
            answer = [change for change in self.changes if change["epoch"] > arguments[0]][: arguments[1]]
        elif "FROM credentials" in query:
            self.asked.append(arguments[0])
            answer = [self.grants[digest] | {"epoch": self.epoch} for digest in arguments[0] if digest in self.grants]
            await self._hold()
        else:
            self.asked.append(arguments[1])
            found = self.devices.get(arguments[1])
            answer = [] if found is None else [found | {"epoch": self.epoch}]
            await self._hold()
        if self.failure is not None:
            raise self.failure
        return answer

    async def _hold(self) -> None:
        if self.gate is not None:
            await self.gate.wait()

    async def listen(self, channel: str, callback: Callable[..., None]) -> None:
        assert channel == "sluice_credentials"
        self.notify = callback
        await asyncio.Event().wait()

    def add(self, digest: bytes, *, device: UUID | None = None, **changes: Any) -> None:
        self.grants[digest] = {
            "token_hash": digest, "kind": "device" if device else "gateway", "organisation_id": UUID(int=1),
            "device_id": device, "site_id": None if device else SITE, "local_id": "fridge", "status": "active",
            "raw_retention_days": 30, "expires_s": None, "limits": None,
        } | changes  # fmt: skip

    def add_device(self, name: str, device: UUID, *, status: str = "active", ends_in_s: float | None = None) -> None:
        self.devices[name] = {"device_id": device, "status": status, "ends_in_s": ends_in_s}

    def change(self, *, token: bytes | None = None, device: UUID | None = None) -> None:
        """Commit a change, whose notification has not come yet."""
        self.epoch += 1
        self.changes.append({"epoch": self.epoch, "token_hash": token, "device_id": device, "organisation_id": None})


class Rig:
    """A cache that follows a registry, on a clock that stands still."""

    def __init__(self, **settings: Any) -> None:
        self.registry = Registry()
        self.clock = ManualClock()
        self.cache = Credentials(
            self.registry,
            self.registry,
            IngestSettings(**settings),
            self.clock,
            IngestMetrics(CollectorRegistry()),
        )

    @asynccontextmanager
    async def started(self) -> AsyncIterator["Rig"]:
        await self.cache.start()
        await self.follow()
        yield self
        await self.cache.stop()

    async def follow(self) -> None:
        """A notification arrives, and the poll it brings about has ended."""
        for _ in range(3):
            await asyncio.sleep(0)
        polls = self.registry.polls
        self.registry.notify()
        await passed(lambda: self.registry.polls > polls)
        for _ in range(5):
            await asyncio.sleep(0)

    async def felt(self, **change: Any) -> None:
        self.registry.change(**change)
        await self.follow()

    async def goes_away(self) -> None:
        self.registry.failure = ConnectionRefusedError("nobody listens")
        await self.follow()

    async def find(self, digest: bytes) -> Grant:
        return await self.cache.find([digest])

    async def unknown(self, digest: bytes) -> None:
        with pytest.raises(UnknownTokenError):
            await self.find(digest)

    async def unavailable(self, digest: bytes) -> None:
        with pytest.raises(UnavailableError):
            await self.find(digest)

    @property
    def asked(self) -> int:
        return len(self.registry.asked)


def test_a_token_is_asked_about_once() -> None:
    async def test() -> None:
        device = uuid4()
        async with Rig().started() as rig:
            rig.registry.add(A, device=device)
            grants = [await rig.find(A) for _ in range(3)]
            assert rig.registry.asked == [[A]]
            assert grants[0] is grants[2] is rig.cache.cached(A)
            expected = ("device", UUID(int=1).bytes, device.bytes, None, "fridge", False, 30, float("inf"))
            fields = (
                "kind",
                "organisation",
                "device",
                "site",
                "local_id",
                "suspended",
                "retention_days",
                "expires_s",
            )
            assert tuple(getattr(grants[0], name) for name in fields) == expected

    run(test())


def test_many_at_once_are_asked_about_together() -> None:
    async def test() -> None:
        async with Rig().started() as rig:
            digests = [bytes([number]) * 32 for number in range(200)]
            for digest in digests:
                rig.registry.add(digest, device=uuid4())
            found = await asyncio.gather(*(rig.find(digest) for digest in digests * 2))
            assert [grant.token_hash for grant in found] == digests * 2
            assert rig.asked <= 2

    run(test())


def test_an_unknown_token_is_remembered_for_a_minute() -> None:
    async def test() -> None:
        async with Rig().started() as rig:
            await rig.unknown(A)
            await rig.unknown(A)
            assert rig.asked == 1
            rig.clock.advance(59.5)
            await rig.follow()
            await rig.unknown(A)
            assert rig.asked == 1
            rig.clock.advance(1.0)
            await rig.follow()
            await rig.unknown(A)
            assert rig.asked == 2

    run(test())


def test_an_unknown_token_that_is_created_is_known_at_once() -> None:
    async def test() -> None:
        async with Rig().started() as rig:
            await rig.unknown(A)
            rig.registry.add(A, device=uuid4())
            await rig.felt(token=A)
            assert (await rig.find(A)).token_hash == A

    run(test())


def test_the_token_of_a_device_that_comes_back_is_known_at_once() -> None:
    async def test() -> None:
        async with Rig().started() as rig:
            device = uuid4()
            await rig.unknown(A)  # the device is deleted
            rig.registry.add(A, device=device)
            await rig.felt(device=device)
            assert (await rig.find(A)).device == device.bytes

    run(test())


def test_a_change_touches_the_token_it_names_and_no_other() -> None:
    async def test() -> None:
        async with Rig().started() as rig:
            rig.registry.add(A, device=uuid4())
            rig.registry.add(B, device=uuid4())
            await rig.find(A)
            await rig.find(B)
            del rig.registry.grants[A]
            await rig.felt(token=A)
            assert rig.cache.cached(A) is None
            await rig.unknown(A)
            await rig.find(B)
            assert rig.registry.asked == [[A], [B], [A]]

    run(test())


def test_a_change_of_a_device_touches_its_tokens() -> None:
    async def test() -> None:
        async with Rig().started() as rig:
            device = uuid4()
            rig.registry.add(A, device=device)
            assert not (await rig.find(A)).suspended
            rig.registry.add(A, device=device, status="suspended")
            await rig.felt(device=device)
            assert (await rig.find(A)).suspended
            assert rig.cache.cached(A) is not None  # read after the change: good for long

    run(test())


def test_a_look_up_that_a_change_overtakes_is_good_for_one_use_only() -> None:
    async def test() -> None:
        async with Rig().started() as rig:
            rig.registry.add(A, device=uuid4())
            rig.registry.gate = asyncio.Event()
            looking = asyncio.create_task(rig.find(A))  # has its answer, which is still on its way
            await passed(lambda: rig.asked == 1)
            del rig.registry.grants[A]
            await rig.felt(token=A)
            rig.registry.gate.set()
            assert (await looking).token_hash == A
            assert rig.cache.cached(A) is None
            await rig.unknown(A)

    run(test())


def test_an_unknown_token_is_not_remembered_when_a_change_overtakes_its_look_up() -> None:
    async def test() -> None:
        async with Rig().started() as rig:
            rig.registry.gate = asyncio.Event()
            looking = asyncio.create_task(rig.find(A))
            await passed(lambda: rig.asked == 1)
            rig.registry.add(A, device=uuid4())
            await rig.felt(token=A)
            rig.registry.gate.set()
            with pytest.raises(UnknownTokenError):
                await looking
            assert (await rig.find(A)).token_hash == A

    run(test())


@pytest.mark.parametrize("epoch", [7, -1])
def test_an_epoch_that_skips_or_goes_back_makes_it_forget_everything(epoch: int) -> None:
    """Old changes are deleted, and a database may be restored from a copy: what changed meanwhile nobody knows."""

    async def test() -> None:
        async with Rig().started() as rig:
            rig.registry.add(A, device=uuid4())
            await rig.felt()
            await rig.find(A)
            await rig.unknown(B)
            rig.registry.epoch = epoch
            rig.registry.changes = [{"epoch": 7, "token_hash": None, "device_id": None, "organisation_id": None}]
            await rig.follow()
            assert rig.cache.cached(A) is None
            rig.registry.add(B, device=uuid4())
            assert (await rig.find(B)).token_hash == B

    run(test())


def test_when_changes_cannot_be_followed_for_a_second_every_use_is_checked() -> None:
    async def test() -> None:
        async with Rig().started() as rig:
            rig.registry.add(A, device=uuid4())
            await rig.find(A)
            await rig.unknown(B)
            rig.clock.advance(1.0)  # no poll has come round, though the database answers
            assert rig.cache.cached(A) is None
            del rig.registry.grants[A]
            rig.registry.add(B, device=uuid4())
            await rig.unknown(A)
            assert (await rig.find(B)).token_hash == B

    run(test())


def test_without_the_database_what_is_known_goes_on_for_its_time() -> None:
    async def test() -> None:
        async with Rig(credential_grace_s=3600.0).started() as rig:
            rig.registry.add(A, device=uuid4())
            known = await rig.find(A)
            await rig.goes_away()
            assert rig.cache.trouble is not None
            rig.clock.advance(3599.0)
            assert rig.cache.cached(A) is known
            assert await rig.find(A) is known
            rig.clock.advance(1.0)
            assert rig.cache.cached(A) is None
            await rig.unavailable(A)

    run(test())


def test_in_the_second_before_the_database_is_known_to_be_away_what_is_known_goes_on_too() -> None:
    async def test() -> None:
        async with Rig().started() as rig:
            rig.registry.add(A, device=uuid4())
            known = await rig.find(A)
            rig.registry.failure = TimeoutError()
            rig.clock.advance(1.0)
            assert rig.cache.cached(A) is None
            assert await rig.find(A) is known

    run(test())


def test_without_the_database_an_unknown_token_is_not_called_unknown() -> None:
    async def test() -> None:
        async with Rig().started() as rig:
            await rig.unknown(A)
            await rig.goes_away()
            rig.clock.advance(1.0)
            await rig.unavailable(A)
            await rig.unavailable(B)
            rig.registry.failure = None
            await rig.follow()
            assert rig.cache.trouble is None
            await rig.unknown(B)

    run(test())


def test_what_was_revoked_before_the_database_went_away_is_not_honoured() -> None:
    async def test() -> None:
        async with Rig().started() as rig:
            rig.registry.add(A, device=uuid4())
            await rig.find(A)
            await rig.felt(token=A)
            await rig.goes_away()
            rig.clock.advance(1.0)
            assert rig.cache.cached(A) is None
            await rig.unavailable(A)

    run(test())


def test_what_changed_while_the_database_was_away_is_felt_when_it_is_back() -> None:
    async def test() -> None:
        async with Rig().started() as rig:
            rig.registry.add(A, device=uuid4())
            await rig.find(A)
            await rig.goes_away()
            del rig.registry.grants[A]
            rig.registry.change(token=A)
            rig.registry.failure = None
            await rig.follow()
            assert rig.cache.cached(A) is None
            await rig.unknown(A)

    run(test())


@pytest.mark.parametrize("failure", [RuntimeError("what?"), ConfigurationError("no such role"), KeyError("epoch")])
def test_whatever_the_database_refuses_is_answered_and_survived(failure: Exception) -> None:
    async def test() -> None:
        async with Rig().started() as rig:
            rig.registry.add(A, device=uuid4())
            rig.registry.failure = failure
            await rig.unavailable(A)
            await rig.follow()
            await rig.unavailable(A)
            rig.registry.failure = None
            await rig.follow()
            assert (await rig.find(A)).token_hash == A

    run(test())


def test_a_token_expires_on_time_and_is_then_unknown() -> None:
    async def test() -> None:
        async with Rig().started() as rig:
            rig.registry.add(A, device=uuid4(), expires_s=rig.clock.now_us() / 1e6 + 0.5)
            await rig.find(A)
            rig.clock.advance(0.499)
            assert rig.cache.cached(A) is not None
            rig.clock.advance(0.001)
            assert rig.cache.cached(A) is None
            await rig.unknown(A)
            await rig.unknown(A)
            assert rig.asked == 2

    run(test())


def test_an_expired_token_is_not_honoured_without_the_database() -> None:
    async def test() -> None:
        async with Rig().started() as rig:
            rig.registry.add(A, device=uuid4(), expires_s=rig.clock.now_us() / 1e6 + 5)
            await rig.find(A)
            await rig.goes_away()
            rig.clock.advance(5.0)
            await rig.unknown(A)

    run(test())


def test_an_entry_is_read_again_after_a_while() -> None:
    async def test() -> None:
        async with Rig(credential_refresh_s=300.0).started() as rig:
            rig.registry.add(A, device=uuid4())
            await rig.find(A)
            rig.clock.advance(300.1)
            await rig.follow()
            rig.registry.add(A, device=uuid4(), raw_retention_days=99)
            assert (await rig.find(A)).retention_days == 99

    run(test())


def test_a_token_under_an_older_key_is_found_and_kept_under_the_newest() -> None:
    async def test() -> None:
        async with Rig().started() as rig:
            newest = b"n" * 32
            rig.registry.add(A, device=uuid4())
            assert (await rig.cache.find([newest, A])).token_hash == A
            assert rig.cache.cached(newest) is not None
            await rig.felt(token=A)
            assert rig.cache.cached(newest) is None

    run(test())


def test_what_is_kept_has_bounds() -> None:
    async def test() -> None:
        async with Rig(credential_cache_entries_max=100, credential_unknown_entries_max=10).started() as rig:
            for number in range(300):
                digest = number.to_bytes(32, "big")
                if number % 2:
                    rig.registry.add(digest, device=uuid4())
                    await rig.find(digest)
                else:
                    await rig.unknown(digest)
            cache = rig.cache
            assert (len(cache._known), len(cache._unknown), len(cache._pending)) == (100, 10, 0)
            assert cache.cached((299).to_bytes(32, "big")) is not None

    run(test())


def test_who_waits_when_it_stops_is_told() -> None:
    async def test() -> None:
        async with Rig().started() as rig:
            rig.registry.gate = asyncio.Event()
            looking = asyncio.create_task(rig.find(A))
            await passed(lambda: rig.asked == 1)
            await rig.cache.stop()
            with pytest.raises(UnavailableError):
                await looking

    run(test())


# ---------------------------------------------------------------- a gateway's devices


async def gateway(rig: Rig) -> Grant:
    rig.registry.add(A)
    return await rig.find(A)


def test_a_device_of_the_site_is_asked_about_once_by_each_of_its_names() -> None:
    async def test() -> None:
        async with Rig().started() as rig:
            grant, device = await gateway(rig), uuid4()
            rig.registry.add_device("d1", device)
            for _ in range(3):
                assert (await rig.cache.site_device(grant, "d1")).device == device.bytes
                assert (await rig.cache.site_device(grant, "nobody")).device is None
            assert rig.registry.asked[1:] == ["d1", "nobody"]

    run(test())


def test_a_move_is_felt_at_once_by_name_and_by_absence() -> None:
    async def test() -> None:
        async with Rig().started() as rig:
            grant, device = await gateway(rig), uuid4()
            rig.registry.add_device("d1", device)
            await rig.cache.site_device(grant, "d1")
            await rig.cache.site_device(grant, "d2")
            rig.registry.devices = {}
            rig.registry.add_device("d2", device)
            await rig.felt(device=device)
            assert (await rig.cache.site_device(grant, "d1")).device is None
            assert (await rig.cache.site_device(grant, "d2")).device == device.bytes

    run(test())


def test_a_move_that_is_known_ahead_is_felt_on_time() -> None:
    async def test() -> None:
        async with Rig().started() as rig:
            grant = await gateway(rig)
            rig.registry.add_device("d1", uuid4(), ends_in_s=0.5)
            await rig.cache.site_device(grant, "d1")
            rig.registry.devices = {}
            rig.clock.advance(0.499)
            assert (await rig.cache.site_device(grant, "d1")).device is not None
            rig.clock.advance(0.001)
            assert (await rig.cache.site_device(grant, "d1")).device is None

    run(test())


def test_without_the_database_a_gateways_devices_go_on_as_long_as_its_token() -> None:
    async def test() -> None:
        async with Rig(credential_grace_s=3600.0, credential_refresh_s=300.0).started() as rig:
            grant, device = await gateway(rig), uuid4()
            rig.registry.add_device("d1", device)
            rig.registry.add_device("moves", uuid4(), ends_in_s=1000.0)
            for name in ("d1", "moves", "nobody"):
                await rig.cache.site_device(grant, name)
            await rig.goes_away()
            rig.clock.advance(999.0)
            assert (await rig.cache.site_device(grant, "d1")).device == device.bytes
            assert (await rig.cache.site_device(grant, "moves")).device is not None
            for name in ("nobody", "new"):  # may exist by now
                with pytest.raises(UnavailableError):
                    await rig.cache.site_device(grant, name)
            rig.clock.advance(1.0)
            with pytest.raises(UnavailableError):
                await rig.cache.site_device(grant, "moves")
            rig.clock.advance(2600.0)
            with pytest.raises(UnavailableError):
                await rig.cache.site_device(grant, "d1")

    run(test())


def test_a_look_up_of_a_device_that_a_move_overtakes_is_not_kept() -> None:
    async def test() -> None:
        async with Rig().started() as rig:
            grant, device = await gateway(rig), uuid4()
            rig.registry.add_device("d1", device)
            rig.registry.gate = asyncio.Event()
            looking = asyncio.create_task(rig.cache.site_device(grant, "d1"))
            await passed(lambda: rig.asked == 2)
            rig.registry.devices = {}
            await rig.felt(device=device)
            rig.registry.gate.set()
            await looking
            assert (await rig.cache.site_device(grant, "d1")).device is None

    run(test())

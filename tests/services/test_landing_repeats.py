"""Messages that their broker sends again land once, whichever bridge had them, and the books say so."""

from pathlib import Path
from typing import Any
from uuid import uuid4

from msgspec.structs import replace

from schemas.record import FENCE_SHIFT, VERSION, Delivery, Quality, Record, Refused
from tests.databases import Database
from tests.landing_rig import NOW, Device, Rig, channel, open_rig, record, sqlite_url
from tests.services.test_verify import verify
from tests.support import run

SESSION = uuid4().bytes
STAMPED = Quality.TIME_STAMPED.value


class Session:
    """What a bridge would say of deliveries, for one device that sends the same again and again."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._arrived = NOW
        self.fence = 1
        self.began = self.next = 1 << FENCE_SHIFT

    def take_over(self) -> None:
        self.fence += 1
        self.began = self.next = self.fence << FENCE_SHIFT

    def reconnect(self) -> None:
        self.began = self.next

    def deliver(
        self, packet: int, *, again: bool = False, floor: int = 0, refused: list[Refused] | None = None
    ) -> Record:
        self._arrived += 1_000
        stamped = channel("power", [(self._arrived, 21.5)], quality=STAMPED)
        delivery = Delivery(SESSION, packet, again, b"the same", self.next, self.began, floor)
        self.next += 1
        made = record(self._device, stamped, received_at=self._arrived, refused=refused or [])
        return replace(made, version=VERSION, way="mqtt", delivery=delivery)


async def stored(rig: Rig) -> list[int]:
    """Times since NOW, in thousandths of a second: a message is told by its arrival."""
    return [(time - NOW) // 1_000 for _, _, time, _, _ in await rig.readings()]


async def _open(rig: Rig) -> Session:
    (device,) = await rig.register()
    return Session(device)


def test_a_message_is_known_again_in_the_same_batch_a_later_one_and_by_another_worker(
    any_database: Database, tmp_path: Path
) -> None:
    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path), keep_landed_h=1) as rig:
            session = await _open(rig)
            first, second = session.deliver(1), session.deliver(2, refused=[Refused(3, "not_finite", "no", b"{}")])
            session.reconnect()
            again = session.deliver(1, again=True)
            await rig.land(first, second, again)
            assert await stored(rig) == [1, 2]
            session.take_over()
            await rig.land(session.deliver(1, again=True))
            await rig.land(session.deliver(2, again=True, refused=[Refused(3, "not_finite", "no", b"{}")]))
            assert await stored(rig) == [1, 2]
            # The newest was repeated: what follows is new, though it looks like what went before.
            await rig.land(session.deliver(1, again=True), session.deliver(2), session.deliver(3))
            assert await stored(rig) == [1, 2, 6, 7, 8]
            assert await rig.ledger() == (9, 5, 3, 0, 1)
            assert (await verify(rig))[1] == []

    run(test())


def test_a_bridge_from_which_the_session_was_taken_lands_nothing_any_more(
    any_database: Database, tmp_path: Path
) -> None:
    """What it still gave to the log the broker repeats to its successor, which may have been quicker."""

    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path), keep_landed_h=1) as rig:
            session = await _open(rig)
            first, stopped = session.deliver(1), session.deliver(2)
            session.take_over()
            repeats = session.deliver(1, again=True), session.deliver(2, again=True)
            await rig.land(first, *repeats, stopped)
            await rig.land(replace(stopped, record_id=uuid4().bytes))
            assert await stored(rig) == [1, 4]
            assert await rig.ledger() == (5, 2, 3, 0, 0)
            assert (await verify(rig))[1] == []

    run(test())


def test_what_is_remembered_is_what_may_be_repeated(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path), keep_landed_h=1) as rig:
            session = await _open(rig)
            for number in range(4):
                await rig.land(session.deliver(number + 1))
            assert await rig.value("SELECT count(*) FROM mqtt_deliveries") == 4
            await rig.land(session.deliver(5, floor=session.next - 1))
            rows: Any = await rig.fetch("SELECT last - began, floor - began FROM mqtt_deliveries ORDER BY landing")
            assert [last for last, _ in rows] == [3, 4]
            session.take_over()
            await rig.land(session.deliver(4, again=True), session.deliver(5, again=True), session.deliver(6))
            assert await stored(rig) == [1, 2, 3, 4, 5, 8]

    run(test())

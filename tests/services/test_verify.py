"""`sluice verify` on a real log and a real store: whatever is made wrong by hand is found and named."""

import asyncio
import struct
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from runtime.clock import SystemClock
from runtime.errors import ConfigurationError
from runtime.ids import uuid7
from schemas.record import VERSION, Idempotency, Note, Origin, Quality, Record, Refused
from tests.databases import Database
from tests.landing_rig import DAY, NOW, SECOND, Device, Rig, channel, open_rig, record, sqlite_url, until
from tests.support import run
from workers.settings import LandingSettings
from workers.verify import store
from workers.verify import strays as strays_pass
from workers.verify.reading import Span
from workers.verify.run import Report, Totals, Verification
from workers.verify.settings import VerifySettings
from workers.verify.store import ALWAYS, NEVER
from workers.verify.tally import Finding
from workers.verify.times import from_datetime

HOUR = 3600 * SECOND
#: Fast, and in pieces so small that every test goes through files.
SETTINGS = VerifySettings(verify_rate=0, verify_sort_readings_max=1_000)


async def verify(
    rig: Rig, *, since: int = NEVER, until: int = ALWAYS, organisation: UUID | None = None
) -> tuple[Report, list[Finding]]:
    found: list[Finding] = []
    verification = Verification(
        rig.postgres,
        SETTINGS,
        LandingSettings(),
        rig.log,
        Span(since, until, organisation),
        clock=SystemClock(),
        emit=found.append,
        say=lambda text: None,
    )
    report = await verification.run()
    return report, found


async def change(rig: Rig, statement: str, *arguments: Any) -> None:
    """Made by hand in SQL; exactly one row."""
    async with rig.superuser() as connection:
        done = await connection.execute(statement, *arguments)
        assert done.rpartition(" ")[2] == "1", done


async def fill(rig: Rig) -> Device:
    """Readings of every fate, landed."""
    (device,) = await rig.register()
    power = [(NOW - 100 * SECOND + at * SECOND, float(at)) for at in range(20)]
    refused = Refused(3, "not_finite", "a value is a finite number", b"{}")
    await rig.land(
        record(
            device, channel("power", power, label="L1"), channel("mode", [(NOW, "eco"), (NOW + 1, "off")], unit="")
        ),
        record(device, channel("power", power[:5], label="L1"), refused=[refused]),
        record(device, channel("power", [(power[0][0], 77.0), (NOW - 500 * DAY, 1.0)], label="L1")),
        record(device, channel("power", [(NOW - 30 * DAY, 5.0), (NOW - 31 * DAY, 4.0)], label="L1")),
    )
    return device


def test_a_store_as_it_must_be(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path), keep_landed_h=1) as rig:
            device = await fill(rig)
            report, found = await verify(rig)
            assert found == []
            assert report.organisations == {
                device.organisation: Totals(
                    received=20 + 2 + 6 + 2 + 2, stored=24, duplicates=5, conflicts=1, quarantined=2
                )
            }
            assert (report.records, report.readings, report.rows) == (4, 31, 24)
            assert (report.compared.hours, report.notes) == (1, [])

    run(test())


#: What somebody does in SQL, and the findings that come of it: kind, metric, time from NOW in µs, value.
TAMPERED: list[tuple[str, list[tuple[str, str | None, int | None, Any]]]] = [
    ("DELETE FROM readings WHERE value = 7", [("lost", "power", -93 * SECOND, 7.0)]),
    ("DELETE FROM readings WHERE value = 4 AND ts < now() - interval '1 day'", [("lost", "power", -31 * DAY, 4.0)]),
    ("DELETE FROM text_readings WHERE value = 'eco'", [("lost", "mode", 0, "eco")]),
    ("UPDATE readings SET value = 8.5 WHERE value = 8", [("lost", "power", -92 * SECOND, 8.0)]),
    ("UPDATE text_readings SET value = 'on' WHERE value = 'off'", [("lost", "mode", 1, "off")]),
    (
        "INSERT INTO readings SELECT series_id, 0, ts + interval '1 microsecond', 3 FROM readings WHERE value = 3",
        [("unexplained", "power", -97 * SECOND + 1, 3.0)],
    ),
    (
        "UPDATE readings SET ts = ts + interval '1 microsecond' WHERE value = 13",
        [("lost", "power", -87 * SECOND, 13.0), ("unexplained", "power", -87 * SECOND + 1, 13.0)],
    ),
    (
        "INSERT INTO text_readings SELECT series_id, 0, ts + interval '1 hour', 'x' FROM text_readings"
        " WHERE value = 'eco'",
        [("unexplained", "mode", HOUR, "x")],
    ),
    (
        "DELETE FROM quarantine WHERE code = 'conflict'",
        [("ledger", None, None, None), ("outcome", None, None, None), ("lost", "power", -100 * SECOND, 77.0)],
    ),
    (
        "DELETE FROM quarantine WHERE code = 'too_old'",
        # It is older than raw readings are kept, so that it might have been stored and gone by that rule.
        [("ledger", None, None, None), ("outcome", None, None, None), ("ledger", None, None, None)],
    ),
    (
        "DELETE FROM quarantine WHERE code = 'not_finite'",
        [("ledger", None, None, None), ("lost", None, None, None), ("outcome", None, None, None)],
    ),
    ("UPDATE ledger SET received = received + 1", [("ledger", None, None, None)]),
    ("UPDATE ledger SET stored = stored - 1, duplicates = duplicates + 1", [("ledger", None, None, None)]),
    # With the quarantine as with the log:
    ("UPDATE ledger SET stored = stored - 1, conflicts = conflicts + 1", [("ledger", None, None, None)] * 2),
    ("DELETE FROM ledger", [("ledger", None, None, None)] * 2),
    ("UPDATE ledger SET conflicts = conflicts + 1, quarantined = quarantined - 1", [("ledger", None, None, None)]),
    ("UPDATE ledger SET discarded = 0, replayed = 7", [("ledger", None, None, None)]),
    ("UPDATE ledger SET expired = 1", [("ledger", None, None, None)]),
    ("UPDATE ledger SET erased = 1", [("ledger", None, None, None)]),
    ("UPDATE quarantine SET state = 'discarded' WHERE code = 'conflict'", [("ledger", None, None, None)]),
    ("UPDATE readings SET quality = 4 WHERE value = 7", [("altered", "power", -93 * SECOND, 7.0)]),
    (
        "UPDATE readings SET quality = 1 WHERE value = 4 AND ts < now() - interval '1 day'",
        [("altered", "power", -31 * DAY, 4.0)],
    ),
    ("UPDATE text_readings SET quality = 8 WHERE value = 'off'", [("altered", "mode", 1, "off")]),
    ("UPDATE outcomes SET duplicates = 4 WHERE duplicates = 5", [("ledger", None, None, None)]),
]


@pytest.mark.parametrize(("statement", "expected"), TAMPERED, ids=[statement for statement, _ in TAMPERED])
def test_what_is_changed_by_hand_is_found_and_named(
    database: Database, tmp_path: Path, statement: str, expected: list[tuple[str, str | None, int | None, Any]]
) -> None:
    async def test() -> None:
        async with open_rig(database, sqlite_url(tmp_path), keep_landed_h=1) as rig:
            device = await fill(rig)
            await change(rig, statement)
            report, found = await verify(rig)
            assert report.differs
            told = []
            for finding in found:
                assert finding.organisation_id == device.organisation
                if finding.kind != "ledger":
                    assert finding.device_id == device.device
                time = None if finding.metric is None else from_now(finding.time)
                told.append((finding.kind, finding.metric, time, finding.value))
            assert told == expected
            lost = sum(kind == "lost" for kind, *_ in expected)
            unexplained = sum(kind == "unexplained" for kind, *_ in expected)
            altered = sum(kind == "altered" for kind, *_ in expected)
            totals = report.organisations[device.organisation]
            assert (totals.lost, totals.altered, totals.unexplained) == (lost, altered, unexplained)

    run(test())


def from_now(text: str | None) -> int:
    """Microseconds of an RFC 3339 time from NOW."""
    assert text is not None
    return from_datetime(datetime.fromisoformat(text)) - NOW


# ---------------------------------------------------------------- gone by a rule


def test_what_went_by_a_rule_is_no_difference(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path), keep_landed_h=1) as rig:
            device = await fill(rig)
            for code, state in (("conflict", "discarded"), ("not_finite", "expired"), ("too_old", "expired")):
                await change(rig, "UPDATE quarantine SET state = $2, payload = '' WHERE code = $1", code, state)
            await change(rig, "UPDATE ledger SET discarded = 1, expired = 2")
            await change(rig, "DELETE FROM readings WHERE value = 4 AND ts < now() - interval '1 day'")
            await change(rig, "DELETE FROM readings WHERE value = 5 AND ts < now() - interval '1 day'")
            await change(rig, "UPDATE organisations SET raw_retention_days = 7")
            report, found = await verify(rig)
            assert found == []
            expected = Totals(received=32, stored=22, duplicates=5, by_rule=5)
            assert report.organisations == {device.organisation: expected}

    run(test())


def test_the_books_are_compared_with_the_quarantine_where_the_log_is_gone(
    any_database: Database, tmp_path: Path
) -> None:
    """Rows that left the quarantine long ago are forgotten: of those only the sum can be told."""

    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path), partitions=1) as rig:
            (device,) = await rig.register()
            refused = [Refused(at, "not_finite", "a value is a finite number", b"{}") for at in range(3)]
            await rig.land(record(device, refused=refused, received_at=NOW - 3 * DAY), record(device))
            await until(lambda: starts_at(rig, 2))
            states = "UPDATE quarantine SET state = $2 WHERE item = $1"
            for item, state in ((0, "released"), (1, "discarded")):
                await change(rig, states, item, state)
            _, found = await verify(rig)
            assert [(one.kind, from_now(one.time) // DAY) for one in found] == [("ledger", -4)]
            await change(rig, "UPDATE ledger SET replayed = 1, discarded = 1")
            report, found = await verify(rig)
            assert (found, report.judged, report.compared.set_aside, report.compared.forgotten) == ([], 0, 1, 0)
            assert report.notes[0].startswith("no reading was compared")
            await change(rig, "DELETE FROM quarantine WHERE state = 'released'")
            report, found = await verify(rig)
            assert (found, report.compared.forgotten) == ([], 1)
            assert any("1 readings left the quarantine" in note for note in report.notes)
            await change(rig, "UPDATE ledger SET replayed = 0, expired = 1")
            assert (await verify(rig))[1] == []
            await change(rig, "UPDATE ledger SET expired = 0")
            _, found = await verify(rig)
            assert [one.message for one in found] == ["2 still in quarantine by the ledger, 1 in quarantine"]
            assert (await verify(rig, since=NOW - DAY))[1] == []

    run(test())


def test_what_leaves_the_quarantine_meanwhile_is_no_difference(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(database, sqlite_url(tmp_path), keep_landed_h=1) as rig:
            await fill(rig)
            ids = [row for (row,) in await rig.fetch("SELECT quarantine_id FROM quarantine")]

            async def discard() -> None:
                if ids:
                    await rig.fetch("SELECT leave_quarantine(ARRAY[$1::uuid], 'discarded', 'meanwhile')", ids.pop())

            for _ in range(4):
                async with between_the_passes(rig, discard):
                    report, found = await verify(rig)
                assert (found, report.compared.set_aside) == ([], 1)
            assert ids == []

    run(test())


@asynccontextmanager
async def between_the_passes(rig: Rig, happens: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """`happens` once positions and books have been read, and before any record or row is."""
    bounds, asked = rig.log.bounds, 0

    async def bounds_meanwhile() -> Any:
        nonlocal asked
        asked += 1
        if asked == 2:  # first for how far back the books are compared, then for what is read
            await happens()
        return await bounds()

    rig.log.bounds = bounds_meanwhile  # type: ignore[method-assign]
    try:
        yield
    finally:
        rig.log.bounds = bounds  # type: ignore[method-assign]
    assert asked == 2


# ---------------------------------------------------------------- flags and notes


NOTES: list[tuple[str, list[tuple[str, float | str]]]] = [
    ("DELETE FROM reading_notes WHERE original_unit = 'K'", [("altered", 26.85)]),
    ("UPDATE reading_notes SET original_unit = 'F' WHERE original_unit = 'K'", [("altered", 26.85)]),
    ("UPDATE reading_notes SET original_time = NULL WHERE original_time = '3.1'", [("altered", 5.0)]),
    ("UPDATE reading_notes SET received_at = now() WHERE original_time = '3.1'", [("altered", 5.0)]),
    ('UPDATE reading_notes SET metadata = \'{"b": 2, "a": 1}\' WHERE metadata IS NOT NULL', [("altered", "eco")]),
    ('UPDATE reading_notes SET metadata = \'{"b": [1, {}], "a": 1.0}\' WHERE metadata IS NOT NULL', []),
    ("UPDATE readings SET quality = 0 WHERE value = 26.85", [("altered", 26.85)]),
    ("UPDATE readings SET value = 6 WHERE value = 5 AND quality = 1", [("lost", 5.0)]),
]


@pytest.mark.parametrize(("statement", "expected"), NOTES, ids=[statement for statement, _ in NOTES])
def test_flags_and_notes_must_stand_as_they_came(
    database: Database, tmp_path: Path, statement: str, expected: list[tuple[str, float | str]]
) -> None:
    async def test() -> None:
        async with open_rig(database, sqlite_url(tmp_path), keep_landed_h=1) as rig:
            (device,) = await rig.register()
            converted = channel("temperature", [(NOW, 26.85), (NOW + 1, 27.0)], quality=Quality.UNIT_CONVERTED)
            replaced = channel("power", [(NOW, 5.0)], quality=Quality.TIME_REPLACED)
            flags = struct.pack(">2h", 0, Quality.BOOLEAN)
            await rig.land(
                record(
                    device,
                    converted,
                    replaced,
                    channel("mode", [(NOW, "eco")]),
                    channel("open", [(NOW, 1.0), (NOW + 1, 0.0)], quality=flags),
                    # On the same series and time as a number with a note, which is the one that stays.
                    channel("temperature", [(NOW + 1, "warm")]),
                    notes=[
                        Note(0, 0, original_unit="K"),
                        Note(0, 1, original_unit="°F"),
                        Note(1, 0, original_time="3.1"),
                        Note(2, 0, metadata=b'{"a":1,"b":[1,{}]}'),
                        Note(4, 0, metadata=b'{"other":1}'),
                    ],
                ),
                # Without a note and flags, and not the first: neither is missed.
                record(device, channel("temperature", [(NOW, 26.85)])),
                record(device, channel("power", [(NOW, 5.0)], quality=Quality.TIME_STAMPED), notes=[Note(0, 0, "9")]),
                # A note that comes late is none of the reading that stands.
                record(device, channel("open", [(NOW, 1.0)]), notes=[Note(0, 0, metadata=b"{}")]),
            )
            report, found = await verify(rig)
            assert (found, report.notes_compared) == ([], 6)
            await change(rig, statement)
            report, found = await verify(rig)
            assert [(one.kind, one.value) for one in found] == expected
            assert {one.device_id for one in found} <= {device.device}
            assert report.organisations[device.organisation].altered == sum(kind == "altered" for kind, _ in expected)

    run(test())


# ---------------------------------------------------------------- rows of nobody


def test_rows_of_no_series_are_found(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path), keep_landed_h=1) as rig:
            device = await fill(rig)
            await rig.land(record(device, *(channel(name, [(NOW, 1.0)]) for name in "abc")))
            await change(rig, "DELETE FROM series WHERE metric = 'b'")  # its row is in a gap, and lost
            last = await rig.value("SELECT max(series_id) FROM series")
            strays = [(last + 1, 3.0), (2**31 - 1, 4.0), (0, 1.0), (-(2**31), 2.0)]
            for series_id, value in strays:
                await change(rig, "INSERT INTO readings VALUES ($1, 0, now(), $2)", series_id, value)
            await change(rig, "INSERT INTO text_readings VALUES ($1, 0, now(), 'x')", last + 1)
            report, found = await verify(rig)
            told = sorted((one.kind, str(one.value)) for one in found)
            values = ("1.0", "1.0", "2.0", "3.0", "4.0", "x")
            assert told == [("lost", "1.0"), *(("unexplained", value) for value in values)]
            assert any(f"under series {last + 1}, which does not exist" in one.message for one in found)
            report, found = await verify(rig, organisation=device.organisation)
            assert [one.kind for one in found] == ["lost"]
            assert any("they were not looked for" in note for note in report.notes)
            _, found = await verify(rig, until=NOW - 40 * DAY)
            assert found == []

    run(test())


def test_many_rows_of_no_series_are_found_each(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gaps and rows by the page: none is left out where one page ends and the next begins."""

    async def test() -> None:
        async with open_rig(database, sqlite_url(tmp_path), keep_landed_h=1) as rig:
            (device,) = await rig.register()
            await rig.land(record(device, *(channel(f"m{at}", [(NOW, 1.0)]) for at in range(20))))
            await rig.fetch("DELETE FROM series WHERE series_id % 3 = 0")
            await rig.fetch(
                "INSERT INTO readings SELECT series_id, 0, now() + nth * interval '1 ms', 1"
                " FROM generate_series(-2, 40) AS series_id, generate_series(1, 5) AS nth"
                " WHERE NOT EXISTS (SELECT FROM series s WHERE s.series_id = series_id.series_id)"
            )
            expected = await rig.value(
                "SELECT count(*) FROM readings WHERE series_id NOT IN (SELECT series_id FROM series)"
            )
            _, found = await verify(rig)
            strays = [one for one in found if one.kind == "unexplained"]
            assert len(strays) == len({(one.message, one.time) for one in strays}) == expected > 100

    monkeypatch.setattr(store, "ROWS_AT_ONCE", 7)
    monkeypatch.setattr(strays_pass, "ROWS_AT_ONCE", 7)
    monkeypatch.setattr(store, "SERIES_IDS_AT_ONCE", 4)
    monkeypatch.setattr(strays_pass, "_GAPS_AT_ONCE", 3)
    run(test())


# ---------------------------------------------------------------- what is not all of the log


def test_nothing_that_could_be_compared_is_said(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(database, sqlite_url(tmp_path), keep_landed_h=1) as rig:
            report, found = await verify(rig)
            assert (found, report.is_empty, report.notes[0][:20]) == ([], True, "nothing was compared")
            device = await fill(rig)
            report, _ = await verify(rig)
            assert (report.is_empty, report.judged, report.notes) == (False, 32, [])
            report, found = await verify(rig, until=NOW - DAY)
            assert (found, report.is_empty, report.judged) == ([], True, 0)
            (other,) = await rig.register()
            report, _ = await verify(rig, organisation=other.organisation)
            assert report.notes[0].startswith("nothing was compared")
            with pytest.raises(ConfigurationError, match=str(device.device)):
                await verify(rig, organisation=device.device)

    run(test())


def test_a_span_and_an_organisation_are_judged_alone(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(database, sqlite_url(tmp_path), keep_landed_h=1) as rig:
            (ours,) = await rig.register()
            (theirs,) = await rig.register()
            hours = [NOW - NOW % HOUR + at * HOUR for at in (-4, -3, -2)]
            for owner in (ours, theirs):
                await rig.land(
                    *(
                        record(owner, channel("a", [(at, 1.0), (at + HOUR // 2, 2.0)]), received_at=at + HOUR // 2)
                        for at in hours
                    ),
                    record(owner, channel("a", [(hours[1] + 1, 3.0)]), received_at=hours[2] + HOUR // 2),
                )
            await change(
                rig,
                "DELETE FROM readings WHERE value = 1 AND ts = (SELECT min(ts) FROM readings)"
                " AND series_id = (SELECT min(series_id) FROM readings)",
            )
            _, found = await verify(rig)
            assert [(one.kind, one.organisation_id) for one in found] == [("lost", ours.organisation)]
            report, found = await verify(rig, organisation=theirs.organisation)
            assert (found, list(report.organisations)) == ([], [theirs.organisation])
            report, found = await verify(rig, since=hours[1], until=hours[2])
            assert found == []
            assert [totals.received for totals in report.organisations.values()] == [2, 2]
            assert report.compared.hours == 2
            await change(
                rig,
                "DELETE FROM readings WHERE ts = (SELECT max(ts) FROM readings)"
                " AND series_id = (SELECT max(series_id) FROM readings)",
            )
            _, found = await verify(rig, since=hours[1], until=hours[2])
            assert found == []
            _, found = await verify(rig, since=hours[1], organisation=theirs.organisation)
            assert [(one.kind, from_now(one.time)) for one in found] == [("lost", hours[2] + HOUR // 2 - NOW)]

    run(test())


def test_what_the_log_no_longer_has_is_not_judged(any_database: Database, tmp_path: Path) -> None:
    """Of rows that records before its start may have brought nothing is said; later ones must have their record."""

    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path), partitions=1) as rig:
            (device,) = await rig.register()
            for at in range(12):  # one by one, for the log deletes what was written together together
                time = NOW + (at - 12) * HOUR
                await rig.append(record(device, channel("a", [(time, float(at)), (time + 1, 0.5)]), received_at=time))
            landed = rig.log.landed
            rig.log.landed = nothing_lands  # type: ignore[method-assign]
            await rig.land()
            await landed({0: 6})
            await until(lambda: starts_at(rig, 6))
            report, found = await verify(rig)
            assert found == []
            assert (report.records, report.covered[0].start, report.rows_not_judged) == (6, 6, 0)
            assert report.compared.hours == 5  # the hour in which it begins may have begun before it
            assert len(report.notes) == 2
            for value in (3, 9):
                await change(
                    rig,
                    "INSERT INTO readings SELECT series_id, 0, ts + interval '5 minutes', value FROM readings"
                    " WHERE value = $1",
                    float(value),
                )
                await change(
                    rig,
                    "DELETE FROM readings WHERE value = $1 AND extract(second FROM ts) ="
                    " (SELECT max(extract(second FROM ts)) FROM readings WHERE value = $1)",
                    float(value + 1),
                )
            _, found = await verify(rig)
            assert sorted((one.kind, one.value) for one in found) == [("lost", 10.0), ("unexplained", 9.0)]

    run(test())


async def nothing_lands(positions: Any) -> None:
    """The log is told by hand what it may delete."""


async def starts_at(rig: Rig, position: int) -> bool:
    return (await rig.log.bounds())[0].start == position


def test_what_the_log_lost_before_it_landed_is_told(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(database, sqlite_url(tmp_path), partitions=1) as rig:
            (device,) = await rig.register()
            for at in range(4):
                await rig.append(record(device, channel("a", [(NOW + at, 1.0)])))
            await rig.log.landed({0: 3})
            await until(lambda: starts_at(rig, 3))
            async with rig.worker():
                await rig.landed()
            _, found = await verify(rig)
            assert [(one.kind, one.position, one.readings) for one in found] == [("gap", 0, 3)]

    run(test())


# ---------------------------------------------------------------- records with more to them than readings


def late(record_: Record, **fields: Any) -> Record:
    """The same, of version 2."""
    values = {name: getattr(record_, name) for name in record_.__struct_fields__}
    return Record(**values | {"version": VERSION} | fields)


def test_records_of_a_spool_named_requests_and_moved_readings(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path), partitions=1, keep_landed_h=1) as rig:
            (device,) = await rig.register()
            spool = uuid7().bytes

            def spooled(number: int, *channels: Any, through: int = 0) -> Record:
                origin = Origin(spool, 0, number, through or number + 1)
                return late(record(device, *channels, refused=[Refused(0, "bad", "bad", b"")]), origin=origin)

            def named(content: bytes, at: int, value: float) -> Record:
                stamped = channel("b", [(NOW + at, value)], quality=Quality.TIME_STAMPED)
                return late(record(device, stamped), idempotency=Idempotency(bytes(16), bytes(16), content * 16))

            first = spooled(0, channel("a", [(NOW, 1.0)]))
            await rig.land(
                first,
                first,
                spooled(1, channel("a", [(NOW, 1.0), (NOW, 2.0)])),
                named(b"a", 0, 1.0),
                named(b"a", 5, 1.0),
                named(b"b", 6, 1.0),
                record(device, channel("b", [(NOW, 1.0)], quality=Quality.TIME_STAMPED)),
            )
            report, found = await verify(rig)
            assert found == []
            totals = Totals(received=9, stored=3, duplicates=2, conflicts=1, quarantined=3)
            assert report.organisations == {device.organisation: totals}
            assert (report.repeats, report.compared.hours) == (1, 2)
            await rig.land(late(spooled(2, through=6), refused=[]))
            _, found = await verify(rig)
            assert [(one.kind, one.readings) for one in found] == [("gap", 4)]
            await change(rig, "DELETE FROM readings WHERE ts = (SELECT max(ts) FROM readings)")
            _, found = await verify(rig)
            assert [(one.kind, one.metric) for one in found] == [("gap", None), ("lost", "b")]

    run(test())


def test_a_released_reading_must_be_stored(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(database, sqlite_url(tmp_path), partitions=1, keep_landed_h=1) as rig:
            device = await fill(rig)
            row = await rig.value("SELECT quarantine_id FROM quarantine WHERE code = 'conflict'")
            replays = [
                late(record(device, channel("power", [(NOW - 9 * DAY, 77.0)], label="L1")), replays=row.bytes)
                for _ in range(2)
            ]
            request = UUID(bytes=replays[0].record_id)
            await change(
                rig,
                "UPDATE quarantine SET state = 'replaying', replay_id = $2 WHERE quarantine_id = $1",
                row,
                request,
            )
            await rig.land(*replays)
            report, found = await verify(rig)
            assert found == []
            assert report.repeats == 1
            expected = Totals(received=33, stored=25, duplicates=5, conflicts=1, quarantined=2)
            assert report.organisations == {device.organisation: expected}
            await change(rig, "DELETE FROM readings WHERE value = 77")
            _, found = await verify(rig)
            assert [(one.kind, one.value) for one in found] == [("lost", 77.0)]

    run(test())


def test_a_record_that_cannot_be_read_must_stand_in_quarantine(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(database, sqlite_url(tmp_path), keep_landed_h=1) as rig:
            await rig.append_raw(1, b"rubbish")
            await rig.land()
            report, found = await verify(rig)
            assert (found, report.records) == ([], 1)
            await change(rig, "DELETE FROM quarantine")
            _, found = await verify(rig)
            assert [(one.kind, one.partition, one.position) for one in found] == [("lost", 1, 0)]

    run(test())


# ---------------------------------------------------------------- beside a live system, and at size


@pytest.mark.parametrize("engine", ["sqlite", "kafka"])
def test_beside_a_worker_that_lands(
    database: Database, tmp_path: Path, services: dict[str, str], engine: str
) -> None:
    """What lands meanwhile is no difference, in rows and in the ledger alike."""

    async def test() -> None:
        url = services["SLUICE_LOG_URL"] if engine == "kafka" else sqlite_url(tmp_path)
        async with open_rig(database, url, keep_landed_h=1) as rig:
            devices = await rig.register(4)
            stop = asyncio.Event()

            async def load() -> None:
                number = 0
                while not stop.is_set():
                    number += 1
                    await rig.append(
                        *(
                            record(device, channel("a", [(NOW + number * 100 + at, 1.0) for at in range(50)]))
                            for device in devices
                        )
                    )

            async with rig.worker(), asyncio.TaskGroup() as group:
                group.create_task(load())
                await until(lambda: has_rows(rig, 2_000))
                for _ in range(3):
                    report, found = await verify(rig)
                    assert found == []
                    assert report.readings >= 2_000
                stop.set()
            await rig.land()
            report, found = await verify(rig)
            assert (found, report.readings) == ([], await rig.value("SELECT count(*) FROM readings"))

    run(test())


@pytest.mark.parametrize("lands", [True, False])
def test_a_transaction_that_is_open_at_the_beginning(database: Database, tmp_path: Path, lands: bool) -> None:
    """Later ones have ended by then, so that its number lies among those whose rows the first snapshot sees."""

    async def test() -> None:
        async with open_rig(database, sqlite_url(tmp_path), keep_landed_h=1) as rig:
            await fill(rig)
            async with rig.superuser() as connection:
                transaction = connection.transaction()
                await transaction.start()
                await connection.execute(
                    "INSERT INTO readings SELECT series_id, 0, ts + interval '1 microsecond', 3 FROM readings"
                    " WHERE value = 3"
                )
                await change(rig, "UPDATE organisations SET name = 'later'")
                async with between_the_passes(rig, transaction.commit if lands else transaction.rollback):
                    report, found = await verify(rig)
            assert (found, report.rows_not_judged) == ([], int(lands))
            _, found = await verify(rig)
            assert [one.kind for one in found] == ["unexplained"] * lands

    run(test())


async def has_rows(rig: Rig, count: int) -> bool:
    return int(await rig.value("SELECT count(*) FROM readings")) >= count


def test_memory_does_not_grow_with_the_log(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(database, sqlite_url(tmp_path), keep_landed_h=1) as rig:
            devices = await rig.register(20)
            peaks = []
            for part in range(2):
                for number in range(part * 400, (1, 2)[part] * 400 + part * 400):
                    time = NOW - DAY + number * SECOND
                    await rig.append(
                        record(
                            devices[number % 20],
                            *(channel(name, [(time + at * 1000, 1.0) for at in range(50)]) for name in "abcde"),
                        )
                    )
                await rig.land()
                tracemalloc.start()
                report, found = await verify(rig)
                peaks.append(tracemalloc.get_traced_memory()[1])
                tracemalloc.stop()
                assert found == []
            assert report.readings == 300_000
            # Three times the readings; what is in memory at once is bounded by the settings.
            assert peaks[1] < peaks[0] * 1.3, peaks

    run(test())

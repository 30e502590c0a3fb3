"""Retention on both databases: what nobody keeps goes, with its chunk where it can, and nothing else does."""

from pathlib import Path

from tests.databases import Database
from tests.landing_rig import DAY, NOW, channel, microseconds, open_rig, record, sqlite_url
from tests.retention_rig import (
    ROLLUPS,
    TABLES,
    compute,
    fill,
    horizon,
    look,
    one_pass,
    repair,
    rolled_up,
    spans,
)
from tests.rollups_rig import moment
from tests.services.test_verify import verify
from tests.support import run
from workers.retention.planning import effective, retired, shares
from workers.rollups.metrics import RollupsMetrics
from workers.rollups.rebuild import Wanted, rebuild


def test_chunks_go_whole_and_rows_of_those_who_keep_less_go_before(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path), keep_landed_h=24) as rig:
            (short,), (long,) = [await rig.register(raw_retention_days=days) for days in (30, 60)]
            await fill(rig, [short, long], 100)
            await compute(rig)
            before, rolled = await look(rig), await rolled_up(rig)
            announced, partial = retired(before), shares(before)
            assert announced and {one.relation for one in announced} == {"readings", "text_readings"}
            assert {one.organisation for one in partial} == {short.organisation}

            went = await one_pass(rig)
            assert went == announced
            after = await look(rig)
            assert {*before.chunks} - {*after.chunks} >= {*announced}
            for device, days in ((short, 30), (long, 60)):
                dropped, deleted = await horizon(rig, device)
                assert dropped == deleted
                assert dropped.hour == dropped.minute == 0
                assert NOW - (days + 8) * DAY < microseconds(dropped) <= NOW - days * DAY
                for table in TABLES[:3]:
                    count, first = await spans(rig, table, device)
                    assert count > 0
                    assert dropped <= first
            assert (await spans(rig, "readings", long))[0] > (await spans(rig, "readings", short))[0]
            assert await rolled_up(rig) == rolled
            report, found = await verify(rig)
            assert found == []
            assert all(totals.by_rule > 0 for totals in report.organisations.values())
            assert await one_pass(rig) == []

    run(test())


def test_nothing_goes_before_it_is_computed_and_clean(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            (device,) = await rig.register(raw_retention_days=30)
            await fill(rig, [device], 60)
            count, _ = await spans(rig, "readings", device)
            assert await one_pass(rig) == []
            assert (await spans(rig, "readings", device))[0] == count
            await compute(rig)
            # It was refused from the first pass on; a mark from before must be repaired first.
            async with rig.superuser() as connection:
                await connection.execute(
                    "INSERT INTO rollup_marks (series_id, first_bucket, last_bucket) SELECT series_id, $1, $1 FROM series",
                    moment(NOW - 55 * DAY - (NOW - 55 * DAY) % (300 * 10**6)),
                )
            assert await one_pass(rig) == []
            await repair(rig)
            rolled = await rolled_up(rig)
            assert len(await one_pass(rig)) > 0
            assert (await spans(rig, "readings", device))[0] < count
            assert await rolled_up(rig) == rolled

    run(test())

"""The books in the worker's metrics: the last day's sums, whether they add up, and what is known to be lost."""

from pathlib import Path

from prometheus_client import CollectorRegistry

from schemas.record import Refused
from tests.databases import Database
from tests.landing_rig import DAY, NOW, channel, open_rig, record, sqlite_url
from tests.support import run
from workers.ledger import LedgerTotals
from workers.metrics import LedgerMetrics
from workers.settings import LedgerSettings


def test_the_sums_of_the_last_day(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path), partitions=1) as rig:
            registry = CollectorRegistry()
            totals = LedgerTotals(rig.postgres, LedgerSettings(), LedgerMetrics(registry))

            def told(name: str, **labels: str) -> float | None:
                return registry.get_sample_value(f"sluice_ledger_{name}", labels)

            for _ in range(2):  # of several organisations
                (device,) = await rig.register()
                await rig.land(
                    record(device, channel("a", [(NOW, 1.0), (NOW + 1, 1.0)]), refused=[Refused(0, "x", "x", b"")]),
                    record(device, channel("a", [(NOW, 1.0), (NOW + 1, 2.0)])),
                    record(device, channel("a", [(NOW - 3 * DAY, 1.0)]), received_at=NOW - 3 * DAY),
                )
            await totals.look()
            fates = {"received": 10, "stored": 4, "duplicates": 2, "conflicts": 2, "quarantined": 2, "lost": 0}
            assert {fate: told("readings", outcome=fate) for fate in fates} == fates
            assert told("unaccounted_readings") == 0
            assert (told("lost_records", where="log"), told("lost_records", where="spool")) == (0, 0)
            async with rig.superuser() as connection:
                await connection.execute("UPDATE ledger SET stored = stored - 1 WHERE received = 5")
                await connection.execute("UPDATE log_positions SET lost = 7")
                await connection.execute("INSERT INTO spool_losses VALUES (gen_random_uuid(), 0, 3, 5)")
            await totals.look()
            assert told("unaccounted_readings") == 2
            assert (told("lost_records", where="log"), told("lost_records", where="spool")) == (7, 2)

    run(test())

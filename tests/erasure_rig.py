"""What the tests of erasing share: an organisation with sites and devices of any history, deletions, and an eraser.

Left out: what lands and what is asked (`tests.landing_rig`).
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import UUID

from prometheus_client import CollectorRegistry

from api.readings.raw import SpanRead, read_page
from api.readings.series import Selection, find
from api.registry import sites
from api.registry.organisations import acting_for, add_organisation
from runtime.clock import SystemClock
from runtime.ids import uuid7
from runtime.postgres import connect
from tests.landing_rig import Device, Rig, microseconds, until
from tests.services.test_verify import verify
from workers.erasure.eraser import Eraser
from workers.erasure.metrics import ErasureMetrics
from workers.erasure.settings import ErasureSettings
from workers.rollups.metrics import RollupsMetrics
from workers.verify.tally import Finding

EPOCH: Final = datetime(2000, 1, 1, tzinfo=UTC)
#: Many steps, without waiting.
SETTINGS: Final = ErasureSettings(erasure_tokens_s=0, erasure_pause_ms=0, erasure_step_rows=3, erasure_step_devices=1)
#: Where ids of sites and devices may stay: they are not names, and what is compared with the log needs them.
KEPT: Final = {"erasures", "tombstones", "erased_series", "credential_changes", "idempotency_keys"}
_NAMED: Final = """
SELECT DISTINCT c.relname, a.attname FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r' AND NOT a.attisdropped
  AND a.attname IN ('site_id', 'device_id', 'subject_id')
"""


def moment(us: int) -> datetime:
    return EPOCH + timedelta(microseconds=us)


@dataclass
class Estate:
    """An organisation in the database of a rig."""

    rig: Rig
    organisation: UUID = field(default_factory=uuid7)
    metrics: ErasureMetrics = field(default_factory=lambda: ErasureMetrics(CollectorRegistry()))

    @asynccontextmanager
    async def acting(self) -> AsyncIterator[Any]:
        """A transaction of the API for the organisation."""
        connection = await connect(self.rig.postgres, role=None, application="test")
        try:
            async with acting_for(connection, self.organisation):
                yield connection
        finally:
            await connection.close()

    async def site(self, name: str) -> UUID:
        async with self.acting() as connection:
            return await sites.create(connection, self.organisation, sites.NewSite(name, name))

    async def device(self, *stays: tuple[UUID | None, int], name: str = "") -> Device:
        """One that stands at each of these sites from that time on, in microseconds since 2000.

        At the first it stands from the beginning of time, as every device does.
        """
        device = Device(self.organisation, uuid7())
        async with self.rig.superuser() as connection, connection.transaction():
            await connection.execute(
                "INSERT INTO devices (device_id, organisation_id, name, local_id) VALUES ($1, $2, 'test', $3)",
                device.device, self.organisation, name or device.device.hex,
            )  # fmt: skip
            await connection.executemany(
                "INSERT INTO device_sites (device_id, organisation_id, site_id, valid_from)"
                " VALUES ($1, $2, $3, CASE WHEN $5::int = 0 THEN '-infinity' ELSE $4::timestamptz END)",
                [
                    (device.device, self.organisation, site, moment(since), number)
                    for number, (site, since) in enumerate(stays)
                ],
            )
        return device

    async def delete(self, site: UUID) -> None:
        async with self.acting() as connection:
            await sites.begin_erasure(connection, site)

    def eraser(self) -> Eraser:
        rollups = RollupsMetrics(CollectorRegistry())
        return Eraser(self.rig.postgres, SETTINGS, self.rig.log, SystemClock(), self.metrics, rollups)

    async def state(self, site: UUID) -> str:
        found: str = await self.rig.value("SELECT state FROM erasures WHERE site_id = $1", site)
        return found

    async def erase(self, site: UUID) -> None:
        """Until nothing of it is left."""
        eraser = self.eraser()

        async def done() -> bool:
            await eraser.keep()
            return await self.state(site) == "done"

        await until(done)

    async def erased(self, site: UUID) -> tuple[int, ...]:
        """Readings, texts, notes, quarantine rows and devices that were removed with it."""
        columns = "readings, text_readings, notes, quarantined, devices"
        ((*counts,),) = await self.rig.fetch(f"SELECT {columns} FROM erasures WHERE site_id = $1", site)
        return tuple(counts)

    async def shown(self, site: UUID) -> list[tuple[str, int, float | str]]:
        """What the API gives for the site: metric, time and value, in order of time."""
        async with self.acting() as connection:
            wanted = SpanRead(None, None, False, 10_000)
            found = await find(connection, Selection(site_id=site), None, None, 1_000)
            page = await read_page(connection, found, wanted, None)
            return [
                (
                    found.series[row["series_id"]].metric,
                    microseconds(row["ts"]),
                    row["value"] if row["text_value"] is None else row["text_value"],
                )
                for row in page.rows
            ]

    async def traces(self, *ids: UUID) -> dict[str, int]:
        """In how many rows of which tables these sites and devices are named, where they may not be."""
        async with self.rig.superuser() as connection:
            found = {}
            for table, column in await connection.fetch(_NAMED):
                rows = await connection.fetchval(f"SELECT count(*) FROM {table} WHERE {column} = ANY ($1)", ids)
                if rows and table not in KEPT:
                    found[f"{table}.{column}"] = rows
            return found

    async def books(self) -> tuple[int, ...]:
        """Received, stored, duplicates, conflicts, quarantined, erased, replayed of the organisation."""
        columns = ("received", "stored", "duplicates", "conflicts", "quarantined", "erased", "replayed")
        sums = ", ".join(f"coalesce(sum({column}), 0)::int" for column in columns)
        ((*counts,),) = await self.rig.fetch(
            f"SELECT {sums} FROM ledger WHERE organisation_id = $1", self.organisation
        )
        assert counts[0] == sum(counts[1:6])
        return tuple(counts)

    async def differences(self) -> list[Finding]:
        return (await verify(self.rig))[1]


@asynccontextmanager
async def estate(rig: Rig) -> AsyncIterator[Estate]:
    made = Estate(rig)
    async with made.acting() as connection:
        await add_organisation(connection, made.organisation, "Test")
    yield made

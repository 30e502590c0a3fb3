"""What the tests of retention share: months of readings of several organisations, and passes.

Left out: what lands (`tests.landing_rig`), how roll-ups are taken step by step (`tests.rollups_rig`).
"""

from collections.abc import Sequence
from typing import Any, Final

from prometheus_client import CollectorRegistry

from schemas.record import Note
from tests.landing_rig import DAY, NOW, SECOND, Device, Rig, channel, record, until
from tests.rollups_rig import Actor, GatedCloser, GatedRepairer
from workers.retention.keeper import Retention
from workers.retention.metrics import RetentionMetrics
from workers.retention.planning import Chunk, Standing
from workers.retention.settings import RetentionSettings
from workers.rollups.metrics import RollupsMetrics
from workers.rollups.session import open_session

HOUR: Final = 3_600 * SECOND
SETTINGS: Final = RetentionSettings(
    retention_settle_s=20,
    retention_lock_timeout_ms=50,
    retention_lock_tries=2,
    retention_step_rows=7,
    retention_pause_ms=0,
)
TABLES: Final = ("readings", "text_readings", "reading_notes", "rollups_5m", "rollups_1h", "rollups_1d")
ROLLUPS: Final = TABLES[3:]


def keeper(rig: Rig, settings: RetentionSettings = SETTINGS, registry: CollectorRegistry | None = None) -> Retention:
    metrics = RetentionMetrics(registry or CollectorRegistry())
    return Retention(rig.postgres, settings, metrics, RollupsMetrics(CollectorRegistry()))


def session(rig: Rig) -> Any:
    return open_session(rig.postgres, RollupsMetrics(CollectorRegistry()))


async def one_pass(rig: Rig, settings: RetentionSettings = SETTINGS) -> list[Chunk]:
    """The chunks that went."""
    async with session(rig) as opened:
        return (await keeper(rig, settings).follow(opened)).chunks


async def look(rig: Rig, settings: RetentionSettings = SETTINGS) -> Standing:
    async with session(rig) as opened:
        return await keeper(rig, settings).look(opened.connection)


async def compute(rig: Rig, through: int = NOW) -> None:
    """Roll-ups up to then, as if everything received before had landed."""
    computed = "SELECT computed_through = closing_through AND isfinite(closing_through) FROM rollup_state"

    async def is_done() -> bool:
        actor = Actor()
        await actor.start(GatedCloser(rig, actor, lambda: through).keep())
        await actor.finish()
        return bool(await rig.value(computed))

    await until(is_done)  # other databases of the server have transactions too


async def repair(rig: Rig) -> None:
    actor = Actor()
    await actor.start(GatedRepairer(rig, actor).keep())
    await actor.finish()


async def fill(rig: Rig, devices: Sequence[Device], days: int, every: int = 8 * HOUR) -> None:
    """Numbers, texts, and a note a record, up to now; each record received when its last reading was taken."""
    span = 20 * DAY
    records = []
    for start in range(NOW - days * DAY, NOW, span):
        times = range(start, min(start + span, NOW), every)
        for device in devices:
            numbers = channel("power", [(time, float(time // HOUR % 97)) for time in times])
            texts = channel("mode", [(time, "on") for time in times], unit="")
            note = Note(0, 0, metadata=b"{}")
            records.append(record(device, numbers, texts, received_at=times[-1], notes=[note]))
    await rig.land(*records)


async def spans(rig: Rig, table: str, device: Device) -> tuple[int, Any]:
    """How many rows a device has there, and the first time."""
    time = "bucket" if table in ROLLUPS else "ts"
    query = f"SELECT count(*), min({time}) FROM {table} JOIN series USING (series_id) WHERE device_id = $1"
    ((count, first),) = await rig.fetch(query, device.device)
    return count, first


async def rolled_up(rig: Rig) -> list[Any]:
    """All roll-ups of all tiers."""
    return [await rig.fetch(f"SELECT * FROM {table} ORDER BY series_id, bucket") for table in ROLLUPS]


async def horizon(rig: Rig, device: Device, tier: str = "raw") -> Any:
    """Up to where it was let go, and rows were deleted."""
    query = "SELECT dropped_through, deleted_through FROM retention_horizons WHERE organisation_id = $1 AND tier = $2"
    rows = await rig.fetch(query, device.organisation, tier)
    return rows[0] if rows else None

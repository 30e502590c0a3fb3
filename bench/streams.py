"""What the API takes to stream a series' raw readings: CPU of its process, and memory by the length of the span.

One request at a time over loopback, its body read and thrown away. `measure` stands on parts of its own, `figures` on
a workshop that is there already. Left out: the database's own time, but for what the client waits.
"""

import asyncio
import http.client
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import urlencode
from uuid import UUID

import asyncpg

from bench.api import add_key
from bench.errors import BenchError
from bench.parts import Parts, Workshop, progress, real_parts, workshop
from bench.registry import Registered, register
from bench.usage import cpu_s, forget_peak, free_port, memory_bytes

FORMS: Final = ("columns", "arrow", "csv", "ndjson")
START: Final = datetime(2026, 1, 5, tzinfo=UTC)
DAY: Final = timedelta(days=1)
READINGS_A_DAY: Final = 86_400
#: Of the long span, in whose course memory has to stay where it was.
DAYS: Final = 20
ANSWERS: Final = 10
UNMEASURED: Final = 3
READ_BYTES: Final = 262_144

_ACT: Final = "SELECT set_config('sluice.organisation', $1, true)"
_SERIES: Final = """
INSERT INTO series (organisation_id, device_id, metric, unit) VALUES ($1, $2, 'temperature', '°C')
RETURNING series_id"""
_WEEKS: Final = "SELECT ensure_week($1::timestamptz + n * interval '7 days') FROM generate_series(0, $2) n"
_READINGS: Final = """
INSERT INTO readings SELECT $1, 0, $2::timestamptz + n * interval '1 second', 20 + (n % 1000)::float8 / 100
FROM generate_series(0, $3) n"""


class StreamFigure(NamedTuple):
    """One form: an answer of a day at one reading a second."""

    form: str
    readings: int
    bytes: int
    cpu_s: float
    """Of the API's process, for one answer."""
    seconds: float
    """That the client waited for it."""
    peak_day_bytes: int
    """Peak memory of the process during an answer of a day, and during one of `DAYS`."""
    peak_days_bytes: int

    @property
    def readings_per_cpu_s(self) -> float:
        return self.readings / self.cpu_s


def measure(services: Path) -> list[StreamFigure]:
    """Raises `BenchError` when a run cannot be made."""
    with real_parts(services) as parts, asyncio.Runner() as runner:
        return runner.run(_measure(parts))


async def _measure(parts: Parts) -> list[StreamFigure]:
    connection = await asyncpg.connect(parts.database_url)
    try:
        registered = await register(connection, parts.environment["SLUICE_SECRET_KEYS"], 1, overrides=False)
        async with workshop(parts) as shop:
            return await figures(parts, shop, connection, registered)
    finally:
        await connection.close()


async def figures(parts: Parts, shop: Workshop, connection: Any, registered: Registered) -> list[StreamFigure]:
    """Of every form, with an API of its own each, whose memory nobody else's answers have grown.

    `connection` is a session of the login itself, without a role; the first device gets the series.
    """
    device = registered.devices[0]
    progress(f"filling {DAYS} days at one reading a second")
    async with connection.transaction():
        await connection.execute(_ACT, str(registered.organisation))
        await connection.execute("SET LOCAL ROLE sluice_worker")
        series = await connection.fetchval(_SERIES, registered.organisation, device)
        await connection.execute(_WEEKS, START, DAYS // 7 + 1)
        await connection.execute(_READINGS, series, START, DAYS * READINGS_A_DAY - 1, timeout=600)
    async with connection.transaction():
        await connection.execute("SET LOCAL ROLE sluice_app")
        await connection.execute(_ACT, str(registered.organisation))
        key = await add_key(connection, registered, parts)
    await _vacuumed(parts)
    return [await _figure(shop, form, device, key) for form in FORMS]


async def _vacuumed(parts: Parts) -> None:
    """What autovacuum does in time: pages that the index alone may answer for."""
    connection = await asyncpg.connect(parts.owner_url)
    await connection.execute("VACUUM (ANALYZE) readings", timeout=600)
    await connection.close()


async def _figure(shop: Workshop, form: str, device: UUID, key: str) -> StreamFigure:
    progress(f"streaming as {form}")
    port = free_port()
    role = await shop.role("api", SLUICE_API_LISTEN=f"127.0.0.1:{port}")
    client = http.client.HTTPConnection("127.0.0.1", port)

    def answer(days: int) -> int:
        return _read(client, key, {"device_id": str(device), "from": _text(0), "to": _text(days), "format": form})

    for _ in range(UNMEASURED):
        size = await asyncio.to_thread(answer, 1)
    before, began = cpu_s(role.pid), time.perf_counter()
    for _ in range(ANSWERS):
        await asyncio.to_thread(answer, 1)
    taken_s, seconds = cpu_s(role.pid) - before, time.perf_counter() - began
    peaks = []
    for days in (1, DAYS):
        forget_peak(role.pid)
        await asyncio.to_thread(answer, days)
        peaks.append(memory_bytes(role.pid, "VmHWM"))
    await role.stop()
    return StreamFigure(form, READINGS_A_DAY, size, taken_s / ANSWERS, seconds / ANSWERS, *peaks)


def _text(days: int) -> str:
    return (START + days * DAY).isoformat()


def _read(client: http.client.HTTPConnection, key: str, query: dict[str, str]) -> int:
    """Bytes of the body, read to its end."""
    client.request("GET", f"/api/v1/readings?{urlencode(query)}", headers={"Authorization": f"Bearer {key}"})
    answer = client.getresponse()
    if answer.status != 200:
        raise BenchError(f"a stream was answered {answer.status}: {answer.read(200)!r}")
    size = 0
    while chunk := answer.read(READ_BYTES):
        size += len(chunk)
    return size


def table(found: Sequence[StreamFigure]) -> list[tuple[str, ...]]:
    """Rows for a report: form, MB, CPU ms, readings per CPU second, ms waited, peak MB of a day and of many."""
    return [
        (
            one.form,
            f"{one.bytes / 1e6:.1f}",
            f"{one.cpu_s * 1e3:.1f}",
            f"{one.readings_per_cpu_s:,.0f}",
            f"{one.seconds * 1e3:.0f}",
            f"{one.peak_day_bytes / 1e6:.0f}",
            f"{one.peak_days_bytes / 1e6:.0f}",
        )
        for one in found
    ]

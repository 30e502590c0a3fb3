"""What an erasure that has ended should have removed, and did not: rows in times of which nothing may be left.

Left out: rows that are explained by no record (`matching`) or are of no series (`strays`).
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Final
from uuid import UUID

from workers.landing.tombstones import Span, within
from workers.verify.claims import TAIL_BYTES
from workers.verify.matching import shown
from workers.verify.pace import Pace
from workers.verify.reading import Span as Asked
from workers.verify.store import Store, Tombstone
from workers.verify.tally import Finding, Findings
from workers.verify.times import as_text

_DEVICES_AT_ONCE: Final = 100


async def find_left_overs(
    store: Store, finished: Sequence[Tombstone], asked: Asked, findings: Findings, pace: Pace
) -> None:
    """Tell of every such row with a time in the span, of a batch of devices as many as are read at once."""
    for tombstones in _by_devices(finished):
        spans: dict[UUID, list[Span]] = {}
        for device, _, (first, end) in tombstones:
            if first < asked.until and end > asked.since:
                spans.setdefault(device, []).append(Span(max(first, asked.since), min(end, asked.until)))
        owners = {one.device: one.organisation for one in tombstones}
        await _find_rows(store, spans, owners, findings, pace)
        for row in await store.left_quarantined({*owners.values()}, [*spans]):
            if within(tuple(spans[row.device]), row.ts):
                _tell(findings, owners, row.device, row.ts, f"in quarantine as {row.quarantine_id}")


async def _find_rows(
    store: Store, spans: Mapping[UUID, Sequence[Span]], owners: Mapping[UUID, UUID], findings: Findings, pace: Pace
) -> None:
    series = await store.series_of([*spans])
    wanted = [(device, series_id, span) for device, series_id in series for span in spans[device]]
    for table in ("readings", "text_readings"):
        rows = await store.left(table, [(series_id, span) for _, series_id, span in wanted]) if wanted else []
        for number, ts, content in rows:
            device, series_id, _ = wanted[number]
            value = shown(content[:-TAIL_BYTES], is_text=table == "text_readings")
            _tell(findings, owners, device, ts, f"stored under series {series_id}", value)
        await pace.spend(len(wanted), "looking for left-overs")


def _tell(
    findings: Findings,
    owners: Mapping[UUID, UUID],
    device: UUID,
    ts: int,
    where: str,
    value: float | str | None = None,
) -> None:
    findings.add(
        Finding(
            kind="unerased",
            message=f"{where}, and the site that it belongs to is erased",
            organisation_id=owners[device],
            device_id=device,
            time=as_text(ts),
            value=value,
        )
    )


def _by_devices(finished: Sequence[Tombstone]) -> Iterator[list[Tombstone]]:
    """Some devices at once, each with all of its tombstones."""
    found: list[Tombstone] = []
    for devices, (_, tombstones) in enumerate(groupby(finished, key=lambda one: one.device), 1):
        found += tombstones
        if devices % _DEVICES_AT_ONCE == 0:
            yield found
            found = []
    if found:
        yield found

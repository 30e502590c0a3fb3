"""Looks every reading of a run up: what was acknowledged stands once in the store, or in the quarantine.

Values and times are compared row by row. A request that was never answered may have been kept: its readings stand
once at most. Left out: what was sent (`bench.faults.traffic`), and the record of it (`bench.faults.sender`).
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple
from uuid import UUID

import orjson

from bench.faults.sender import Fate, Journal
from bench.faults.traffic import REFUSED_METRIC, Device, Kind, Reading

EXAMPLES_MAX: Final = 5
#: A stamped time lies within the run; clocks of one machine.
STAMP_SLACK_US: Final = 2_000_000

_ROWS: Final = """
SELECT s.metric, s.label, (extract(epoch FROM r.ts) * 1000000)::bigint AS ts_us, r.value
FROM series s JOIN readings r USING (series_id) WHERE s.device_id = $1"""
_QUARANTINED: Final = "SELECT device_id, code, payload FROM quarantine WHERE organisation_id = $1"
_BOOKS: Final = """
SELECT coalesce(sum(received), 0)::bigint, coalesce(sum(stored), 0)::bigint,
       coalesce(sum(duplicates), 0)::bigint, coalesce(sum(conflicts), 0)::bigint,
       coalesce(sum(quarantined), 0)::bigint, coalesce(sum(lost), 0)::bigint
FROM ledger WHERE organisation_id = $1"""
_STORED: Final = "SELECT count(*) FROM readings JOIN series USING (series_id) WHERE organisation_id = $1"


class Key(NamedTuple):
    """By which a reading is known again: its value is its own."""

    metric: str
    label: str
    value: float


@dataclass
class Verdict:
    """What became of a run's readings."""

    acknowledged: int = 0
    unknown: int = 0
    """Of requests without an answer, or with one that leaves it open."""
    stored: int = 0
    doubled: int = 0
    """Stored more often than once, at another time than their own, or never sent."""
    quarantined: int = 0
    lost: int = 0
    lost_by_broker: int = 0
    """Acknowledged by a broker that broke, and never sent on."""
    repeated_by_broker: int = 0
    """Without times of their own, and sent on once more by a broker that broke."""
    wrong: list[str] = field(default_factory=list)
    """What else does not add up."""
    examples: list[str] = field(default_factory=list)

    @property
    def is_kept(self) -> bool:
        """Whether the promise holds."""
        return not (self.lost or self.doubled or self.wrong)

    def show(self, text: str) -> None:
        if len(self.examples) < EXAMPLES_MAX:
            self.examples.append(text)


class Check:
    """Compares a journal with the store of one organisation."""

    def __init__(
        self,
        connection: Any,
        organisation: UUID,
        devices: Sequence[Device],
        *,
        began_us: int,
        ended_us: int,
        also_refused: Sequence[str] = (),
        broker_broke: bool = False,
    ) -> None:
        """`also_refused`: codes under which accepted readings may stand in the quarantine, because of the fault."""
        self._broker_broke = broker_broke
        self._connection = connection
        self._organisation = organisation
        self._devices = devices
        self._began_us = began_us - STAMP_SLACK_US
        self._ended_us = ended_us + STAMP_SLACK_US
        self._also_refused = also_refused

    async def run(self, journal: Journal) -> Verdict:
        verdict = Verdict()
        set_aside = await self._quarantined(verdict)
        for device in self._devices:
            rows = await self._connection.fetch(_ROWS, device.device)
            stored: dict[Key, list[int]] = {}
            for metric, label, ts_us, value in rows:
                stored.setdefault(Key(metric, label, value), []).append(ts_us)
            verdict.stored += len(rows)
            self._check_device(device, journal, stored, set_aside.get(device.device, Counter()), verdict)
        await self._check_books(verdict)
        return verdict

    async def _quarantined(self, verdict: Verdict) -> Mapping[UUID, "Counter[Key]"]:
        found: dict[UUID, Counter[Key]] = {}
        without_cause: Counter[str] = Counter()
        for device, code, payload in await self._connection.fetch(_QUARANTINED, self._organisation):
            plain = orjson.loads(payload)
            key = Key(plain["type"], plain.get("label", ""), plain["value"])
            found.setdefault(device, Counter())[key] += 1
            if key.metric != REFUSED_METRIC and code not in self._also_refused:
                without_cause[code] += 1
                verdict.show(f"accepted, and quarantined as {code}: {key}")
            verdict.quarantined += 1
        verdict.wrong += [f"{number} accepted and quarantined as {code}" for code, number in without_cause.items()]
        return found

    def _check_device(
        self,
        device: Device,
        journal: Journal,
        stored: dict[Key, list[int]],
        set_aside: "Counter[Key]",
        verdict: Verdict,
    ) -> None:
        for kind, number, fate in _requests(device, journal):
            certain = fate is Fate.ACKNOWLEDGED
            verdict.acknowledged += kind.readings if certain else 0
            verdict.unknown += 0 if certain else kind.readings
            for reading in device.readings(kind, number):
                key = Key(reading.metric, reading.label, reading.value)
                times, aside = stored.pop(key, []), set_aside.pop(key, 0)
                if kind is Kind.BATCH:  # it may be sent again, and then each copy may stand in the quarantine
                    aside = min(aside, 0 if times else 1)
                self._check_reading(device, reading, times, aside, verdict, certain=certain)
            if kind is Kind.BATCH:
                key = Key(REFUSED_METRIC, "", device.refused_value(number))
                self._check_refused(device, set_aside.pop(key, 0), verdict, certain=certain)
        for key, times in stored.items():
            verdict.doubled += len(times)
            verdict.show(f"never sent: device {device.number}, {key}, at {times}")
        verdict.doubled += sum(set_aside.values())
        for key in set_aside:
            verdict.show(f"quarantined, and nobody knows why: device {device.number}, {key}")

    def _check_reading(
        self,
        device: Device,
        reading: Reading,
        times: list[int],
        aside: int,
        verdict: Verdict,
        *,
        certain: bool,
    ) -> None:
        """`times` are those at which it is stored, `aside` is how often it stands in the quarantine."""
        standing = len(times) + aside
        if standing == 0 and certain:
            self._lose(verdict, f"lost: device {device.number}, {reading}")
        if standing > 1 and self._broker_broke and reading.ts_us is None:
            verdict.repeated_by_broker += standing - 1
        elif standing > 1:
            verdict.doubled += standing - 1
            verdict.show(f"stored {standing} times: device {device.number}, {reading}, at {times}")
        for ts_us in times:
            if not (self._is_within(ts_us) if reading.ts_us is None else ts_us == reading.ts_us):
                verdict.doubled += 1
                verdict.show(f"stored at {ts_us}, which is not its time: device {device.number}, {reading}")

    def _check_refused(self, device: Device, standing: int, verdict: Verdict, *, certain: bool) -> None:
        """The refused reading of a batch; of one that was sent again it stands once for each time."""
        if standing == 0 and certain:
            self._lose(verdict, f"refused, and not in the quarantine: device {device.number}")

    def _lose(self, verdict: Verdict, what: str) -> None:
        if self._broker_broke:
            verdict.lost_by_broker += 1
        else:
            verdict.lost += 1
            verdict.show(what)

    def _is_within(self, ts_us: int) -> bool:
        return self._began_us <= ts_us <= self._ended_us

    async def _check_books(self, verdict: Verdict) -> None:
        received, stored, duplicates, conflicts, quarantined, lost = await self._connection.fetchrow(
            _BOOKS, self._organisation
        )
        rows = await self._connection.fetchval(_STORED, self._organisation)
        if received != stored + duplicates + conflicts + quarantined or stored != rows or lost:
            verdict.wrong.append(
                f"the ledger has {received} received, {stored} stored, {duplicates} duplicates, {conflicts} "
                f"conflicts, {quarantined} quarantined, {lost} lost; {rows} are stored"
            )


def _requests(device: Device, journal: Journal) -> Iterator[tuple[Kind, int, Fate]]:
    """Those that may have been kept."""
    for kind in Kind:
        for number, fate in enumerate(journal.fates.get((device.number, kind), b"")):
            if fate != Fate.NOT_KEPT:
                yield kind, number, Fate(fate)

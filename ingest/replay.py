"""Carries out replays: a quarantined reading is judged again and put on its device's own partition of the log.

Any number of processes share the work: each claims a few rows for a while, and what a dead one had claimed comes due
again. So a reading may stand in the log more than once; every copy has the record id of the request for its replay,
and landing releases the row once. Left out: asking for a replay (`api.quarantine`), the release (`workers.landing`).
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple
from uuid import UUID

import msgspec

from ingest.admit import Admission, Sender
from ingest.credentials import Listener
from ingest.formats import measurements_json
from ingest.formats.shape import BodyError, Submission
from ingest.metrics import IngestMetrics
from ingest.registry import Connections, ask
from ingest.settings import ReplaySettings
from runtime.clock import Clock
from runtime.errors import OutcomeUnknownError, OverloadedError, SluiceError, UnavailableError
from runtime.log.port import Log
from schemas import record as records
from schemas.errors import ReadingCode
from schemas.record import TIME_MADE_UP, Note, Quality, Record
from schemas.topics import partition_of

_log = logging.getLogger("sluice.replay")

CHANNEL: Final = "sluice_replay"
WAY: Final = "replay"

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_ASK_TIMEOUT_S: Final = 10.0
_LISTEN_AGAIN_S: Final = 1.0
_DURABLE: Final = ("durable",)
_REFUSED: Final = ("refused",)
_NOT_WRITTEN: Final = ("not_written",)
_UNKNOWN: Final = ("unknown",)
#: What a quarantined reading was flagged with before it got there, and nobody could tell again.
_KEPT_FLAGS: Final = TIME_MADE_UP | Quality.UNIT_CONVERTED.value | Quality.LATE.value

# A few of each organisation that has any due, beginning anywhere: one with a million does not hold up one with a few.
# The walk from organisation to organisation reads an index entry each.
_CLAIM: Final = """
WITH RECURSIVE asking AS (
    (SELECT organisation_id FROM quarantine WHERE state = 'replaying' ORDER BY organisation_id LIMIT 1)
    UNION ALL
    SELECT (SELECT q.organisation_id FROM quarantine q
            WHERE q.state = 'replaying' AND q.organisation_id > a.organisation_id
            ORDER BY q.organisation_id LIMIT 1)
    FROM asking a WHERE a.organisation_id IS NOT NULL
), turns AS (
    SELECT organisation_id FROM asking WHERE organisation_id IS NOT NULL ORDER BY random() LIMIT $1
), due AS (
    SELECT d.quarantine_id FROM turns t CROSS JOIN LATERAL (
        SELECT q.quarantine_id FROM quarantine q
        WHERE q.state = 'replaying' AND q.organisation_id = t.organisation_id AND q.replay_due_at <= now()
        ORDER BY q.replay_due_at LIMIT $2 FOR UPDATE SKIP LOCKED) d
    LIMIT $1
), claimed AS (
    UPDATE quarantine q SET replay_due_at = now() + make_interval(secs => $3) FROM due d
    WHERE q.quarantine_id = d.quarantine_id
    RETURNING q.quarantine_id, q.replay_id, q.organisation_id, q.device_id, q.payload,
              q.original_payload IS NOT NULL AS edited, q.request_id, q.received_at, q.item
)
SELECT c.*, d.status, o.raw_retention_days FROM claimed c
LEFT JOIN devices d ON d.device_id = c.device_id AND d.organisation_id = c.organisation_id
LEFT JOIN organisations o ON o.organisation_id = c.organisation_id
"""

_PUT_OFF: Final = """
UPDATE quarantine q SET replay_due_at = now() + make_interval(secs => $3)
FROM ours WHERE q.quarantine_id = ours.quarantine_id
RETURNING q.quarantine_id
"""
# What waits in a tray goes on waiting there; what was never a reading goes on telling why, forged messages above all.
_HAND_BACK: Final = """
UPDATE quarantine q SET state = 'held', attempts = q.attempts + 1,
    message = CASE WHEN q.code IN ('bad_signature', 'undecodable') AND q.original_payload IS NULL
                   THEN q.message ELSE w.message END,
    code = CASE WHEN q.code IN ('bad_signature', 'undecodable') AND q.original_payload IS NULL THEN q.code
                WHEN (q.code, w.code) = ('unassigned_device', 'unknown_device') THEN q.code
                ELSE w.code END,
    changed_at = now(), replay_due_at = NULL
FROM ours JOIN unnest($1::uuid[], $3::text[], $4::text[]) AS w (quarantine_id, code, message) USING (quarantine_id)
WHERE q.quarantine_id = ours.quarantine_id
RETURNING q.quarantine_id
"""
# Never in the way of landing, which may have a row in hand already. Gives what is ours and could not be changed.
_OURS: Final = """
WITH claimed AS (
    SELECT q.quarantine_id, q.replay_id FROM quarantine q
    JOIN unnest($1::uuid[], $2::uuid[]) AS w (quarantine_id, replay_id) USING (quarantine_id, replay_id)
    WHERE q.state = 'replaying'),
ours AS (
    SELECT q.quarantine_id FROM quarantine q JOIN claimed c USING (quarantine_id, replay_id)
    WHERE q.state = 'replaying' ORDER BY q.quarantine_id FOR UPDATE OF q SKIP LOCKED),
changed AS ({change})
SELECT quarantine_id FROM claimed EXCEPT SELECT quarantine_id FROM changed
"""
_APPENDED: Final = _OURS.format(change=_PUT_OFF)
_BACK: Final = _OURS.format(change=_HAND_BACK)
# Another process's claim locks a row for a moment that it finds claimed then; landing, until its transaction ends.
_LOCKED_WAITS_S: Final = (0.01, 0.03, 0.1, 0.3, 1.0)


class Verdict(NamedTuple):
    """Why a reading is refused again."""

    code: str
    message: str


def judge(admission: Admission, row: Any, now_us: int) -> Record | Verdict:
    """The record of a claimed row, as if it had just come but for its receive time; or why there is none."""
    if row["status"] not in ("active", "suspended") or row["raw_retention_days"] is None:
        return Verdict(ReadingCode.UNKNOWN_DEVICE, "the device is not registered any more")
    if row["status"] == "suspended":
        return Verdict(ReadingCode.DEVICE_SUSPENDED, "the device is suspended")
    submission = _submission(row["payload"])
    if submission is None:
        return Verdict(ReadingCode.INVALID_MEASUREMENT, "the payload is not one measurement: edit it")
    received = (row["received_at"] - _EPOCH) // _MICROSECOND
    oldest = admission.window(now_us, row["raw_retention_days"]).oldest
    if received < oldest:
        return Verdict(ReadingCode.TOO_OLD, "it came longer ago than the organisation keeps readings")
    admitted = admission.admit(
        [(0, submission)],
        Sender(row["organisation_id"].bytes, row["device_id"].bytes),
        admission.window(received, 0)._replace(oldest=oldest),
        record_id=row["replay_id"].bytes,
        request_id=row["request_id"],
        way=WAY,
    )
    for rejection in admitted.rejections:
        return Verdict(rejection.code, rejection.message)
    return _replaying(admitted.record, row)


def _submission(payload: bytes) -> Submission | None:
    """The one measurement that a payload is, as the JSON format reads it."""
    try:
        submissions = measurements_json.decode(b'{"measurements":[%b]}' % payload)
    except BodyError:
        return None
    return submissions[0] if len(submissions) == 1 and len(submissions[0].measurements) == 1 else None


def _replaying(record: Record, row: Any) -> Record:
    record = msgspec.structs.replace(record, version=records.LATE_VERSION, replays=row["quarantine_id"].bytes)
    # What a device sent, or somebody wrote, under the names that landing uses says nothing.
    return _as_it_was(record, row["payload"]) if row["item"] < 0 and not row["edited"] else record


def _as_it_was(record: Record, payload: bytes) -> Record:
    """With the flags and note that the reading had when landing set it aside, as far as its value does not tell."""
    try:
        kept = _set_aside.decode(payload)
    except msgspec.DecodeError:
        return record
    flags = kept.quality & _KEPT_FLAGS
    channels = [msgspec.structs.replace(one, quality=int(one.quality) | flags) for one in record.channels]
    unit = kept.original_unit or next((note.original_unit for note in record.notes), None)
    metadata = bytes(kept.metadata) or None
    is_noted = unit is not None or kept.original_time is not None or metadata is not None
    notes = [Note(0, 0, kept.original_time, unit, metadata)] if is_noted else []
    return msgspec.structs.replace(record, channels=channels, notes=notes)


class _SetAside(msgspec.Struct, gc=False):
    quality: int = 0
    original_time: str | None = None
    original_unit: str | None = None
    metadata: msgspec.Raw = msgspec.Raw()


_set_aside: Final = msgspec.json.Decoder(_SetAside)


class Replayer:
    """One process's part of the work. `run` is all of it; it ends by being cancelled and never fails."""

    def __init__(
        self,
        *,
        log: Log,
        pool: Connections,
        listener: Listener,
        admission: Admission,
        settings: ReplaySettings,
        clock: Clock,
        metrics: IngestMetrics,
        trouble: Callable[[], str | None],
    ) -> None:
        """`trouble` says why nothing may be appended right now, as while a spool is drained; None when it may."""
        self._log = log
        self._pool = pool
        self._listener = listener
        self._admission = admission
        self._settings = settings
        self._clock = clock
        self._metrics = metrics
        self._trouble = trouble
        self._asked = asyncio.Event()
        self._failure: str | None = None

    async def run(self) -> None:
        """Replay whatever is due, for ever."""
        listening = asyncio.create_task(self._listen(), name="replay listener")
        try:
            while True:
                began = self._clock.monotonic()
                taken = await self._try_round()
                if taken:
                    spent = self._clock.monotonic() - began
                    await asyncio.sleep(max(0.0, taken / self._settings.replay_rows_per_s - spent))
                else:
                    await self._wait_until_asked()
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)

    async def round(self) -> int:
        """Claim some rows, put on the log what is good now, and hand back the rest: how many rows that was.

        Raises `UnavailableError`.
        """
        settings = self._settings
        if self._log.trouble is not None or self._trouble() is not None:
            return 0
        rows = await self._ask(_CLAIM, settings.replay_rows_max, settings.replay_turn_rows, settings.replay_lease_s)
        rows.sort(key=lambda row: (row["received_at"], row["item"]))  # of a device, in the order in which they came
        good: list[tuple[Any, Record]] = []
        bad: list[tuple[Any, Verdict]] = []
        now_us = self._clock.now_us()
        for row in rows:
            judged = self._judge(row, now_us)
            if isinstance(judged, Verdict):
                bad.append((row, judged))
            else:
                good.append((row, judged))
        await self._append(good)
        await self._hand_back(bad)
        return len(rows)

    def _judge(self, row: Any, now_us: int) -> Record | Verdict:
        """Whatever stands in a row, it must not stop the others."""
        try:
            return judge(self._admission, row, now_us)
        except Exception:
            _log.exception("a quarantined reading cannot be judged", extra={"quarantine_id": row["quarantine_id"]})
            return Verdict(ReadingCode.INVALID_MEASUREMENT, "the payload cannot be judged: edit it")

    async def _append(self, good: Sequence[tuple[Any, Record]]) -> None:
        """What is not known to be durable is claimed again when the lease is over."""
        outcomes = await asyncio.gather(*(self._append_one(record) for _, record in good))
        durable = [row for (row, _), outcome in zip(good, outcomes, strict=True) if outcome is _DURABLE]
        for outcome in outcomes:
            self._metrics.replays.add(outcome)
        if durable:
            await self._change(_APPENDED, durable, self._settings.replay_landing_s)

    async def _append_one(self, record: Record) -> tuple[str]:
        try:
            await self._log.append(partition_of(record.device, self._log.partitions), records.encode(record))
        except (OverloadedError, UnavailableError):
            return _NOT_WRITTEN
        except OutcomeUnknownError:
            return _UNKNOWN
        return _DURABLE

    async def _hand_back(self, bad: Sequence[tuple[Any, Verdict]]) -> None:
        if not bad:
            return
        self._metrics.replays.add(_REFUSED, len(bad))
        codes, messages = [str(one.code) for _, one in bad], [one.message for _, one in bad]
        await self._change(_BACK, [row for row, _ in bad], codes, messages)

    async def _change(self, query: str, rows: Sequence[Any], *values: Any) -> None:
        """What somebody has in hand for longer comes due again when its lease is over."""
        for wait_s in (*_LOCKED_WAITS_S, None):
            left = await self._ask(query, *_ids(rows), *values)
            if not left:
                return
            if wait_s is not None:
                await asyncio.sleep(wait_s)
        _log.info("replayed rows are in other hands, and come due again later", extra={"rows": len(left)})

    async def _ask(self, query: str, *arguments: Any) -> list[Any]:
        return await ask(self._pool, query, *arguments, timeout_s=_ASK_TIMEOUT_S)

    # ------------------------------------------------------------ when

    async def _try_round(self) -> int:
        """0 after a failure: it is tried again like everything else, and said once."""
        self._asked.clear()
        try:
            taken = await self.round()
        except UnavailableError:
            return 0  # whoever looks up credentials says so already
        except Exception as error:
            if str(error) != self._failure:
                _log.exception("quarantined readings cannot be replayed: it is tried again")
            self._failure = str(error)
            return 0
        self._failure = None
        return taken

    async def _wait_until_asked(self) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._asked.wait(), self._settings.replay_poll_s)

    async def _listen(self) -> None:
        while True:
            with suppress(SluiceError):
                await self._listener.listen(CHANNEL, lambda *_: self._asked.set())
            await asyncio.sleep(_LISTEN_AGAIN_S)


def _ids(rows: Sequence[Any]) -> tuple[list[UUID], list[UUID]]:
    return [row["quarantine_id"] for row in rows], [row["replay_id"] for row in rows]

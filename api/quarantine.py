"""The quarantine as an organisation sees it: what was set aside and why, changed, replayed or discarded.

Every function runs in a transaction that acts for one organisation (`api.access`, `api.registry`): row-level security
decides what it sees. Left out: HTTP (`api.platform.quarantine`), and carrying a replay out (`ingest.replay`).
"""

from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from datetime import datetime
from typing import Annotated, Any, Final, NamedTuple
from uuid import UUID

import msgspec

from api.http.problems import Problem
from api.http.spelt import STORABLE
from api.problems import INVALID_NOTE, INVALID_PAYLOAD, NOT_HELD, QUARANTINE_NOT_FOUND
from api.registry import audit
from api.registry.texts import Reason
from runtime.secrets import without_secrets, without_secrets_in_json

HELD: Final = "held"
REPLAYING: Final = "replaying"
RELEASED: Final = "released"
DISCARDED: Final = "discarded"
STATES: Final = (HELD, REPLAYING, RELEASED, DISCARDED, "expired")
#: Larger ones are shown with their row alone, so that a page stays small.
LISTED_PAYLOAD_BYTES_MAX: Final = 8_192
#: Woken by this (`ingest.replay`).
CHANNEL: Final = "sluice_replay"

_PARTS: Final = {
    "columns": "quarantine_id, device_id, state, code, message, request_id, received_at, quarantined_at, changed_at,"
    " replay_requested_at, attempts, note, octet_length(payload) AS payload_bytes,"
    " original_payload IS NOT NULL AS edited",
    "listed_payload": f"CASE WHEN octet_length(payload) <= {LISTED_PAYLOAD_BYTES_MAX} THEN payload END AS payload",
    "found": "($1::text IS NULL OR code = $1) AND ($2::uuid IS NULL OR device_id = $2)"
    " AND ($3::text IS NULL OR request_id = $3)"
    " AND received_at >= coalesce($4::timestamptz, '-infinity')"
    " AND received_at < coalesce($5::timestamptz, 'infinity') AND ($6::int IS NULL OR attempts <= $6)",
    "next": "(received_at, quarantine_id) < (coalesce($8::timestamptz, 'infinity'), $9::uuid)"
    " ORDER BY received_at DESC, quarantine_id DESC LIMIT $10",
}


def _with_parts(sql: str) -> str:
    return sql.format(**_PARTS)


# What is held and what is not have an index each, both in this order.
_PAGE: Final = _with_parts("""
SELECT * FROM (
    (SELECT {columns}, {listed_payload} FROM quarantine
     WHERE state = 'held' AND coalesce($7::text, 'held') = 'held' AND {found} AND {next})
    UNION ALL
    (SELECT {columns}, {listed_payload} FROM quarantine
     WHERE state <> 'held' AND ($7::text IS NULL OR state = $7) AND {found} AND {next})) listed
ORDER BY received_at DESC, quarantine_id DESC LIMIT $10
""")
_ONE: Final = _with_parts("SELECT {columns}, payload, original_payload FROM quarantine WHERE quarantine_id = $1")
_SUMMARY: Final = _with_parts("""
SELECT code, device_id, count(*) AS rows, min(received_at) AS oldest, max(received_at) AS newest,
       (sum(count(*)) OVER ())::bigint AS total
FROM quarantine WHERE state = $7 AND {found}
GROUP BY code, device_id ORDER BY rows DESC, code, device_id LIMIT $8
""")
# What a replay brought back comes after what was never replayed, so that repeating a request gets on.
_HELD: Final = _with_parts("""
SELECT quarantine_id FROM quarantine WHERE state = 'held' AND {found}
ORDER BY changed_at NULLS FIRST, received_at, quarantine_id LIMIT $7 FOR UPDATE SKIP LOCKED
""")
_EDIT: Final = """
UPDATE quarantine SET original_payload = coalesce(original_payload, payload), payload = $2, changed_at = now()
WHERE quarantine_id = $1 AND state = 'held'
"""
_REPLAY: Final = """
WITH asked AS (
    UPDATE quarantine SET state = 'replaying', changed_at = now(), replay_requested_at = now(), replay_due_at = now(),
        replay_id = gen_random_uuid()
    WHERE quarantine_id = ANY ($1) AND state = 'held' RETURNING quarantine_id)
SELECT count(*) FROM asked
"""
_DISCARD: Final = "SELECT discard_quarantined($1, $2)"
_NOTIFY: Final = "SELECT pg_notify($1, '')"
_LAST_ID: Final = UUID(int=2**128 - 1)


@dataclass(frozen=True)
class Filter:
    """Which rows: None stands for any; receive times from `start` on and before `end`.

    A row that came back from a replay has an attempt more than before.
    """

    code: str | None = None
    device_id: UUID | None = None
    request_id: str | None = None
    start: datetime | None = None
    end: datetime | None = None
    attempts_max: int | None = None

    @property
    def names_something(self) -> bool:
        return any(part is not None for part in astuple(self))


class Place(NamedTuple):
    """Where a page ended."""

    received_at: datetime
    quarantine_id: UUID


class Page(NamedTuple):
    """Rows, newest first, and the place after which the next page starts; None when there is none."""

    rows: Sequence[Any]
    end: Place | None


# ---------------------------------------------------------------- looking


async def find(connection: Any, wanted: Filter, state: str | None, limit: int, after: Place | None = None) -> Page:
    """The next `limit` rows after `after`; `state` None: in any."""
    received_at, last = (None, _LAST_ID) if after is None else after
    rows = await connection.fetch(_PAGE, *astuple(wanted), state, received_at, last, limit + 1)
    if len(rows) <= limit:
        return Page(rows, None)
    return Page(rows[:limit], Place(rows[limit - 1]["received_at"], rows[limit - 1]["quarantine_id"]))


async def get(connection: Any, quarantine_id: UUID) -> Any:
    """One row with its whole payload. Raises the problem of one that is not there."""
    row = await connection.fetchrow(_ONE, quarantine_id)
    if row is None:
        raise Problem(QUARANTINE_NOT_FOUND)
    return row


async def summary(connection: Any, wanted: Filter, state: str, limit: int) -> list[Any]:
    """How many rows there are by code and device, the most first, each with the `total` of all."""
    rows: list[Any] = await connection.fetch(_SUMMARY, *astuple(wanted), state, limit)
    return rows


# ---------------------------------------------------------------- changing


async def edit(connection: Any, quarantine_id: UUID, payload: bytes) -> Any:
    """Put another payload in place of a held row's; the first one is kept beside it. Gives the row.

    Raises the problem of one that is not there, of a row that is not held, and of a payload with names that neither
    a measurement has nor the first payload.
    """
    status = await connection.execute(_EDIT, quarantine_id, payload)
    row = await get(connection, quarantine_id)
    if status != "UPDATE 1":
        raise _not_held(row["state"])
    _check_names(payload, row["original_payload"])
    await audit.record(connection, "quarantine.edited", quarantine_id)
    return row


async def replay(connection: Any, quarantine_id: UUID) -> Any:
    """Ask for a held row's replay, unless that was done already. Gives the row.

    Raises the problem of one that is not there, and of a row that is gone.
    """
    asked = await _ask_replay(connection, [quarantine_id])
    row = await get(connection, quarantine_id)
    if not asked and row["state"] not in (REPLAYING, RELEASED):
        raise _not_held(row["state"])
    if asked:
        await audit.record(connection, "quarantine.replayed", quarantine_id)
    return row


async def replay_found(connection: Any, wanted: Filter, limit: int) -> int:
    """Ask for the replay of held rows, the oldest first: of how many."""
    asked = await _ask_replay(connection, await _held(connection, wanted, limit))
    if asked:
        await audit.record(connection, "quarantine.replayed", "", rows=asked, wanted=_told(wanted))
    return asked


async def discard(connection: Any, quarantine_id: UUID, note: str) -> Any:
    """Throw a held row's payload away for good, unless that was done already. Gives the row.

    Raises the problem of one that is not there, and of a row that is being replayed or has left in another way.
    """
    discarded = await connection.fetchval(_DISCARD, [quarantine_id], note)
    row = await get(connection, quarantine_id)
    if not discarded and row["state"] != DISCARDED:
        raise _not_held(row["state"])
    if discarded:
        await audit.record(connection, "quarantine.discarded", quarantine_id, note=note)
    return row


async def discard_found(connection: Any, wanted: Filter, note: str, limit: int) -> int:
    """Throw held rows away, the oldest first: how many."""
    discarded: int = await connection.fetchval(_DISCARD, await _held(connection, wanted, limit), note)
    if discarded:
        await audit.record(connection, "quarantine.discarded", "", rows=discarded, wanted=_told(wanted), note=note)
    return discarded


def _told(wanted: Filter) -> dict[str, object]:
    return {name: value for name, value in asdict(wanted).items() if value is not None}


async def _held(connection: Any, wanted: Filter, limit: int) -> list[UUID]:
    return [row["quarantine_id"] for row in await connection.fetch(_HELD, *astuple(wanted), limit)]


async def _ask_replay(connection: Any, ids: list[UUID]) -> int:
    asked: int = await connection.fetchval(_REPLAY, ids)
    if asked:
        await connection.execute(_NOTIFY, CHANNEL)
    return asked


def _not_held(state: str) -> Problem:
    message = "it is being replayed: wait for what becomes of it" if state == REPLAYING else f"it was {state}"
    return Problem(NOT_HELD, message)


# ---------------------------------------------------------------- payloads


_Text = Annotated[str, msgspec.Meta(extra_json_schema=STORABLE)]


class Measurement(msgspec.Struct):
    """What may stand in an edited payload; `quality` is what landing shows, and counts for nothing any more."""

    type: Annotated[str, msgspec.Meta(min_length=1, extra_json_schema=STORABLE)]
    value: bool | int | float | _Text
    label: _Text | None = None
    unit: _Text | None = None
    ts: _Text | int | float | None = None
    quality: int | None = None


_measurement: Final = msgspec.json.Decoder(Measurement)
_names: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])


def checked_payload(raw: bytes, bytes_max: int) -> bytes:
    """An edited payload as it is kept: one measurement, without secrets. Raises the problem that says what is wrong.

    Whether its unit, value and time are any good is judged by the replay.
    """
    raw = raw.strip()
    if len(raw) > bytes_max:
        raise _invalid_payload(f"must have up to {bytes_max} bytes")
    try:
        _measurement.decode(raw)
        return without_secrets_in_json(raw.decode()).encode()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _invalid_payload(f"is not one measurement: {error}") from None


def _check_names(payload: bytes, sent: bytes) -> None:
    """A name that nobody knows may be a misspelt one; what a device sends besides, it may go on to say."""
    unknown = _names_of(payload) - {*Measurement.__struct_fields__} - _names_of(sent)
    if unknown:
        raise _invalid_payload(f"is not one measurement: it has no `{min(unknown)[:64]}`")


def _names_of(payload: bytes) -> set[str]:
    try:
        return {*_names.decode(payload)}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return set()


def checked_note(note: str) -> str:
    """Why something is discarded, as it is kept. Raises the problem of none, or one that is too long."""
    try:
        return without_secrets(str(Reason.parse(note)).strip())
    except ValueError as error:
        raise Problem(INVALID_NOTE, f"note: {error}") from None


def _invalid_payload(message: str) -> Problem:
    return Problem(INVALID_PAYLOAD, f"payload: {message}")

"""Records with more to them than readings: out of a spool, named by their client, released from quarantine, or a
message that its broker may send again.

Each kind must land once however often it comes. A spool's records come in their sequence; of messages it is
remembered with the partition (`deliveries`); the others are asked about before their transaction (`registry`), and
the transaction fails if the answer is not true any more. Left out: their readings (`plan`).
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from uuid import UUID

from runtime.errors import SluiceError
from schemas.record import IDEMPOTENCY_WINDOW_S, NONCE_SCOPE, Idempotency, Origin, Record
from workers.landing import deliveries
from workers.landing.deliveries import Deliveries, Stretch
from workers.landing.failures import MiscountError
from workers.landing.quarantine import Place, QuarantineRow

if TYPE_CHECKING:
    from workers.landing.plan import Part, Plan

_WINDOW_US: Final = IDEMPOTENCY_WINDOW_S * 1_000_000

SpoolPart = tuple[bytes, int]
"""A spool's id and one of its partitions."""

_SPOOLS: Final = """
INSERT INTO spool_positions AS s (spool, partition, next)
SELECT * FROM unnest($1::uuid[], $2::int[], $3::bigint[]) ORDER BY 1, 2
ON CONFLICT (spool, partition) DO UPDATE SET next = greatest(s.next, EXCLUDED.next), updated_at = now()"""

_LOSSES: Final = """
INSERT INTO spool_losses (spool, partition, first_sequence, end_sequence)
SELECT * FROM unnest($1::uuid[], $2::int[], $3::bigint[], $4::bigint[]) ON CONFLICT DO NOTHING"""

_NAMES: Final = """
INSERT INTO idempotency_keys
    (organisation_id, scope, device_id, key, fingerprint, received_at, source, partition, position)
SELECT * FROM unnest($1::uuid[], $2::bytea[], $3::uuid[], $4::bytea[], $5::bytea[], $6::timestamptz[], $7::uuid[],
                     $8::int[], $9::bigint[])
ON CONFLICT DO NOTHING"""

# The ledger tells of the hour in which a reading was first received, whenever it is released.
_RELEASE: Final = """
WITH released AS (
    UPDATE quarantine q SET state = 'released', payload = '', original_payload = NULL, changed_at = now()
    FROM unnest($1::uuid[], $2::uuid[]) AS n (quarantine_id, replay_id)
    WHERE q.quarantine_id = n.quarantine_id AND q.replay_id = n.replay_id AND q.state = 'replaying'
    RETURNING organisation_id, source, partition,
        date_bin('1 hour', received_at, timestamptz '2000-01-01 00:00:00Z') AS hour),
told AS (
    UPDATE ledger l SET replayed = l.replayed + n.count
    FROM (SELECT organisation_id, hour, source, partition, count(*) FROM released GROUP BY 1, 2, 3, 4) AS n
    WHERE l.organisation_id = n.organisation_id AND l.hour = n.hour AND l.source = n.source
      AND l.partition = n.partition)
SELECT count(*) FROM released"""

_HOLD_AGAIN: Final = """
UPDATE quarantine q SET state = 'held', attempts = q.attempts + 1, code = n.code, message = n.message,
    changed_at = now(), replay_requested_at = NULL, replay_id = NULL, replay_due_at = NULL
FROM unnest($1::uuid[], $2::uuid[], $3::text[], $4::text[]) AS n (quarantine_id, replay_id, code, message)
WHERE q.quarantine_id = n.quarantine_id AND q.replay_id = n.replay_id AND q.state = 'replaying'"""

# Where readings with times of our making stand whose record may come once more, and be taken for another one.
_DOUBTED: Final = """
INSERT INTO moved_readings (record_id, item, series_id, ts)
SELECT * FROM unnest($1::uuid[], $2::int[], $3::int[], $4::timestamptz[]) ON CONFLICT DO NOTHING"""


class SpoolJumpError(SluiceError):
    """A spool's record came before the one it must follow: landing it would hide that others are missing."""

    def __init__(self, position: int, origin: Origin, expected: int) -> None:
        spool = UUID(bytes=origin.spool)
        super().__init__(
            f"position {position} holds record {origin.sequence} of partition {origin.partition} of spool {spool}, "
            f"record {expected} has not come: if it is lost for good, say so with "
            f"`sluice spool skip {spool} {origin.partition} {origin.sequence}`"
        )


class Question(NamedTuple):
    """A record that cannot be taken before the database was asked about it."""

    part: "Part"
    at: int
    """Where it stands in the log's partition."""
    place: Place
    record: Record


class Named(NamedTuple):
    """A request with an idempotency key, as it was seen."""

    received_at: int
    fingerprint: bytes


class Answers(NamedTuple):
    """What the database says of a plan's questions."""

    named: Mapping[bytes, list[Named]]
    """By `name_of`."""
    replaying: Mapping[bytes, bytes]
    """Quarantine rows that wait for their release, each with the id of the record that may release it."""


class Memory:
    """What is known of late records beyond what the database answers: of one partition in one plan."""

    __slots__ = ("before", "deliveries", "expects_losses", "named", "released", "spools", "standing")

    def __init__(
        self,
        standing: Mapping[SpoolPart, int],
        before: "Memory | None" = None,
        *,
        expects_losses: bool = False,
        delivered: Mapping[bytes, list[Stretch]] | None = None,
    ) -> None:
        self.standing = standing
        """The next sequence number of each spool whose records have landed."""
        # What stands is the holding's own, which grows while this is planned, be it empty now.
        stands = {} if delivered is None else delivered
        self.deliveries: Deliveries = Deliveries(stands, None if before is None else before.deliveries)
        self.before = before
        """Of the transaction under way, which will have been committed before this plan is written."""
        self.expects_losses = expects_losses
        """Whether the log has lost records of this partition: a spool's may be among them."""
        self.spools: dict[SpoolPart, int] = {}
        self.named: dict[bytes, Named] = {}
        self.released: dict[bytes, bytes] = {}
        """Rows, each with the id of the record that releases it."""

    def expected(self, spool: SpoolPart) -> int:
        """The sequence number that must come next."""
        for memory in (self, self.before):
            if memory is not None and spool in memory.spools:
                return memory.spools[spool]
        return self.standing.get(spool, 0)

    def seen(self, name: bytes, answers: Answers) -> list[Named]:
        """Every request of this name that has landed or will have."""
        found = [*answers.named.get(name, ())]
        return found + [memory.named[name] for memory in (self, self.before) if memory and name in memory.named]

    def settled(self) -> None:
        """The transaction that was under way is committed, and what it brought stands."""
        self.before = None
        self.deliveries.settled()

    def is_released(self, row: bytes) -> bool:
        return row in self.released or (self.before is not None and row in self.before.released)


class Late:
    """What a plan's transaction writes of its late records, beside their readings."""

    def __init__(self) -> None:
        self.questions: list[Question] = []
        self.losses: list[tuple[SpoolPart, int, int]] = []
        self.names: list[Question] = []
        self.held_again: dict[bytes, tuple[str, str]] = {}
        """Rows whose replay was refused: code and message."""
        self.doubted: list[tuple[bytes, int, int, int]] = []
        """Record id, number, series and time of readings that may come once more."""
        self.repeats = 0
        """Records that had landed already."""

    def advance(self, memory: Memory, position: int, record: Record, origin: Origin) -> bool:
        """Move a spool on to this record of it; False for one without readings to land: a repeat, or a gap.

        Raises `SpoolJumpError`.
        """
        spool = origin.spool, origin.partition
        expected = memory.expected(spool)
        if origin.through <= expected:
            self.repeats += 1
            return False
        if origin.sequence > expected:
            if not memory.expects_losses:
                raise SpoolJumpError(position, origin, expected)
            self.losses.append((spool, expected, origin.sequence))
        memory.spools[spool] = origin.through
        if record.is_gap:
            self.losses.append((spool, max(expected, origin.sequence), origin.through))
            return False
        return True

    def claims(self, question: Question, row: bytes, answers: Answers) -> bool:
        """Whether this is the record that releases the row."""
        memory = question.part.memory
        if answers.replaying.get(row) != question.record.record_id or memory.is_released(row):
            self.repeats += 1
            return False
        memory.released[row] = question.record.record_id
        return True

    def earlier(self, question: Question, named: Idempotency, answers: Answers, nonce_us: int) -> Named | None:
        """The request of the same name that this one repeats; None for the first, which takes the name.

        `nonce_us`: for how long a nonce is remembered.
        """
        memory, record = question.part.memory, question.record
        name = name_of(record, named)
        window = nonce_us if named.scope == NONCE_SCOPE else _WINDOW_US
        for seen in memory.seen(name, answers):
            if abs(seen.received_at - record.received_at) <= window:
                return seen
        memory.named[name] = Named(record.received_at, named.fingerprint)
        self.names.append(question)
        return None

    @property
    def lost(self) -> int:
        return sum(end - first for _, first, end in self.losses)


def name_of(record: Record, named: Idempotency) -> bytes:
    """What an idempotency key or a nonce holds for: the credential, the device and the key itself."""
    return named.scope + record.device + named.key


async def write(connection: Any, source: UUID, plan: "Plan") -> None:
    """Within the landing's transaction, once its readings are judged. Raises `MiscountError` for a stale answer."""
    late = plan.late
    spools = [(spool, at) for part in plan.parts.values() for spool, at in part.memory.spools.items()]
    if spools:
        await connection.execute(_SPOOLS, *_columns((UUID(bytes=spool), part, at) for (spool, part), at in spools))
    if late.losses:
        losses = ((UUID(bytes=spool), part, first, end) for (spool, part), first, end in late.losses)
        await connection.execute(_LOSSES, *_columns(losses))
    if late.names:
        made = await connection.execute(_NAMES, *_columns(_name_row(source, question) for question in late.names))
        _expect("idempotency keys", int(made.rpartition(" ")[2]), len(late.names))
    if late.doubted:
        await connection.execute(_DOUBTED, *_columns((UUID(bytes=record), *where) for record, *where in late.doubted))
    await deliveries.write(connection, source, [(at, part.memory.deliveries) for at, part in plan.parts.items()])
    await _write_replays(connection, plan)


async def _write_replays(connection: Any, plan: "Plan") -> None:
    replays = {row: by for part in plan.parts.values() for row, by in part.memory.released.items()}
    again = plan.late.held_again
    if again:
        rows = ((UUID(bytes=row), UUID(bytes=replays[row]), *why) for row, why in again.items())
        held = await connection.execute(_HOLD_AGAIN, *_columns(rows))
        _expect("rows held again", int(held.rpartition(" ")[2]), len(again))
    done = [(UUID(bytes=row), UUID(bytes=by)) for row, by in replays.items() if row not in again]
    if done:
        _expect("rows released", await connection.fetchval(_RELEASE, *_columns(done)), len(done))


def hold_again(late: Late, row: QuarantineRow, replays: bytes) -> None:
    late.held_again[replays] = row.code, row.message


def _name_row(source: UUID, question: Question) -> tuple[Any, ...]:
    record, place = question.record, question.place
    named = record.idempotency
    if named is None:
        raise TypeError("the record has no idempotency key")
    device = UUID(bytes=record.device)
    head = UUID(bytes=record.organisation), named.scope, device, named.key, named.fingerprint, record.received_at
    return (*head, source_of(place, source), place.partition, place.position)


def source_of(place: Place, log: UUID) -> UUID:
    """What the books name as the source of a record at `place`."""
    return UUID(bytes=place.spool) if place.spool else log


def _columns(rows: Iterable[tuple[Any, ...]]) -> list[list[Any]]:
    return [list(column) for column in zip(*rows, strict=True)]


def _expect(what: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise MiscountError(f"{what}: {found} of {wanted}, another transaction was first")

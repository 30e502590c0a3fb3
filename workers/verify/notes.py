"""Notes that must stand beside readings, as their records tell them: original times and units, metadata.

Left out: which readings are stored (`matching`). Notes on readings whose records tell of none are not looked for.
"""

from collections.abc import Sequence
from typing import Final
from uuid import UUID

import msgspec

from schemas.record import Note, Record
from workers.landing.quarantine import is_storable_json, is_storable_text
from workers.verify.claims import Claim
from workers.verify.store import NoteRow, Store

_AT_ONCE: Final = 5_000


class Noted(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A claimed value, and the note that its record has on it."""

    value: bytes
    """8 bytes of a float8, or a text."""
    organisation: bytes
    received_at: int
    original_time: str | None
    original_unit: str | None
    metadata: bytes | None


_decoder: Final = msgspec.msgpack.Decoder(Noted)
decode: Final = _decoder.decode


def encode(value: bytes, record: Record, note: Note) -> bytes:
    head = value, record.organisation, record.received_at
    return msgspec.msgpack.encode(Noted(*head, note.original_time, note.original_unit, note.metadata))


def of_record(record: Record) -> dict[int, list[Note]]:
    """By channel, the notes that can stand in the store."""
    found: dict[int, dict[int, Note]] = {}
    for note in record.notes:  # as landing has it, the last one of a reading
        found.setdefault(note.channel, {})[note.reading] = note
    return {channel: [*filter(_is_storable, notes.values())] for channel, notes in found.items()}


def _is_storable(note: Note) -> bool:
    texts = is_storable_text(note.original_time) and is_storable_text(note.original_unit)
    return texts and (note.metadata is None or is_storable_json(note.metadata))


class Notes:
    """Those that must stand on readings of one table, asked for together."""

    def __init__(self, table: str, store: Store) -> None:
        self._table = table
        self._store = store
        self._expected: list[tuple[Claim, Noted]] = []
        self.compared = 0

    def expect(self, claim: Claim, noted: Noted) -> None:
        self._expected.append((claim, noted))

    async def differing(self) -> list[tuple[Claim, Noted, str]]:
        """Those of the expected that do not stand as told, and what is the matter with each."""
        expected, self._expected = self._expected, []
        self.compared += len(expected)
        found: list[tuple[Claim, Noted, str]] = []
        for first in range(0, len(expected), _AT_ONCE):
            some = expected[first : first + _AT_ONCE]
            for number, stands in (await self._store.notes(self._table, _rows(some))).items():
                found.append((*some[number], _MATTERS[stands]))
        return found


_MATTERS: Final = {False: "the note on it is gone", True: "the note on it is not that of its record"}


def _rows(expected: Sequence[tuple[Claim, Noted]]) -> list[NoteRow]:
    return [
        NoteRow(
            claim.series_id,
            claim.ts,
            UUID(bytes=noted.organisation),
            noted.received_at,
            noted.original_time,
            noted.original_unit,
            None if noted.metadata is None else noted.metadata.decode(),
        )
        for claim, noted in expected
    ]

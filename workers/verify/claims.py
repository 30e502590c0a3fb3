"""What records say must stand in the store: one entry of fixed width a reading, and files in which any number sorts.

Entries sort by series and time, then by where the record stands in the log: of several readings of one time the first
is the one that was stored. Left out: which readings these are (`reading`) and whether they stand (`matching`).
"""

import heapq
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Final, Literal, NamedTuple

WIDTH: Final = 40
KEY_BYTES: Final = 12
#: Value, quality and flags: of a judged claim without a note, what the store has of the row as well.
CONTENT: Final = slice(24, 36)
QUALITY: Final = slice(32, 34)
GROUP: Final = slice(36, 40)
#: What follows the value in a row's content: its quality, and flags that are a claim's alone.
TAIL_BYTES: Final = 4
#: A reading that only explains a row: it lies outside the span that is judged.
UNJUDGED: Final = 1
#: The value stands in the file of `Blobs`, with a note that must stand beside it.
NOTED: Final = 2

_ENTRY: Final = struct.Struct(">4s8sQI8sHHI")
_TEMPLATE: Final = struct.Struct(">I8xQI8xHHI")
_TIME_AT, _ITEM_AT, _VALUE_AT, _QUALITY_AT, _FLAGS_AT = 4, 20, 24, 32, 34
# Signed times in the order of bytes: the sign bit turned round.
_TURNED: Final = bytes(byte ^ 0x80 for byte in range(256))
_POSITION_BITS: Final = 48
_QUALITY_MASK: Final = 0xFFFF
_FILES_AT_ONCE: Final = 64
_READ_ENTRIES: Final = 1_000
_LENGTH_BITS: Final = 24


class Claim(NamedTuple):
    """One entry, unpacked. `value` as 8 bytes: a float8, or where a text or what is noted stands in `Blobs`."""

    series_id: int
    ts: int
    partition: int
    position: int
    item: int
    value: bytes
    quality: int
    flags: int
    group: int


def entries(
    series_id: int,
    times: bytes,
    values: bytes,
    quality: int | bytes,
    place: tuple[int, int],
    base: int,
    group: int,
    flags: int,
) -> bytearray:
    """Of readings side by side, numbered from `base` on in the record at `place` (partition, position)."""
    count = len(times) // 8
    order = place[0] << _POSITION_BITS | place[1]
    common = quality & _QUALITY_MASK if isinstance(quality, int) else 0
    buffer = bytearray(_TEMPLATE.pack(series_id, order, base, common, flags, group) * count)
    _lay(buffer, _TIME_AT, times, "q")
    _lay(buffer, _VALUE_AT, values, "q")
    if not isinstance(quality, int):
        _lay(buffer, _QUALITY_AT, quality, "h")
    if count > 1:
        _lay(buffer, _ITEM_AT, struct.pack(f">{count}I", *range(base, base + count)), "i")
    buffer[_TIME_AT::WIDTH] = bytes(buffer[_TIME_AT::WIDTH]).translate(_TURNED)
    return buffer


def _lay(buffer: bytearray, offset: int, column: bytes, kind: Literal["h", "i", "q"]) -> None:
    size = struct.calcsize(kind)
    end = len(buffer) - WIDTH + offset + size
    memoryview(buffer)[offset:end].cast(kind)[:: WIDTH // size] = memoryview(column).cast(kind)


def move(buffer: bytearray, index: int, ts: int) -> None:
    """Entry `index` stands at another time than its own."""
    at = index * WIDTH + _TIME_AT
    buffer[at : at + 8] = turned(ts)


def add_note(buffer: bytearray, index: int, place: bytes) -> None:
    """Beside the reading of entry `index` a note must stand: its value and that are at `place` in `Blobs`."""
    at = index * WIDTH
    buffer[at + _VALUE_AT : at + _VALUE_AT + 8] = place
    buffer[at + _FLAGS_AT + 1] |= NOTED


def turned(ts: int) -> bytes:
    return (ts + 2**63).to_bytes(8, "big")


def unpack_key(key: bytes) -> tuple[int, int]:
    """Series and time."""
    return int.from_bytes(key[:4], "big"), int.from_bytes(key[4:12], "big") - 2**63


def unpack(entry: bytes) -> Claim:
    series, ts, order, *rest = _ENTRY.unpack(entry)
    position = order & ((1 << _POSITION_BITS) - 1)
    time = int.from_bytes(ts, "big") - 2**63
    return Claim(int.from_bytes(series, "big"), time, order >> _POSITION_BITS, position, *rest)


class Blobs:
    """What has no fixed width, in a file; an entry holds where."""

    def __init__(self, directory: Path) -> None:
        self._file = (directory / "blobs").open("w+b")

    def add(self, raw: bytes) -> bytes:
        at = self._file.seek(0, 2)
        self._file.write(raw)
        return (at << _LENGTH_BITS | len(raw)).to_bytes(8, "big")

    def get(self, value: bytes) -> bytes:
        place = int.from_bytes(value, "big")
        self._file.seek(place >> _LENGTH_BITS)
        return self._file.read(place & ((1 << _LENGTH_BITS) - 1))

    def close(self) -> None:
        self._file.close()


class Sorter:
    """Entries in, entries in order out, with at most `entries_max` of them in memory."""

    def __init__(self, directory: Path, name: str, entries_max: int) -> None:
        self._directory = directory
        self._name = name
        self._entries_max = entries_max
        self._blocks: list[bytearray] = []
        self._held = 0
        self._runs: list[Path] = []
        self._made = 0

    def add(self, block: bytearray) -> None:
        self._blocks.append(block)
        self._held += len(block) // WIDTH
        if self._held >= self._entries_max:
            self._write(self._sorted())

    def in_order(self) -> Iterator[bytes]:
        """Every entry; once."""
        if not self._runs:
            return iter(self._sorted())
        self._write(self._sorted())
        while len(self._runs) > _FILES_AT_ONCE:
            some, self._runs = self._runs[:_FILES_AT_ONCE], self._runs[_FILES_AT_ONCE:]
            self._write(_merged(some))
            for path in some:
                path.unlink()
        return _merged(self._runs)

    def _sorted(self) -> list[bytes]:
        blocks, self._blocks, self._held = self._blocks, [], 0
        found = list(_cut(b"".join(blocks)))
        found.sort()
        return found

    def _write(self, ordered: Iterable[bytes]) -> None:
        path = self._directory / f"{self._name}-{self._made}"
        self._made += 1
        with path.open("wb", buffering=1_000_000) as file:
            file.writelines(ordered)
        self._runs.append(path)


def _cut(block: bytes) -> Iterator[bytes]:
    return (block[at : at + WIDTH] for at in range(0, len(block), WIDTH))


def _merged(paths: Iterable[Path]) -> Iterator[bytes]:
    return heapq.merge(*(_read(path.open("rb")) for path in paths))


def _read(file: IO[bytes]) -> Iterator[bytes]:
    with file:
        while block := file.read(WIDTH * _READ_ENTRIES):
            yield from _cut(block)

"""Makes a whole file out of a damaged one: every chunk that still can be read, with holes where the others stood.

Works through SQLite, which reaches what is not behind a damaged page, and believes only checksums. SQLite is given
the file under another name, with a WAL of all frames that are whole: the damaged one stays as it is. Left out: what
becomes of the holes, and of the damaged file.
"""

import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import quote
from uuid import UUID, uuid4

from runtime.errors import UnavailableError
from runtime.log import sqlite_wal
from runtime.log.port import Bounds
from runtime.log.sqlite_ends import told_ends
from runtime.log.sqlite_store import (
    INSERT_CHUNK,
    DamagedError,
    Origin,
    checksum_of,
    count_of,
    key_of,
    read_origin,
    sync_directory,
    write_empty,
)

PARTITIONS_MAX: Final = 1_024
POSITION_MAX: Final = 1 << 47
#: Each step past an unreadable page is this much longer than the one before: what is readable and stands within a
#: twentieth of such a stretch may be passed over.
STRIDE: Final = 1.05

_NEXT_KEY: Final = "SELECT min(key) FROM chunks WHERE key >= ? AND key < ?"
_CHUNK: Final = "SELECT lengths, bodies, checksum FROM chunks WHERE key = ?"


class Salvage(NamedTuple):
    """What was found in a damaged file."""

    records: int
    ends_known: bool
    """Whether it still says how far each partition went; if not, records may be missing that nobody knows of."""


def salvage(path: Path, target: Path, source: UUID, partitions: int) -> Salvage:
    """Write what can be read of `path` to a new file at `target`, complete or not at all.

    `source` and `partitions` are believed where the file itself cannot be asked. Raises `UnavailableError` when
    `target` cannot be written, or `path` not be opened for another reason than damage.
    """
    draft = target.with_name(f"{target.name}.{uuid4()}")
    link = draft.with_name(f"{draft.name}.link")
    try:
        os.link(path, link)
        sqlite_wal.mend(_beside(path, sqlite_wal.SUFFIX), _beside(link, sqlite_wal.SUFFIX))
        with closing(_open_damaged(link)) as damaged:
            found = _copy(damaged, draft, Origin(uuid4(), source, partitions), told_ends(path))
        os.replace(draft, target)
        sync_directory(target.parent)
    except (OSError, sqlite3.Error) as error:
        raise UnavailableError(f"{path} cannot be saved to {target}: {error}") from error
    finally:
        for left in (draft, link):
            for ending in ("", "-wal", "-shm", "-journal"):
                _beside(left, ending).unlink(missing_ok=True)
    return found


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


def _open_damaged(path: Path) -> sqlite3.Connection:
    """Only to read, for it is the damaged file's own content."""
    connection = sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, isolation_level=None)
    try:
        # Also lets SQLite into a file that is shorter than it says.
        connection.execute("PRAGMA writable_schema = ON")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _copy(damaged: sqlite3.Connection, draft: Path, believed: Origin, told: Mapping[int, int]) -> Salvage:
    origin = _origin(damaged) or believed
    heads = _heads(damaged)
    write_empty(draft, origin)
    records = 0
    with closing(sqlite3.connect(draft, isolation_level=None)) as whole:
        whole.execute("PRAGMA synchronous = FULL")
        whole.execute("BEGIN")
        for partition in range(origin.partitions):
            known = heads.get(partition)
            end = 0
            for key, lengths, bodies, checksum in _chunks(damaged, partition, known):
                whole.execute(INSERT_CHUNK, (key, lengths, bodies, checksum))
                end = key - key_of(partition, 0) + count_of(lengths)
                records += count_of(lengths)
            end = max(end, told.get(partition, 0), known.end if known else 0)
            start = known.start if known else 0
            whole.execute("UPDATE heads SET start = ?, next = ? WHERE partition = ?", (start, end, partition))
        whole.execute("COMMIT")
        whole.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    return Salvage(records, ends_known=len(heads) == origin.partitions)


def _origin(damaged: sqlite3.Connection) -> Origin | None:
    try:
        found = read_origin(damaged)
    except (sqlite3.Error, DamagedError) as error:
        _expect_damage(error)
        return None
    return found if 0 < found.partitions <= PARTITIONS_MAX else None


def _heads(damaged: sqlite3.Connection) -> dict[int, Bounds]:
    try:
        rows = damaged.execute("SELECT partition, start, next FROM heads").fetchall()
    except sqlite3.Error as error:
        _expect_damage(error)
        return {}
    return {
        partition: Bounds(start, end)
        for partition, start, end in rows
        if isinstance(start, int) and isinstance(end, int) and 0 <= start <= end <= POSITION_MAX
    }


def _chunks(
    damaged: sqlite3.Connection, partition: int, bounds: Bounds | None
) -> Iterator[tuple[int, bytes, bytes, int]]:
    """Every chunk of a partition that can be read, in order."""
    at, high = key_of(partition, 0), key_of(partition + 1, 0)
    known = high if bounds is None else key_of(partition, bounds.end)
    while at < high:
        key = _seek(damaged, at, high)
        if isinstance(key, sqlite3.Error):
            at = _behind(damaged, at, max(known, at + 1), high)
        elif key is None:
            return
        else:
            chunk = _read(damaged, key)
            at = key + (count_of(chunk[0]) if chunk else 1)
            if chunk:
                yield key, *chunk


def _seek(damaged: sqlite3.Connection, at: int, high: int) -> int | sqlite3.Error | None:
    """The first chunk at or after `at`; None without one; the error of a damaged page on the way."""
    try:
        key: int | None = damaged.execute(_NEXT_KEY, (at, high)).fetchone()[0]
    except sqlite3.Error as error:
        _expect_damage(error)
        return error
    return key


def _behind(damaged: sqlite3.Connection, at: int, end: int, high: int) -> int:
    """The first key known of behind the damaged page that `at` leads to; `high` when there is none."""
    failed, step = at, 1.0
    while True:
        probe = min(failed + int(step), high)
        if probe >= high or not isinstance(_seek(damaged, probe, high), sqlite3.Error):
            break
        if failed >= end:
            return high
        failed, step = probe, step * STRIDE
    while probe - failed > 1:
        middle = (failed + probe) // 2
        if isinstance(_seek(damaged, middle, high), sqlite3.Error):
            failed = middle
        else:
            probe = middle
    return probe


def _read(damaged: sqlite3.Connection, key: int) -> tuple[bytes, bytes, int] | None:
    try:
        row = damaged.execute(_CHUNK, (key,)).fetchone()
    except sqlite3.Error as error:
        _expect_damage(error)
        return None
    if row is None or [type(one) for one in row] != [bytes, bytes, int]:
        return None
    lengths, bodies, checksum = row
    return row if checksum_of(key, lengths, bodies) == checksum else None


def _expect_damage(error: Exception) -> None:
    """A disk that does not answer is no damage: what it holds may be read later."""
    if getattr(error, "sqlite_errorcode", 0) & 0xFF in _AWAY:
        raise error


_AWAY: Final = frozenset(
    {sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_PERM}
)

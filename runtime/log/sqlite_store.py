"""One SQLite file that keeps records by partition: its format, and what one thread does with it.

Every call blocks. Left out: threads, queues and futures (`sqlite_log`), and what a generation is (`engines`):
ingest's spool builds on the same file.
"""

import os
import sqlite3
import sys
import time
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Final, NamedTuple, TypeVar
from urllib.parse import quote
from uuid import UUID, uuid4
from zlib import crc32

from runtime.errors import OutcomeUnknownError, UnavailableError
from runtime.log import sqlite_wal
from runtime.log.port import NEW_GENERATION, BehindRetentionError, Bounds, LogMisfitError, Slice
from runtime.log.sqlite_ends import Ends, told_ends

FORMAT: Final = 1
APPLICATION_ID: Final = 0x534C5543  # "SLUC"
POSITION_BITS: Final = 48
CHUNK_BYTES_MAX: Final = 256_000  # a reader decodes and pruning deletes whole chunks
LOCK_POLL_S: Final = 0.0002  # another process frees the lock only for the moment between two commits
OPEN_WAIT_S: Final = 5.0
PRUNE_CHUNKS_MAX: Final = 2_000
VACUUM_PAGES_MAX: Final = 1_000
FREE_PAGES_KEPT: Final = 4_000
CHECKPOINT_PAGES: Final = 4_000
WAL_BYTES_KEPT: Final = 64_000_000

SCHEMA: Final = """
CREATE TABLE origin (
    one INTEGER PRIMARY KEY CHECK (one = 1), identity TEXT NOT NULL, source TEXT NOT NULL, partitions INTEGER NOT NULL
);
CREATE TABLE heads (partition INTEGER PRIMARY KEY, start INTEGER NOT NULL, next INTEGER NOT NULL);
CREATE TABLE chunks (
    key INTEGER PRIMARY KEY, lengths BLOB NOT NULL, bodies BLOB NOT NULL, checksum INTEGER NOT NULL
);
"""
# A chunk's key is its partition, then the position of its first record. A record that stands within a chunk is
# found by the greatest key not above its own.
READ_CHUNKS: Final = """
SELECT key, lengths, bodies, checksum FROM chunks
WHERE key >= coalesce((SELECT max(key) FROM chunks WHERE key <= :at AND key >= :low), :at) AND key < :high
ORDER BY key
"""
OLDEST_CHUNK: Final = "SELECT min(key) FROM chunks WHERE key >= ? AND key < ?"
# The newest chunk that may hold an un-landed record, and so is the first to stay.
FIRST_KEPT: Final = "SELECT max(key) FROM chunks WHERE key <= ? AND key >= ?"
INSERT_CHUNK: Final = "INSERT INTO chunks VALUES (?, ?, ?, ?)"
DELETE_CHUNKS: Final = """
DELETE FROM chunks WHERE key IN (SELECT key FROM chunks WHERE key >= ? AND key < ? ORDER BY key LIMIT ?)
"""

PUT_TRIAL: Final = "INSERT OR REPLACE INTO chunks VALUES (?, x'', ?, 0)"
DELETE_TRIAL: Final = "DELETE FROM chunks WHERE key = ?"
#: Of no partition, so that nobody reads what is kept there only to see whether it can be.
TRIAL_KEY: Final = 0x7FFF << POSITION_BITS

DAMAGE: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})

T = TypeVar("T")


class DamagedError(UnavailableError):
    """What stands in the file is not what was written: the disk, or somebody, changed it."""


class Origin(NamedTuple):
    """What a file says about itself since it was made."""

    identity: UUID
    source: UUID
    partitions: int


def create_store(path: Path, source: UUID, partitions: int) -> Origin:
    """Make a new file, complete or not at all. Raises `FileExistsError` and, for a disk that refuses, `OSError`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(f"{path.parent} is a file") from error
    origin = Origin(uuid4(), source, partitions)
    draft = path.with_name(f"{path.name}.{origin.identity}")
    try:
        write_empty(draft, origin)
        os.link(draft, path)
    except sqlite3.Error as error:
        raise OSError(str(error)) from error
    finally:
        draft.unlink(missing_ok=True)
    sync_directory(path.parent)
    return origin


def sync_directory(directory: Path) -> None:
    """Names of files survive a power cut from here on."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_empty(path: Path, origin: Origin) -> None:
    """Raises `sqlite3.Error`."""
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {FORMAT}")
        connection.executescript(SCHEMA)
        row = (str(origin.identity), str(origin.source), origin.partitions)
        connection.execute("BEGIN")
        connection.execute("INSERT INTO origin VALUES (1, ?, ?, ?)", row)
        connection.executemany("INSERT INTO heads VALUES (?, 0, 0)", ((n,) for n in range(origin.partitions)))
        connection.execute("COMMIT")
        connection.execute("PRAGMA journal_mode = WAL")  # kept in the file, so it is set once
    finally:
        connection.close()


class Store:
    """One thread's hold on a file. Not to be used from two threads.

    Raises `LogMisfitError` when the path no longer leads to the file that was opened first, `UnavailableError` when
    certainly nothing was written (`DamagedError` where the file is not what was written to it), and
    `OutcomeUnknownError` when that is open.
    """

    def __init__(self, path: Path, identity: UUID | None = None) -> None:
        """With an `identity`, only the file that was made with it is taken hold of."""
        self.path = path
        self.identity = identity
        self._connection: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None
        self._version = -1
        self._ends = Ends(path)

    def open(self) -> Origin:
        """Take hold of the file and read what it says about itself, if nothing that was acknowledged is missing.

        A damaged file is left as it stands: closing it would have SQLite drop the rest of its WAL.
        """
        self._check_file()
        _check_wal(self.path)
        _check_ends(self.path)
        return self._guarded(read_origin)

    def append(self, batch: Mapping[int, list[bytes]], wait_s: float) -> dict[int, int]:
        """Write these records durably; the position of the first of each partition. Waits for other writers."""
        connection = self._hold()
        self._begin(connection, wait_s)
        try:
            firsts = {partition: _insert(connection, partition, bodies) for partition, bodies in batch.items()}
        except sqlite3.Error as error:
            self.close()
            raise _unavailable(f"{self.path} takes no records", error) from error
        self._commit(connection)
        self._ends.tell({partition: first + len(batch[partition]) for partition, first in firsts.items()})
        return firsts

    def probe(self, size: int, wait_s: float) -> None:
        """Find out whether so many bytes can be kept, by keeping them and deleting them again."""
        # What compresses well would tell nothing on some file systems.
        self._change(PUT_TRIAL, (TRIAL_KEY, os.urandom(size)), wait_s)
        self._change(DELETE_TRIAL, (TRIAL_KEY,), wait_s)

    def _change(self, query: str, arguments: tuple[int | bytes, ...], wait_s: float) -> None:
        connection = self._hold()
        self._begin(connection, wait_s)
        try:
            connection.execute(query, arguments)
        except sqlite3.Error as error:
            self.close()
            raise _unavailable(f"{self.path} cannot be written", error) from error
        self._commit(connection)

    def prune(self, positions: Mapping[int, int], wait_s: float) -> bool:
        """Delete some of what lies wholly below these positions; whether there is more of it to delete."""
        connection = self._hold()
        self._begin(connection, wait_s)
        try:
            left = PRUNE_CHUNKS_MAX
            for partition, position in positions.items():
                left -= _delete_below(connection, partition, position, left)
        except sqlite3.Error as error:
            self.close()
            raise _unavailable(f"{self.path} cannot be pruned", error) from error
        self._commit(connection)
        if left == PRUNE_CHUNKS_MAX:
            self._guarded(_give_back_space)
        return left == 0

    def bounds(self) -> dict[int, Bounds]:
        """Of every partition."""
        return self._guarded(_read_bounds)

    def used_bytes(self) -> int:
        """Of the file, without pages that wait to be used again."""
        return self._guarded(_read_used_bytes)

    def size(self) -> int:
        """Bytes of all records in the file."""
        return self._guarded(_read_size)

    def read(self, positions: Mapping[int, int], bytes_max: int) -> list[Slice]:
        """What stands at these positions, in the order of the mapping, up to about `bytes_max` in all."""

        def in_one_snapshot(connection: sqlite3.Connection) -> list[Slice]:
            connection.execute("BEGIN")
            try:
                return _read_slices(connection, positions, bytes_max)
            finally:
                connection.execute("COMMIT")

        return self._guarded(in_one_snapshot)

    def read_on(self, partition: int, position: int, bytes_max: int) -> Slice:
        """The records that stand next at or after `position`, without a hole among them; none at the end.

        A slice that begins later than `position` tells that there is nothing between: that was lost.
        """
        return self._guarded(lambda connection: _read_on(connection, partition, position, bytes_max))

    def changed(self) -> bool:
        """Whether anyone has committed since this was asked last."""
        version = self._guarded(_data_version)
        changed, self._version = version != self._version, version
        return changed

    def close(self) -> None:
        """Let go of the file; the next call takes hold of it again."""
        self._ends.close()
        if self._connection is not None:
            connection, self._connection = self._connection, None
            connection.close()

    def _guarded(self, ask: Callable[[sqlite3.Connection], T]) -> T:
        connection = self._hold()
        try:
            return ask(connection)
        except DamagedError as error:
            self.close()
            raise DamagedError(f"{self.path} is damaged: {error}") from error
        except sqlite3.Error as error:
            self.close()
            raise _unavailable(f"{self.path} cannot be read", error) from error

    def _hold(self) -> sqlite3.Connection:
        """The open connection, after making sure that the path still leads to its file."""
        self._check_file()
        if self._connection is None:
            self._connection = self._connect()
            self._version = -1
        return self._connection

    def _check_file(self) -> None:
        try:
            status = self.path.stat()
        except OSError as error:
            raise LogMisfitError(f"no file at {self.path} ({error}): bring it back, or {NEW_GENERATION}") from error
        found = (status.st_dev, status.st_ino)
        if self._file is None:
            self._file = found
        elif self._file != found:
            raise LogMisfitError(
                f"{self.path} is another file than the one that was opened: bring that one back, or {NEW_GENERATION}"
            )

    def _connect(self) -> sqlite3.Connection:
        """Raises `LogMisfitError` for a file that is no log of this format, or another one."""
        uri = f"file:{quote(str(self.path))}?mode=rw"
        connection = None
        try:
            connection = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=OPEN_WAIT_S)
            self._set_up(connection)
        except (sqlite3.Error, LogMisfitError, DamagedError) as error:
            if connection is not None:
                connection.close()
            if not isinstance(error, sqlite3.Error):
                raise
            raise _unavailable(f"{self.path} cannot be opened", error) from error
        return connection

    def _set_up(self, connection: sqlite3.Connection) -> None:
        _check_format(connection, self.path)
        self._check_identity(read_origin(connection).identity)
        connection.execute("PRAGMA synchronous = FULL")
        # Else an append that is undone leaves frames behind the last commit, as damage does.
        connection.execute("PRAGMA cache_spill = OFF")
        connection.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
        connection.execute(f"PRAGMA journal_size_limit = {WAL_BYTES_KEPT}")

    def _check_identity(self, found: UUID) -> None:
        if self.identity not in (None, found):
            raise LogMisfitError(
                f"{self.path} is log {found}, the database knows {self.identity}: "
                f"bring that one back, or {NEW_GENERATION}"
            )

    def _begin(self, connection: sqlite3.Connection, wait_s: float) -> None:
        """Become the writer. SQLite's own waiting backs off to 100 ms, which starves a process beside a busy one."""
        deadline = time.monotonic() + wait_s
        connection.execute("PRAGMA busy_timeout = 0")
        while True:
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.Error as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() >= deadline:
                    self.close()
                    raise UnavailableError(f"{self.path} cannot be written: {error}") from error
                time.sleep(LOCK_POLL_S)
            else:
                return

    def _commit(self, connection: sqlite3.Connection) -> None:
        try:
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            self.close()
            if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_BUSY):
                raise UnavailableError(f"{self.path} takes no records: {error}") from error
            # What reached the disk may be seen again after a crash, unless a later commit overwrites it.
            raise OutcomeUnknownError(f"{self.path} did not confirm a commit: {error}") from error
        try:
            self._check_file()
        except LogMisfitError as error:
            raise OutcomeUnknownError(str(error)) from error


def _unavailable(text: str, error: sqlite3.Error) -> UnavailableError:
    return (DamagedError if is_damage(error) else UnavailableError)(f"{text}: {error}")


def is_damage(error: sqlite3.Error) -> bool:
    """Whether it tells of a file that is not what was written, rather than of one that cannot be reached."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in DAMAGE


def _check_format(connection: sqlite3.Connection, path: Path) -> None:
    try:
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_NOTADB:
            raise
        application, version = None, None
    if (application, version) != (APPLICATION_ID, FORMAT):
        raise LogMisfitError(
            f"{path} is no log of format {FORMAT} (found application {application}, format {version}): "
            f"start the Sluice that made it, or {NEW_GENERATION}"
        )


def _check_wal(path: Path) -> None:
    wal = path.with_name(path.name + sqlite_wal.SUFFIX)
    try:
        verdict = sqlite_wal.judge(wal)
    except OSError as error:
        raise UnavailableError(f"{wal} cannot be read: {error}") from error
    if verdict is not None and verdict.is_damaged:
        raise DamagedError(
            f"{wal} is damaged behind frame {verdict.frames}: SQLite would pass over whole commits up to frame "
            f"{verdict.whole_end}"
        )


def _check_ends(path: Path) -> None:
    """Without a trace: what cannot be read that way is found out when the file is opened."""
    told = told_ends(path)
    if not told:
        return
    try:
        uri = f"file:{quote(str(path))}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True, timeout=OPEN_WAIT_S)) as connection:
            bounds = _read_bounds(connection)
    except sqlite3.Error:
        return
    short = {partition: end for partition, end in told.items() if partition in bounds and bounds[partition].end < end}
    if short:
        partition, end = min(short.items())
        raise DamagedError(
            f"{path} has lost records that were acknowledged: partition {partition} ends at {bounds[partition].end}, "
            f"and {end} were kept"
        )


def read_origin(connection: sqlite3.Connection) -> Origin:
    """Raises `DamagedError`, `sqlite3.Error`."""
    rows = connection.execute("SELECT identity, source, partitions FROM origin").fetchall()
    try:
        ((identity, source, partitions),) = rows
        return Origin(UUID(identity), UUID(source), partitions)
    except (ValueError, AttributeError, TypeError) as error:
        raise DamagedError(f"what it says about itself cannot be read: {rows}") from error


def _insert(connection: sqlite3.Connection, partition: int, bodies: list[bytes]) -> int:
    update = "UPDATE heads SET next = next + ? WHERE partition = ? RETURNING next"
    ((end,),) = connection.execute(update, (len(bodies), partition)).fetchall()
    first: int = end - len(bodies)
    connection.executemany(
        INSERT_CHUNK,
        (_chunk_row(key_of(partition, first + offset), chunk) for offset, chunk in _chunks(bodies)),
    )
    return first


def _chunk_row(key: int, records: list[bytes]) -> tuple[int, bytes, bytes, int]:
    lengths, bodies = _lengths(records), b"".join(records)
    return key, lengths, bodies, checksum_of(key, lengths, bodies)


def checksum_of(key: int, lengths: bytes, bodies: bytes) -> int:
    """SQLite notices damage to its own structures, not to what a row holds."""
    return crc32(bodies, crc32(lengths, crc32(key.to_bytes(8, "big"))))


def _chunks(bodies: list[bytes]) -> Iterator[tuple[int, list[bytes]]]:
    """Cut into chunks: each with the index of its first record."""
    begin, size = 0, 0
    for index, body in enumerate(bodies):
        if size and size + len(body) > CHUNK_BYTES_MAX:
            yield begin, bodies[begin:index]
            begin, size = index, 0
        size += len(body)
    yield begin, bodies[begin:] if begin else bodies


def _lengths(bodies: list[bytes]) -> bytes:
    """Little-endian, so that a file may move; empty for a single record, the common case when little comes in."""
    if len(bodies) == 1:
        return b""
    lengths = array("I", map(len, bodies))
    if sys.byteorder == "big":
        lengths.byteswap()
    return lengths.tobytes()


def count_of(lengths: bytes) -> int:
    """How many records a chunk has."""
    return len(lengths) // 4 or 1


def _unpack(lengths: bytes, bodies: bytes) -> list[bytes]:
    if not lengths:
        return [bodies]
    sizes = array("I", lengths)
    if sys.byteorder == "big":
        sizes.byteswap()
    records, begin = [], 0
    for size in sizes:
        end = begin + size
        records.append(bodies[begin:end])
        begin = end
    return records


def _read_slices(connection: sqlite3.Connection, positions: Mapping[int, int], bytes_max: int) -> list[Slice]:
    bounds = _read_bounds(connection)
    slices: list[Slice] = []
    for partition, position in positions.items():
        if position == bounds[partition].end:
            continue
        if not bounds[partition].start <= position <= bounds[partition].end:
            if slices:
                break  # the complaint comes with the next call, when these are handed over
            _complain(partition, position, bounds[partition])
        part, size = _read_partition(connection, partition, position, bytes_max)
        if not part.bodies or part.first != position:
            missing = part.first if part.bodies else bounds[partition].end
            raise DamagedError(f"partition {partition}: the records from {position} to {missing} are missing")
        slices.append(part)
        bytes_max -= size
        if bytes_max <= 0:
            break
    return slices


def _complain(partition: int, position: int, bounds: Bounds) -> None:
    if position < bounds.start:
        raise BehindRetentionError(partition, position, bounds.start)
    raise LogMisfitError(
        f"partition {partition} of the log ends at {bounds.end}, position {position} was asked for: "
        f"bring the right log back, or {NEW_GENERATION}"
    )


def _read_partition(
    connection: sqlite3.Connection, partition: int, position: int, bytes_max: int
) -> tuple[Slice, int]:
    """Records at or after `position` that follow each other, and their bytes: at least one chunk of them."""
    keys = {"at": key_of(partition, position), "low": key_of(partition, 0), "high": key_of(partition + 1, 0)}
    records: list[bytes] = []
    size = 0
    first = position
    rows = connection.execute(READ_CHUNKS, keys)
    for key, lengths, bodies, checksum in rows:
        begin = key - keys["low"]
        unpacked = _verified(partition, begin, lengths, bodies, checksum)
        if begin < position:
            unpacked = unpacked[position - begin :]
        elif not records:
            first = begin
        elif begin != first + len(records):
            break
        records += unpacked
        size += len(bodies)
        if records and size >= bytes_max:
            break
    rows.close()
    return Slice(partition, first, records), size


def _verified(partition: int, first: int, lengths: bytes, bodies: bytes, checksum: int) -> list[bytes]:
    if checksum_of(key_of(partition, first), lengths, bodies) != checksum:
        end = first + count_of(lengths)
        raise DamagedError(f"partition {partition}: the records from {first} to {end - 1} are not what was written")
    return _unpack(lengths, bodies)


def _read_on(connection: sqlite3.Connection, partition: int, position: int, bytes_max: int) -> Slice:
    part, _ = _read_partition(connection, partition, position, bytes_max)
    if part.bodies:
        return part
    (end,) = connection.execute("SELECT next FROM heads WHERE partition = ?", (partition,)).fetchone()
    return Slice(partition, max(position, end), [])


def _delete_below(connection: sqlite3.Connection, partition: int, position: int, chunks_max: int) -> int:
    """Delete chunks without a record at or after `position`; how many."""
    low, high = key_of(partition, 0), key_of(partition + 1, 0)
    start, end = connection.execute("SELECT start, next FROM heads WHERE partition = ?", (partition,)).fetchone()
    if position <= start or chunks_max <= 0:
        return 0
    kept = high
    if position < end:
        (kept,) = connection.execute(FIRST_KEPT, (key_of(partition, position), low)).fetchone()
    deleted = connection.execute(DELETE_CHUNKS, (low, kept, chunks_max)).rowcount
    if deleted:
        (oldest,) = connection.execute(OLDEST_CHUNK, (low, high)).fetchone()
        start = end if oldest is None else oldest - low
        connection.execute("UPDATE heads SET start = ? WHERE partition = ?", (start, partition))
    return deleted


def _give_back_space(connection: sqlite3.Connection) -> None:
    """Freed pages are used again; only what a past backlog left behind goes back to the file system, bit by bit."""
    (free,) = connection.execute("PRAGMA freelist_count").fetchone()
    if free > FREE_PAGES_KEPT:
        pages = min(free - FREE_PAGES_KEPT, VACUUM_PAGES_MAX)
        connection.execute(f"PRAGMA incremental_vacuum({pages})").fetchall()


def _read_bounds(connection: sqlite3.Connection) -> dict[int, Bounds]:
    rows = connection.execute("SELECT partition, start, next FROM heads")
    return {partition: Bounds(start, end) for partition, start, end in rows}


def _read_used_bytes(connection: sqlite3.Connection) -> int:
    names = "page_count", "freelist_count", "page_size"
    pages, free, size = (int(connection.execute(f"PRAGMA {name}").fetchone()[0]) for name in names)
    return (pages - free) * size


def _read_size(connection: sqlite3.Connection) -> int:
    size: int = connection.execute("SELECT coalesce(sum(length(bodies)), 0) FROM chunks").fetchone()[0]
    return size


def _data_version(connection: sqlite3.Connection) -> int:
    version: int = connection.execute("PRAGMA data_version").fetchone()[0]
    return version


def key_of(partition: int, position: int) -> int:
    return partition << POSITION_BITS | position

"""A spool's files in the spool directory, and whose they are.

`ID.spool` holds the records, `ID.lock` is locked by the process that uses them, for as long as it lives; when it has
died, another process adopts them. A damaged file becomes `ID.damaged`, and what could be read of it `ID.salvaged`,
which is used in its place. Left out: what is done with records (`windows`, `spool`).
"""

import contextlib
import fcntl
import logging
import os
import struct
from pathlib import Path
from typing import Final, NamedTuple, Self
from uuid import UUID

from runtime.errors import UnavailableError
from runtime.ids import uuid7
from runtime.log.port import Bounds, LogMisfitError
from runtime.log.sqlite_salvage import salvage
from runtime.log.sqlite_store import APPLICATION_ID, FORMAT, DamagedError, Store, create_store

_log = logging.getLogger("sluice.spool")

SPOOL: Final = ".spool"
SALVAGED: Final = ".salvaged"
DAMAGED: Final = ".damaged"
LOCK: Final = ".lock"
#: What SQLite and `Store` keep beside a file.
SIBLINGS: Final = ("-wal", "-shm", "-journal", "-ends")

_SQLITE_MAGIC: Final = b"SQLite format 3\0"
#: user_version and application_id in a SQLite file's head.
_VERSIONS: Final = struct.Struct(">16x44xi4xi")
_HEAD_BYTES: Final = 100


class NewerFormatError(UnavailableError):
    """A newer Sluice made the file: it waits for that one."""


class Content(NamedTuple):
    """What an open file holds."""

    spool: UUID
    bounds: dict[int, Bounds]
    size: int
    """Bytes of its records."""


class Claim:
    """The right to the files of one spool, which no other process has meanwhile. Every call blocks."""

    def __init__(self, directory: Path, spool: UUID, descriptor: int) -> None:
        self.spool = spool
        self._directory = directory
        self._descriptor = descriptor

    @classmethod
    def make(cls, directory: Path) -> Self:
        """On a new spool. Raises `OSError`."""
        directory.mkdir(parents=True, exist_ok=True)
        while True:
            spool = uuid7()
            descriptor = _lock(directory / f"{spool}{LOCK}")
            if descriptor is not None:  # one that scans for abandoned files may have taken it for one
                return cls(directory, spool, descriptor)

    @classmethod
    def adopt(cls, directory: Path, spool: UUID) -> Self | None:
        """On what a dead process left; None while another process uses it, or when there is nothing left of it."""
        descriptor = _lock(directory / f"{spool}{LOCK}")
        if descriptor is None:
            return None
        claim = cls(directory, spool, descriptor)
        if claim.path.exists():
            return claim
        claim.delete()
        return None

    @property
    def path(self) -> Path:
        salvaged = self._file(SALVAGED)
        return salvaged if salvaged.exists() else self._file(SPOOL)

    def _file(self, ending: str) -> Path:
        return self._directory / f"{self.spool}{ending}"

    def create(self, partitions: int) -> Store:
        """Raises `OSError`."""
        origin = create_store(self.path, self.spool, partitions)
        return Store(self.path, origin.identity)

    def look(self, store: Store) -> Content:
        """Open the file and see what it holds.

        Raises `DamagedError`, `NewerFormatError` and, when it cannot be read now, `UnavailableError`.
        """
        if self._file(SALVAGED).exists():
            self._put_aside(self._file(SPOOL))
        if _is_newer(store.path):
            raise NewerFormatError(f"{store.path} was made by a newer Sluice: start that one")
        try:
            origin = store.open()
            return Content(origin.source, store.bounds(), store.size())
        except LogMisfitError as error:
            if not store.path.exists():
                raise UnavailableError(f"{store.path} is gone") from error
            raise DamagedError(f"{store.path} is no spool any more") from error

    def set_aside(self, partitions: int) -> None:
        """Put a whole file, with what can be read, in the place of the damaged one, which is kept.

        Raises `UnavailableError` when there is no room for it.
        """
        damaged = self.path
        if damaged == self._file(SALVAGED):  # damaged once more
            damaged = _rename(damaged, self._file(SPOOL))
        found = salvage(damaged, self._file(SALVAGED), self.spool, partitions)
        kept = self._put_aside(damaged)
        unknown = "" if found.ends_known else "; how many stood behind the last one that was found, nobody can say"
        _log.error(
            "a spool file is damaged and was set aside: what can be read of it goes to the log, the rest is declared "
            "lost; check the disk, and delete the damaged file when nobody needs it any more",
            extra={"file": str(kept), "found": f"{found.records} records{unknown}"},
        )

    def _put_aside(self, damaged: Path) -> Path:
        number = 0
        while (kept := self._file(f"{DAMAGED}{f'.{number}' if number else ''}")).exists():
            number += 1
        if damaged.exists():
            _rename(damaged, kept)
        return kept

    def delete(self) -> None:
        """Remove its files, the lock last, and give up the claim."""
        with contextlib.suppress(OSError):  # a file that stays is adopted, and drained again without harm
            for path in self._directory.glob(f"{self.spool}.*"):
                if not path.name.startswith((f"{self.spool}{DAMAGED}", f"{self.spool}{LOCK}")):
                    path.unlink(missing_ok=True)
            if not self.path.exists():
                self._file(LOCK).unlink(missing_ok=True)
        self.release()

    def release(self) -> None:
        """Leave the files to whoever adopts them."""
        os.close(self._descriptor)


def abandoned(directory: Path, ours: set[UUID], count_max: int) -> list[Claim]:
    """Claims on what dead processes left, the oldest first. Raises `OSError`."""
    claims: list[Claim] = []
    for spool in sorted(_spools(directory) - ours):
        if len(claims) >= count_max:
            break
        claim = Claim.adopt(directory, spool)
        if claim is not None:
            claims.append(claim)
    return claims


def _spools(directory: Path) -> set[UUID]:
    found = set()
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return set()
    for name in names:
        stem, dot, ending = name.partition(".")
        if dot + ending in (SPOOL, SALVAGED, LOCK):
            with contextlib.suppress(ValueError):
                found.add(UUID(stem))
    return found


def _lock(path: Path) -> int | None:
    """The descriptor that holds the lock; None while another process does. Raises `OSError`."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever had it may have deleted it between our opening and our locking.
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _rename(path: Path, target: Path) -> Path:
    """With what SQLite keeps beside it."""
    path.rename(target)
    for sibling in SIBLINGS:
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + sibling).rename(target.with_name(target.name + sibling))
    return target


def _is_newer(path: Path) -> bool:
    with contextlib.suppress(OSError):
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
        if len(head) == _HEAD_BYTES and head.startswith(_SQLITE_MAGIC):
            version, application = _VERSIONS.unpack_from(head)
            return bool(application == APPLICATION_ID and version > FORMAT)
    return False

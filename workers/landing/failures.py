"""What a failure means for the batch it met: wait, do it again carefully, or look for the record at fault.

Left out: the waiting itself (`worker`).
"""

import random
from collections.abc import Hashable, Iterable
from enum import Enum
from typing import Final

import asyncpg

from runtime.errors import SluiceError, UnavailableError
from runtime.log.port import BehindRetentionError
from runtime.postgres import UNAVAILABLE


class Cause(Enum):
    """Why an attempt failed; the value is the metric's label."""

    UNAVAILABLE = "unavailable"
    """The database is away, going, read-only or full: the same again later."""
    CONTENTION = "contention"
    """Rows met others (unique violation, deadlock, serialisation): the same again with every reading suspect."""
    CONTENT = "content"
    """The database refuses what a record holds: smaller batches until it stands alone."""
    POSITION = "position"
    """A position was not where it was expected: go on from where it is."""
    TOMBSTONES = "tombstones"
    """A site began to be erased, or a horizon moved, since the batch was planned: plan it again."""
    LOG = "log"
    """The log no longer has what comes next."""
    DATABASE = "database"
    """The database refuses for a reason of its own (a right, a missing table): again later, and say so."""


class PositionMovedError(SluiceError):
    """Another worker, or an earlier COMMIT of this one whose answer was lost, has moved a position."""


class TombstonesMovedError(SluiceError):
    """The plan was made without knowing every tombstone and horizon."""


class LeaseLapsedError(SluiceError):
    """The lease of a partition may have ended: lease it again before writing."""


class MiscountError(SluiceError):
    """The database stored, knew and refused more or fewer readings than it was given: do it again."""


class PoisonFloodError(SluiceError):
    """So much goes into quarantine whole that a deploy must be at fault: the worker stops."""


_CONTENTION: Final = (
    MiscountError,
    asyncpg.UniqueViolationError,
    asyncpg.ExclusionViolationError,
    asyncpg.TransactionRollbackError,
    asyncpg.LockNotAvailableError,
)
_CONTENT: Final = (
    asyncpg.DataError,
    asyncpg.IntegrityConstraintViolationError,
    asyncpg.ProgramLimitExceededError,
)
_UNAVAILABLE: Final = (
    *UNAVAILABLE,
    UnavailableError,
    asyncpg.InsufficientResourcesError,
    asyncpg.OperatorInterventionError,
    asyncpg.TransactionTimeoutError,
    asyncpg.PostgresIOError,
    asyncpg.InternalClientError,  # what a connection cut at a bad moment raises
)


def cause_of(error: Exception) -> Cause | None:
    """None for what is no failure of an attempt: a fault in the code, or a reason to stop."""
    kinds: tuple[tuple[type[Exception] | tuple[type[Exception], ...], Cause], ...] = (
        ((PositionMovedError, LeaseLapsedError), Cause.POSITION),
        (TombstonesMovedError, Cause.TOMBSTONES),
        (BehindRetentionError, Cause.LOG),
        (_CONTENTION, Cause.CONTENTION),
        (_UNAVAILABLE, Cause.UNAVAILABLE),
        (_CONTENT, Cause.CONTENT),
        (asyncpg.PostgresError, Cause.DATABASE),
    )
    return next((cause for kind, cause in kinds if isinstance(error, kind)), None)


class Backoff:
    """Waits that double from `least` to `most` seconds, each shortened at random by up to half."""

    def __init__(self, least: float, most: float) -> None:
        self._least = least
        self._most = most
        self._attempts = 0

    def next(self) -> float:
        wait: float = min(self._most, self._least * 2 ** min(self._attempts, 32))
        self._attempts += 1
        return wait * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, no secret

    def reset(self) -> None:
        self._attempts = 0


class FloodGuard:
    """Counts what is quarantined whole, each key once within `window` seconds."""

    def __init__(self, what: str, setting: str, most: int, window: float) -> None:
        self._what = what
        self._setting = setting
        self._most = most
        self._window = window
        self._seen: dict[Hashable, float] = {}

    def remember(self, keys: Iterable[Hashable], now: float) -> None:
        """What was counted before this process began."""
        for key in keys:
            self._seen.setdefault(key, now)

    def note(self, keys: Iterable[Hashable], now: float) -> None:
        """Raises `PoisonFloodError` when there are too many; nothing of them may be written then."""
        self._seen = {key: seen for key, seen in self._seen.items() if seen > now - self._window}
        self._seen.update((key, now) for key in keys if key not in self._seen)
        if len(self._seen) > self._most:
            raise PoisonFloodError(
                f"{len(self._seen)} {self._what} within {self._window:.0f} s, {self._most} at most: what writes "
                "them, or this worker, is not what it should be. Undo the last deploy, or raise "
                f"{self._setting} to quarantine them"
            )

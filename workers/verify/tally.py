"""What was found, per organisation, hour of receipt, source and partition, as the ledger counts; and every finding.

Left out: how it is printed (`deploy`).
"""

from array import array
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Final, NamedTuple
from uuid import UUID

from runtime.errors import ConfigurationError

HOUR_US: Final = 3_600_000_000
#: About 0.3 kB each.
_GROUPS_MAX: Final = 1_000_000

# Columns of a group.
RECEIVED: Final = 0
FOUND: Final = 1  # accepted readings whose row stands with their value
REPEATED: Final = 2  # of these, those that another record or reading brought first
OPEN: Final = 3  # of these, those that may have been brought by records that the log no longer has
TOLD: Final = 4  # duplicates, by the outcomes that landing wrote
CONFLICTS: Final = 5  # in quarantine, or released from it
QUARANTINED: Final = 6
DISCARDED: Final = 7
EXPIRED: Final = 8
RETIRED: Final = 9  # nowhere, and older than the organisation keeps raw readings or than what it has let go
LOST: Final = 10
ALTERED: Final = 11  # of FOUND, those whose flags or note are others
TOLD_CONFLICTS: Final = 12
ERASED: Final = 13  # nowhere, and tombstones are on their times
_FOUND_COLUMNS: Final = 14
_BOOKED: Final = 6  # what the ledger says of a group, behind what was found
_WIDTH: Final = _FOUND_COLUMNS + _BOOKED


class Group(NamedTuple):
    """A row of the ledger."""

    organisation: bytes
    hour: int
    source: bytes
    partition: int


class Booked(NamedTuple):
    """What the ledger says of a group."""

    received: int
    stored: int
    duplicates: int
    conflicts: int
    quarantined: int
    erased: int


class SetAside(NamedTuple):
    """What the ledger says of readings that were set aside in a group, and what stands in the quarantine of it."""

    booked: int
    """Conflicts and quarantined."""
    replayed: int
    discarded: int
    expired: int
    lost: int
    held: int
    """From here on rows of the quarantine: held or being replayed."""
    rows_released: int
    rows_discarded: int
    rows_expired: int

    @property
    def gone(self) -> int:
        """Set aside, and of no row any more."""
        return self.booked - self.held - self.rows_released - self.rows_discarded - self.rows_expired


class Tally:
    """Counts by group; groups are numbered as they come."""

    def __init__(self) -> None:
        self._numbers: dict[Group, int] = {}
        self._counts = array("q")

    def number(self, group: Group) -> int:
        """Raises `ConfigurationError` for more groups than fit in memory."""
        found = self._numbers.get(group)
        if found is None:
            if len(self._numbers) >= _GROUPS_MAX:
                raise ConfigurationError(
                    f"more than {_GROUPS_MAX} rows of the ledger: ask for less with --since and --organisation"
                )
            found = self._numbers[group] = len(self._numbers)
            self._counts.extend((0,) * _WIDTH)
        return found

    def add(self, number: int, column: int, count: int = 1) -> None:
        self._counts[number * _WIDTH + column] += count

    def book(self, group: Group, booked: Booked) -> None:
        at = self.number(group) * _WIDTH + _FOUND_COLUMNS
        self._counts[at : at + _BOOKED] = array("q", booked)

    def groups(self) -> Iterator[tuple[Group, list[int], Booked]]:
        for group, number in self._numbers.items():
            row = self._counts[number * _WIDTH : (number + 1) * _WIDTH].tolist()
            yield group, row[:_FOUND_COLUMNS], Booked(*row[_FOUND_COLUMNS:])


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that is not as the records, the store and the books together say it must be."""

    kind: str
    """lost, unexplained, altered, unerased, outcome, ledger, gap."""
    message: str
    organisation_id: UUID | None = None
    device_id: UUID | None = None
    metric: str | None = None
    label: str | None = None
    time: str | None = None
    value: float | str | None = None
    source: UUID | None = None
    partition: int | None = None
    position: int | None = None
    item: int | None = None
    readings: int = 1
    """How many it is about; records, for a gap."""

    def told(self) -> dict[str, object]:
        """Without what is not known."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass
class Findings:
    """Hands each finding on as it is made, and keeps counts only."""

    emit: Callable[[Finding], None]
    count: int = 0
    counts: dict[tuple[UUID | None, str], int] = field(default_factory=dict)

    @property
    def by_kind(self) -> dict[str, int]:
        """How many readings, or records of a gap, each kind is about."""
        found: dict[str, int] = {}
        for (_, kind), count in self.counts.items():
            found[kind] = found.get(kind, 0) + count
        return found

    def add(self, finding: Finding) -> None:
        self.count += 1
        key = finding.organisation_id, finding.kind
        self.counts[key] = self.counts.get(key, 0) + finding.readings
        self.emit(finding)

"""A partition that is held: where it stands, what is remembered of it, and whether it lands by itself.

Left out: who holds which partition (`leases`), and what changes any of it (`worker`, `pipeline`, `apart`).
"""

from dataclasses import dataclass, field

from workers.landing.deliveries import Stretches
from workers.landing.late import Memory, SpoolPart
from workers.landing.leases import Lease
from workers.landing.plan import Bounds, Part
from workers.landing.series import NEVER, SeriesCache
from workers.settings import LandingSettings


@dataclass
class Aside:
    """Of a partition that lands by itself: the database refused a batch in which records of it were."""

    until: int
    """Where its part of that batch ended."""
    quiet_at: float = float("-inf")
    """When it may land with the others again if no other record is refused; in monotonic seconds."""
    attempt: int = 1_000_000
    """Of how many records the next transaction is to be, at most, unless they have been tried."""
    tried: int = 0
    """Of how many records, from where it stands, it is known whether the database takes each by itself."""
    bodies: list[bytes] = field(default_factory=list)
    """Read and not landed; the first stands at the holding's position."""
    bytes: int = 0
    is_resting: bool = False
    """Whether nothing more is to be read for now."""

    def drop(self) -> None:
        """Forget what was read; the log still has it."""
        self.bodies = []
        self.bytes = self.tried = 0
        self.is_resting = False


@dataclass
class Holding:
    """One partition. Outlives the pipeline's runs."""

    lease: Lease
    position: int = 0
    landed_until: int = 0
    """Records before it have landed before."""
    cache: SeriesCache = field(default_factory=lambda: SeriesCache(NEVER))
    is_clean: bool = False
    """Whether position and cache are those of the last COMMIT; if not, they are made anew from the database."""
    careful_until: int = 0
    """Records before it were in a transaction that met others' rows: all their readings are suspect."""
    rejected: dict[int, str] = field(default_factory=dict)
    """Records that the database refuses, by position, with what it said."""
    aside: Aside | None = None
    """Set while it lands by itself."""
    newer_version: int | None = None
    """Of the record it waits at."""
    waits_at: int = 0
    """Where the record stands at which it waits, if it does."""
    jump: str | None = None
    """Why it waits for an operator: a spool's record came before one that it must follow, for one."""
    spools: dict[SpoolPart, int] = field(default_factory=dict)
    """The next record of each spool that drains into it."""
    deliveries: Stretches = field(default_factory=dict)
    """Those that brokers may send again."""
    has_losses: bool = False
    """Whether the log has lost records of it."""

    @property
    def is_waiting(self) -> bool:
        return self.newer_version is not None or self.jump is not None

    @property
    def waits(self) -> str | None:
        """Why it lands nothing until somebody does something; None while it lands."""
        if self.newer_version is None:
            return self.jump
        return (
            f"partition {self.lease.partition} waits at {self.waits_at}: a record of version {self.newer_version} "
            "needs a newer worker"
        )

    def begin(self) -> None:
        """Nothing has been read yet beyond its position: a new run."""
        if self.aside is not None:
            self.aside.drop()
        if self.waits_at > self.position:
            self.newer_version = self.jump = None

    def part(self, position: int, *, ahead: Part | None = None, is_trial: bool = False) -> Part:
        """For a plan that begins at `position`. `is_trial`: a spool's records before it may be missing."""
        before = None if ahead is None else ahead.memory
        return Part(
            self.lease.partition,
            position,
            self.cache,
            ahead=ahead,
            careful_until=self.careful_until,
            landed_until=self.landed_until,
            rejected=self.rejected,
            memory=Memory(self.spools, before, expects_losses=self.has_losses or is_trial, delivered=self.deliveries),
        )

    def landed(self, part: Part) -> None:
        """The transaction with `part` is committed."""
        part.apply()
        self.position = part.position
        self.spools.update(part.memory.spools)
        part.memory.deliveries.apply(self.deliveries)
        for position in [position for position in self.rejected if position < part.position]:
            del self.rejected[position]


def bounds_of(settings: LandingSettings) -> Bounds:
    """What a plan depends on."""
    return Bounds(
        round(settings.landing_future_s * 1e6),
        settings.landing_quarantine_payload_max,
        round(settings.landing_move_max_ms * 1000),
        round(settings.landing_nonce_memory_s * 1e6),
    )

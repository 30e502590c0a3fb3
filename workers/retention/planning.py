"""What may go: each organisation's horizons, and what of the chunks is behind all of them or some. Pure: no I/O.

A horizon is where a chunk ends, so that an organisation's rows are looked for once a chunk: it lies behind the time
that is asked for by up to a chunk, never before it. Times are microseconds since 2000.
"""

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple
from uuid import UUID

from workers.rollups.session import DAY, NEVER, floored

#: From what is computed first on: none is kept for less long than the one before.
TIERS: Final = ("raw", "5m", "1h", "1d")


class Chunk(NamedTuple):
    """`[first, stop)` of a table of a tier."""

    tier: str
    relation: str
    name: str
    first: int
    stop: int
    bytes: int


class Horizon(NamedTuple):
    """Of an organisation and tier, see the schema."""

    refused: int
    dropped: int
    deleted: int


NO_HORIZON: Final = Horizon(NEVER, NEVER, NEVER)
Days = tuple[int, ...]
"""By tier; 0: for ever."""


class Standing(NamedTuple):
    """What the database says of one moment or so."""

    now: int
    days: Mapping[UUID, Days]
    """By organisation."""
    horizons: Mapping[tuple[UUID, str], Horizon]
    chunks: Sequence[Chunk]

    def horizon(self, organisation: UUID, tier: str) -> Horizon:
        return self.horizons.get((organisation, tier), NO_HORIZON)

    def passed(self, tier: str) -> int:
        """Where the horizons of all organisations have passed."""
        return min((self.horizon(one, tier).dropped for one in self.days), default=NEVER)

    def wanted(self, organisation: UUID) -> dict[str, int]:
        """Where an organisation's horizons should be."""
        found: dict[str, int] = {}
        through = NEVER
        for tier, days in reversed([*zip(TIERS, self.days[organisation], strict=True)]):
            if days:
                end = self.now - days * DAY
                ends = [floored(one.stop, DAY) for one in self.chunks if one.tier == tier and one.stop <= end]
                through = max(through, *ends) if ends else through
            found[tier] = max(through, self.horizon(organisation, tier).refused)
        return found


class Share(NamedTuple):
    """Rows of an organisation in a chunk that others keep."""

    organisation: UUID
    chunk: Chunk


def effective(days: Sequence[int | None], defaults: Sequence[int]) -> Days:
    """How long each tier is kept: as the organisation or the default says, and no less than the tier before."""
    found: list[int] = []
    for own, default in zip(days, defaults, strict=True):
        kept = default if own is None else own
        is_for_ever = kept == 0 or (found and found[-1] == 0)
        found.append(0 if is_for_ever else max(kept, *found, 1))
    return tuple(found)


def retired(standing: Standing) -> list[Chunk]:
    """Chunks that no organisation wants any more."""
    wanted = [standing.wanted(organisation) for organisation in standing.days]
    through = {tier: min((one[tier] for one in wanted), default=NEVER) for tier in TIERS}
    return [chunk for chunk in standing.chunks if chunk.stop <= through[chunk.tier]]


def shares(standing: Standing) -> list[Share]:
    """What an organisation wants no more of chunks that others keep, and was not deleted yet."""
    whole = {chunk.name for chunk in retired(standing)}
    found: list[Share] = []
    for organisation in standing.days:
        wanted = standing.wanted(organisation)
        found += [
            Share(organisation, chunk)
            for chunk in standing.chunks
            if chunk.name not in whole
            and standing.horizon(organisation, chunk.tier).deleted < chunk.stop <= wanted[chunk.tier]
        ]
    return found

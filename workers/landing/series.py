"""What one partition's holder remembers of its series: the id, and a time that nothing landed is newer than.

Left out: the look-up itself (`registry`) and when any of it may change (`worker`).
"""

from array import array
from typing import Final, NamedTuple

#: Older than any time: of a series that was just made, and of a partition where nothing has landed.
NEVER: Final = -(2**63)

_REFUSALS_MAX: Final = 100_000


class SeriesName(NamedTuple):
    """What a channel says its series is. `organisation` is the record's."""

    organisation: bytes
    device: bytes
    metric: str
    label: str
    unit: str


class Refusal(NamedTuple):
    """Why no reading of a series can land: a code of the quarantine and a sentence."""

    code: str
    message: str


class Found(NamedTuple):
    """A series that stands in the database; `is_new`: nothing of it can have landed."""

    series_id: int
    is_new: bool
    unit: str = ""


def cache_key(device: bytes, metric: str, label: str, unit: str) -> bytes:
    """The unit is part of it: a channel with another unit than its series' is a miss, and judged where misses are."""
    return device + f"{metric}\0{label}\0{unit}".encode()


class SeriesCache:
    """One partition's series. `slots`, `ids` and `newest` are used directly: a call a channel would cost too much.

    Made anew whenever the partition is assigned or a transaction was rolled back.
    """

    __slots__ = ("bound", "high_water", "ids", "newest", "refused", "refused_until", "slots")

    def __init__(self, high_water: int) -> None:
        self.bound = high_water
        """Of a series not in here, no landed reading is newer: what has landed since is in here."""
        self.high_water = high_water
        """No landed reading of the partition is newer."""
        self.slots: dict[bytes, int] = {}
        self.ids = array("i")
        self.newest = array("q")
        """By slot: no landed reading of the series is newer. Moves only after a COMMIT."""
        self.refused: dict[bytes, Refusal] = {}
        self.refused_until = 0.0

    @property
    def count(self) -> int:
        return len(self.ids)

    def learn(self, name: SeriesName, found: Found) -> None:
        """A channel without a unit and one with the series' own share a slot."""
        twin = self.slots.get(cache_key(name.device, name.metric, name.label, "" if name.unit else found.unit))
        if twin is None:
            twin = len(self.ids)
            self.ids.append(found.series_id)
            self.newest.append(NEVER if found.is_new else self.bound)
        self.slots[cache_key(*name[1:])] = twin

    def refuse(self, key: bytes, refusal: Refusal, until: float) -> None:
        """Remember a refusal; all are forgotten together, before the first of them is stale."""
        if len(self.refused) >= _REFUSALS_MAX:
            self.refused.clear()
        if not self.refused:
            self.refused_until = until
        self.refused[key] = refusal

    def forget_refused(self, now: float) -> None:
        if now >= self.refused_until:
            self.refused.clear()

"""The log from positions on, up to where it has landed. Left out: what its records say."""

from collections import deque
from collections.abc import Mapping
from typing import Final, NamedTuple

from runtime.log.port import Log

_READ_BYTES: Final = 1_000_000
_READ_WAIT_S: Final = 0.05
#: Read and not landed yet; beyond it only what has landed is read.
_AHEAD_BYTES_MAX: Final = 8_000_000


class Entry(NamedTuple):
    """A record as it stands in the log."""

    partition: int
    position: int
    body: bytes


class Tail:
    """`positions` are of what was taken. Raises in `take` what the log's reader does."""

    def __init__(self, log: Log, positions: Mapping[int, int]) -> None:
        self.positions = dict(positions)
        self._reader = log.reader()
        self._assigned: frozenset[int] = frozenset()
        self._ahead: dict[int, deque[Entry]] = {partition: deque() for partition in positions}
        self._ahead_bytes = 0

    async def take(self, landed: Mapping[int, int], bytes_max: int) -> list[Entry]:
        """What has landed beyond the positions, about `bytes_max` of it; empty if nothing has or none is read yet."""
        behind = frozenset(partition for partition, at in self.positions.items() if at < landed[partition])
        if not behind:
            return []
        if self._ahead_bytes > _AHEAD_BYTES_MAX:
            await self._assign(behind)
        elif not behind <= self._assigned:
            await self._assign(frozenset(self.positions))
        if any(not self._ahead[partition] for partition in behind):
            await self._read()
        entries: list[Entry] = []
        for partition in behind:
            bytes_max -= self._take_of(partition, landed[partition], bytes_max, entries)
        return entries

    def skip(self, positions: Mapping[int, int]) -> None:
        """Go on from there: what lies before is not wanted, or is gone."""
        for partition, position in positions.items():
            if position != self.positions[partition]:
                self.positions[partition] = position
                self._assigned = frozenset()

    async def close(self) -> None:
        await self._reader.close()

    async def _assign(self, partitions: frozenset[int]) -> None:
        self._assigned = frozenset()
        for ahead in self._ahead.values():
            ahead.clear()
        self._ahead_bytes = 0
        await self._reader.assign({partition: self.positions[partition] for partition in sorted(partitions)})
        self._assigned = partitions

    async def _read(self) -> None:
        for part in await self._reader.read(bytes_max=_READ_BYTES, wait_s=_READ_WAIT_S):
            entries = (Entry(part.partition, position, body) for position, body in enumerate(part.bodies, part.first))
            self._ahead[part.partition].extend(entries)
            self._ahead_bytes += sum(map(len, part.bodies))

    def _take_of(self, partition: int, landed: int, bytes_max: int, entries: list[Entry]) -> int:
        """The bytes of what was taken."""
        ahead, size = self._ahead[partition], 0
        while ahead and size < bytes_max and ahead[0].position < landed:
            entry = ahead.popleft()
            entries.append(entry)
            size += len(entry.body)
            self.positions[partition] = entry.position + 1
        self._ahead_bytes -= size
        return size

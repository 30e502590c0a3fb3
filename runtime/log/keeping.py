"""How long a SQLite log keeps what has landed: for a while, so that `sluice verify` can read it again.

Left out: deleting it (`sqlite_store`).
"""

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final

_STEPS: Final = 200


class Kept:
    """What of the landed records may go. Of one process: after its start all of them are as if landed just now."""

    def __init__(self, keep_s: float, bytes_max: int, now: Callable[[], float] = time.monotonic) -> None:
        self._keep_s = keep_s
        self._bytes_max = bytes_max
        self._now = now
        self._latest: dict[int, int] = {}
        self._marks: deque[tuple[float, dict[int, int]]] = deque()
        """What had landed at some moments, oldest first."""

    def due(self, positions: Mapping[int, int], used_bytes: int) -> dict[int, int]:
        """The positions below which everything may go, now that these have landed and the file holds so much."""
        now = self._now()
        for partition, position in positions.items():
            self._latest[partition] = max(position, self._latest.get(partition, 0))
        if not self._marks or now - self._marks[-1][0] >= self._keep_s / _STEPS:
            self._marks.append((now, dict(self._latest)))
        due: dict[int, int] = {}
        while self._marks and self._marks[0][0] <= now - self._keep_s:
            due = self._marks.popleft()[1]
        if used_bytes > self._bytes_max:
            due = self._marks.popleft()[1] if self._marks else dict(self._latest)
        return due

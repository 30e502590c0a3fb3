"""One client that listens: what waits for it, bounded in bytes. Left out: what it is told (`hub`)."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from api.http.operations import Caller
from api.live.events import Mark, event

if TYPE_CHECKING:
    from api.live.hub import Pass
    from api.live.watches import Watch


class Queues:
    """What waits for all listeners of a process."""

    def __init__(self, each_max: int, all_max: int) -> None:
        self.each_max = each_max
        self.all_max = all_max
        self.bytes = 0


class Listener:
    """`put` never waits. An event larger than the bound goes through where nothing else waits."""

    def __init__(
        self, watch: "Watch", caller: Caller, mark: Mark | None, queues: Queues, is_gone: Callable[[], bool]
    ) -> None:
        self.watch = watch
        self.caller = caller
        self.is_gone = is_gone
        """Whether its connection is closed: what does not write would not notice."""
        self.mark = mark
        """Up to where it had been told when it came; None for one that begins."""
        self.reads: Pass | None = None
        """Which pass over the log it is told by, once it is."""
        self.ended = ""
        """Why it is told nothing more."""
        self.beat_at = 0.0
        self.stalled_since: float | None = None
        self._queues = queues
        self._waiting: deque[bytes] = deque()
        self._bytes = 0
        self._news = asyncio.Event()

    @property
    def waiting_bytes(self) -> int:
        return self._bytes

    def put(self, chunk: bytes) -> bool:
        """False, with nothing done, for one that reads too slowly."""
        queues = self._queues
        if self._waiting and self._bytes + len(chunk) > queues.each_max:
            return False
        if queues.bytes + len(chunk) > queues.all_max and self._bytes:
            return False
        self._waiting.append(chunk)
        self._count(len(chunk))
        self._news.set()
        return True

    def end(self, reason: str) -> None:
        """The last thing it is told; what it had not read yet, it is told when it comes back."""
        if not self.ended:
            self.ended = reason
            self._drop()
            self._waiting.append(event("end", {"reason": reason}))
            self._count(len(self._waiting[0]))
            self._news.set()

    def close(self) -> None:
        """Nobody listens any more."""
        self.ended = self.ended or "gone"
        self._drop()
        self._news.set()

    async def take(self) -> bytes:
        """What waits, as soon as something does; empty at the end."""
        while not self._waiting:
            if self.ended:
                return b""
            self._news.clear()
            await self._news.wait()
        chunks = b"".join(self._waiting)
        self._drop()
        self.stalled_since = None
        return chunks

    def _drop(self) -> None:
        self._waiting.clear()
        self._count(-self._bytes)

    def _count(self, size: int) -> None:
        self._bytes += size
        self._queues.bytes += size

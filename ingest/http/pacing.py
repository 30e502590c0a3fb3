"""Requests that would rather wait than be refused for a limit: `Prefer: respond-async` (RFC 7240).

Left out: the lane that they wait in (`ingest.paced`).
"""

from collections.abc import Mapping
from typing import Final, NamedTuple

from aiohttp import web

from ingest.http.answers import Refusal
from ingest.http.preferences import RESPOND_ASYNC, prefers
from ingest.limits import Cost, LimitExceededError, Limits, Sender
from ingest.paced.lane import NOTHING, PacedLane
from ingest.paced.owners import subject_of
from schemas.errors import RequestCode

APPLIED: Final = b"Preference-Applied: respond-async\r\n"
_REQUEST: Final = Cost(1, 0, 0)
_MINUTE_US: Final = 60_000_000
#: Beyond their limit of requests, that one sender's may come to nothing in a minute: only what is kept is counted.
_VAIN_MAX: Final = 100


class Paced(NamedTuple):
    """A request that goes through the lane."""

    lane: PacedLane
    sender: Sender
    cost: Cost
    """What of it is not counted yet."""
    arrived_us: int
    exceeded: LimitExceededError | None
    """The limit that it goes beyond; None where it only follows what waits already."""

    def with_body(self, readings: int, size: int) -> "Paced":
        return self._replace(cost=Cost(self.cost.requests, readings, size))

    @property
    def refusal(self) -> str | None:
        """Why the lane has no room for it; None when it has."""
        return self.lane.refusal(self.sender, self.cost.bytes, self.cost)

    def refused(self, reason: str) -> Exception:
        """What the client is told when the lane does not take it after all."""
        if self.exceeded is not None:
            return self.exceeded.because(reason)
        message = f"{reason}: what this was to follow has to go first"
        return Refusal(RequestCode.RATE_LIMITED, message, headers=b"Retry-After: 60\r\n")


class Pacer:
    """Counts requests, and tells which of them are paced: none without a lane."""

    def __init__(self, limits: Limits, lane: PacedLane | None) -> None:
        self._limits = limits
        self._lane = lane
        #: Looked at for every request: empty nearly always.
        self._backlogs: Mapping[bytes, object] = {} if lane is None else lane.owners
        self._vain: dict[bytes, int] = {}
        self._minute = 0

    def request(self, request: web.BaseRequest, sender: Sender, now_us: int) -> Paced | None:
        """Count a request, unless it is paced: then `kept` is called once it is. Raises `LimitExceededError`."""
        if self._backlogs and (paced := self._behind(request, sender, now_us)) is not None:
            return paced
        try:
            self._limits.request(sender, now_us)
        except LimitExceededError as error:
            lane = self._lane
            if lane is None or not prefers(request, RESPOND_ASYNC):
                raise
            if (reason := self._refusal(lane, sender, now_us)) is not None:
                raise error.because(reason) from None
            return self._begun(Paced(lane, sender, _REQUEST, now_us, error))
        return None

    def _behind(self, request: web.BaseRequest, sender: Sender, now_us: int) -> Paced | None:
        """How it follows what waits already; None where it does not."""
        lane = self._lane
        if lane is None or not lane.has(sender) or not prefers(request, RESPOND_ASYNC):
            return None
        if self._refusal(lane, sender, now_us):
            return None
        return self._begun(Paced(lane, sender, _REQUEST, now_us, None))

    def volume(
        self, request: web.BaseRequest, sender: Sender, readings: int, size: int, paced: Paced | None
    ) -> Paced | None:
        """Count its readings and bytes, unless it is paced. Raises what is to be answered instead."""
        if paced is None:
            try:
                self._limits.volume(sender, readings, size)
            except LimitExceededError as error:
                if self._lane is None or not prefers(request, RESPOND_ASYNC):
                    raise
                paced = Paced(self._lane, sender, NOTHING, 0, error)
            else:
                return None
        paced = paced.with_body(readings, size)
        reason = paced.refusal
        if reason is not None and paced.exceeded is None:
            self._go_live(paced, reason)
            return None
        if reason is not None:
            raise paced.refused(reason)
        return paced

    def _go_live(self, paced: Paced, reason: str) -> None:
        """There is no room behind what waits already: it is as good as any live request."""
        try:
            self._limits.request(paced.sender, paced.arrived_us)
            self._limits.volume(paced.sender, paced.cost.readings, paced.cost.bytes)
        except LimitExceededError as error:
            raise error.because(reason) from None
        self.kept(paced)

    def kept(self, paced: Paced) -> None:
        """It was no vain request."""
        subject = subject_of(paced.sender)
        if paced.cost.requests and subject in self._vain:
            self._vain[subject] -= 1

    def _begun(self, paced: Paced) -> Paced:
        subject = subject_of(paced.sender)
        self._vain[subject] = self._vain.get(subject, 0) + 1
        return paced

    def _refusal(self, lane: PacedLane, sender: Sender, now_us: int) -> str | None:
        """Why its request is not even read."""
        minute = now_us // _MINUTE_US
        if minute != self._minute:
            self._minute = minute
            self._vain.clear()
        if self._vain.get(subject_of(sender), 0) >= _VAIN_MAX:
            return "too many requests that asked for it could not be used this minute"
        return lane.refusal(sender, 0, _REQUEST)

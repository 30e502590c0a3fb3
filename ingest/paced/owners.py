"""Whose limits a paced backlog waits for, and how they are kept up to date while its owner sends nothing.

Left out: the limits themselves (`ingest.limits`).
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final
from uuid import UUID

from ingest.limits import Overrides, Sender
from ingest.registry import Connections, ask

if TYPE_CHECKING:
    from ingest.paced.files import Backlog

_TIMEOUT_S: Final = 3.0

_LIMITS: Final = """
SELECT s.subject, CASE WHEN coalesce(own.subject_id, whole.subject_id) IS NOT NULL THEN
           ARRAY[own.requests_per_minute, own.readings_per_minute, own.bytes_per_day,
                 whole.requests_per_minute, whole.readings_per_minute, whole.bytes_per_day] END AS limits
FROM unnest($1::uuid[], $2::uuid[]) AS s (subject, organisation)
LEFT JOIN limit_overrides own ON own.subject_id = s.subject
LEFT JOIN limit_overrides whole ON whole.subject_id = s.organisation
"""


class Owner:
    """A device, or a site with its gateways, that has a backlog; a sender to `Limits`."""

    __slots__ = ("backlogs", "device", "is_known", "kind", "limits", "organisation", "site", "subject")

    def __init__(self, kind: str, organisation: bytes, subject: bytes) -> None:
        self.kind = kind
        self.organisation = organisation
        self.subject = subject
        self.device = subject if kind == "device" else None
        self.site = None if kind == "device" else subject
        self.limits: Overrides | None = None
        self.is_known = False
        """Whether `limits` has ever been read: until then nothing may be charged."""
        self.backlogs: set[Backlog] = set()

    @property
    def size(self) -> int:
        return sum(backlog.size for backlog in self.backlogs)

    @property
    def oldest_us(self) -> int:
        """Receive time of its oldest record, µs since 2000-01-01; 0 where none is known."""
        return min((one.oldest_us for one in self.backlogs if one.oldest_us), default=0)

    def learn(self, limits: Overrides | None) -> None:
        self.limits = limits
        self.is_known = True


def subject_of(sender: Sender) -> bytes:
    """Whom a sender's own limits are counted for."""
    return sender.device or sender.site or sender.organisation


async def refresh(pool: Connections, owners: Iterable[Owner]) -> None:
    """Read their overrides. Raises `UnavailableError`, with what was known before standing."""
    asked = list(owners)
    subjects = [UUID(bytes=owner.subject) for owner in asked]
    organisations = [UUID(bytes=owner.organisation) for owner in asked]
    rows = await ask(pool, _LIMITS, subjects, organisations, timeout_s=_TIMEOUT_S)
    found = {row["subject"].bytes: row["limits"] for row in rows}
    for owner in asked:
        limits = found[owner.subject]
        owner.learn(None if limits is None else tuple(limits))

"""Says of a spool that nothing more of it will come, so that how far it landed need not be remembered for ever.

Said before its file is deleted: what is deleted unsaid would be remembered for ever, what is said too early forgotten
while copies can still come. Left out: forgetting (`workers.quarantine`).
"""

import logging
from collections.abc import Awaitable, Callable
from uuid import UUID

from ingest.registry import Connections, ask
from runtime.errors import UnavailableError

_log = logging.getLogger("sluice.spool")

#: Whether it has been said that this spool has ended; if not, its file stays for the time being.
End = Callable[[UUID], Awaitable[bool]]

_END = "INSERT INTO spool_ends (spool) VALUES ($1) ON CONFLICT DO NOTHING"
_TIMEOUT_S = 3.0


def ends_in(pool: Connections) -> End:
    """Say it in the database; while that is away it is not said."""

    async def end(spool: UUID) -> bool:
        try:
            await ask(pool, _END, spool, timeout_s=_TIMEOUT_S)
        except UnavailableError as error:
            _log.debug("a drained spool is kept for now", extra={"spool": str(spool), "reason": str(error)})
            return False
        return True

    return end


async def unsaid(_: UUID) -> bool:
    """For a spool without a database: how far it landed is remembered."""
    return True

"""Whether a process may be sent work: parts register named checks, `/health/ready` names those that fail.

Left out: how it is asked (`runtime.metrics`).
"""

import logging
from collections.abc import Callable

_log = logging.getLogger("sluice.health")

#: Says why a part is not ready, or None. Never blocks: it looks at what its part knows already.
Check = Callable[[], str | None]


class Health:
    """The checks of one process. It is ready when none of them gives a reason, and not on its way out."""

    def __init__(self) -> None:
        self._checks: dict[str, Check] = {}
        self._notes: dict[str, Check] = {}
        self._stopping = False

    def register(self, name: str, check: Check) -> Callable[[], None]:
        """Ask `check` from now on, until what is returned is called."""
        if name in self._checks:
            raise ValueError(f"two health checks are named {name}")
        self._checks[name] = check
        return lambda: self._checks.pop(name, None) and None

    def note(self, name: str, look: Check) -> None:
        """Show what `look` says beside the checks: it makes nothing unready."""
        self._notes[name] = look

    def notes(self) -> dict[str, str]:
        """What an operator should know of a process, ready or not."""
        found = {name: look() for name, look in self._notes.items()}
        return {name: text for name, text in found.items() if text is not None}

    def stopping(self) -> None:
        """From now on the process is not ready, whatever the checks say."""
        self._stopping = True

    def not_ready(self) -> dict[str, str]:
        """What is not ready, and why; empty when everything is."""
        reasons = {"process": "it is shutting down"} if self._stopping else {}
        for name, check in self._checks.items():
            try:
                reason = check()
            except Exception as error:
                _log.exception("a health check failed", extra={"check": name})
                reason = f"the check itself failed: {error}"
            if reason is not None:
                reasons[name] = reason
        return reasons

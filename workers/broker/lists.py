"""Brings lists of revoked certificates to a broker on this machine. Left out: making them (`api.certificates`)."""

import os
import signal
from collections.abc import Awaitable, Callable
from datetime import datetime
from pathlib import Path
from typing import Final, NamedTuple

from runtime.errors import ConfigurationError, UnavailableError
from runtime.files import write_file

_PROGRAM: Final = "mosquitto"


class Lists(NamedTuple):
    """Of all authorities, in one file."""

    pem: str
    next_update: datetime
    """The first of their ends."""


#: Lists that tell of all that was revoked before. Raises `UnavailableError`, `ConfigurationError`.
Current = Callable[[], Awaitable[Lists]]


class ListFile:
    """The broker's `crlfile`, and the process that reads it."""

    def __init__(self, file: Path, pid_file: Path, current: Current) -> None:
        self._file = file
        self._pid_file = pid_file
        self._current = current
        self._is_read = False

    async def bring(self) -> tuple[bool, datetime]:
        """Whether the broker was told to read it again, and when the list ends. Raises as `Current`."""
        lists = await self._current()
        if self._content() != lists.pem:
            write_file(self._file, lists.pem)
            self._is_read = False
        # Told once after a start as well: what was written before may not have been read.
        if told := not self._is_read:
            self._signal()
            self._is_read = True
        return told, lists.next_update

    def forget(self) -> None:
        """The broker may not have read it: it is told again."""
        self._is_read = False

    def _content(self) -> str | None:
        try:
            return self._file.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigurationError(f"{self._file} cannot be read: {error.strerror or error}") from error

    def _signal(self) -> None:
        try:
            pid = int(self._pid_file.read_text(encoding="ascii"))
            # A number that was left behind may be another program's by now.
            if Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip() != _PROGRAM:
                raise UnavailableError(f"{self._pid_file} does not name a running broker")
            os.kill(pid, signal.SIGHUP)
        except (OSError, ValueError) as error:
            raise UnavailableError(f"the broker of {self._pid_file} cannot be told: {error}") from error

"""What the commands ask of each part."""

import signal
from typing import Protocol

from .state import State


class Part(Protocol):
    """One server; all methods may be repeated, and raise ServicesError with a remedy."""

    name: str
    # Names under which the state directory keeps its ports; the first is the clients' own.
    ports: tuple[str, ...]
    # What asks the server for a clean and quick end.
    stop_signal: signal.Signals

    def prepare(self, state: State) -> None:
        """Install what is missing, and lay out data and configuration; the part is not running."""

    def command(self, state: State) -> list[str]:
        """What runs in the foreground as the part; its pid is the part's pid."""

    def answers(self, state: State) -> bool:
        """Whether the server does its work right now."""

    def complete(self, state: State) -> None:
        """Make what clients expect to find inside a server that answers."""

    def release(self, state: State) -> None:
        """Give back what `prepare` took outside the state directory; the part is stopped."""

    def exports(self, state: State) -> dict[str, str]:
        """The SLUICE_ variables that lead a client here."""

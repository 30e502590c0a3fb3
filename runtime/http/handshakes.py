"""TLS before a connection is one: who is let in, and for how long a handshake may take.

The loop's own TLS servers know nothing of a connection until its handshake is over; here it has its place from the
first moment, so that handshakes that never end are bounded like everything else. Left out: requests
(`runtime.http.server`).
"""

import asyncio
import logging
import socket
from typing import Final, Protocol

from runtime.http.refusals import Refused
from runtime.tls import ServerTls

_log = logging.getLogger("sluice.http")

#: How long a peer has to answer the end of a connection with its own.
_SHUTDOWN_S: Final = 2.0
_ACCEPT_AGAIN_S: Final = 0.5
#: Of one turn of the loop, so that a flood leaves the others theirs.
_ACCEPTED_A_TURN_MAX: Final = 64


class Host(Protocol):
    """Whoever the connections belong to."""

    def admit(self, peer: object, *, coming: int) -> str | None:
        """The place of one more connection beside those `coming`; None when there is none left."""

    def welcome(self, place: str) -> asyncio.Protocol:
        """The protocol of a connection that has its place."""

    @property
    def refused(self) -> Refused:
        """Told of each that is turned away."""

    def dismiss(self, protocol: asyncio.Protocol) -> None:
        """Take the place back of one that never became a connection; without effect for one that did and ended."""


class Handshakes:
    """Accepts connections on `listener` between `start` and `close`, and makes them TLS ones."""

    def __init__(self, listener: socket.socket, host: Host, tls: ServerTls) -> None:
        self._listener = listener
        self._host = host
        self._tls = tls
        self._under_way: set[asyncio.Task[None]] = set()
        self._again: asyncio.TimerHandle | None = None

    def start(self) -> None:
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def close(self) -> None:
        """Accept nothing more; the handshakes under way go on. May be repeated."""
        if self._listener.fileno() < 0:
            return
        if self._again is not None:
            self._again.cancel()
        asyncio.get_running_loop().remove_reader(self._listener)
        self._listener.close()

    def give_up(self) -> None:
        for task in self._under_way:
            task.cancel()

    @property
    def under_way(self) -> int:
        return len(self._under_way)

    def _accept(self) -> None:
        for _ in range(_ACCEPTED_A_TURN_MAX):
            try:
                accepted, peer = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                self._pause(error)
                return
            self._begin(accepted, peer)

    def _pause(self, error: OSError) -> None:
        """Out of descriptors or memory: asking at once again would be all that this process does."""
        _log.error("no connection can be accepted", extra={"reason": str(error)})
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._listener)
        self._again = loop.call_later(_ACCEPT_AGAIN_S, self.start)

    def _begin(self, accepted: socket.socket, peer: object) -> None:
        place = self._host.admit(peer, coming=len(self._under_way))
        if place is None:
            accepted.close()
            return
        task = asyncio.create_task(self._shake_hands(accepted, place), name="TLS handshake")
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    async def _shake_hands(self, accepted: socket.socket, place: str) -> None:
        accepted.setblocking(False)
        protocol = self._host.welcome(place)
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: protocol,
                accepted,
                ssl=self._tls.context,
                ssl_handshake_timeout=self._tls.handshake_timeout_s,
                ssl_shutdown_timeout=_SHUTDOWN_S,
            )
        except OSError as error:
            # Whoever speaks no TLS, an old one, or gives up: nothing that an operator could mend.
            _log.debug("no TLS connection", extra={"reason": str(error)})
            self._host.refused("handshake")
            self._host.dismiss(protocol)
        except BaseException:
            self._host.dismiss(protocol)
            raise

"""PostgreSQL's NOTIFY, on a session of its own. Left out: what is told, and what to do while nobody can be heard."""

import asyncio
from collections.abc import Callable

from runtime.errors import UnavailableError
from runtime.postgres import UNAVAILABLE, PostgresSettings, connect


class Notifications:
    """Hears notifications as `role`."""

    def __init__(self, settings: PostgresSettings, *, role: str, application: str) -> None:
        self._settings = settings
        self._role = role
        self._application = application

    async def listen(self, channel: str, callback: Callable[..., None]) -> None:
        """Call back for every notification on `channel` until the session ends. Raises `UnavailableError`."""
        connection = await connect(self._settings, role=self._role, application=f"{self._application} listen")
        ended = asyncio.Event()
        try:
            connection.add_termination_listener(lambda _: ended.set())
            await connection.add_listener(channel, callback)
            await ended.wait()
        except UNAVAILABLE as error:
            raise UnavailableError(f"notifications cannot be heard: {error}") from error
        finally:
            connection.terminate()

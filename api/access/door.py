"""The parts that let callers in, put together. Left out: what each does, and what callers may ask for."""

from contextlib import AbstractAsyncContextManager
from typing import Any, Final
from uuid import UUID

import asyncpg
from aiohttp import web

from api.access.accounts import Accounts
from api.access.authority import Authority, Waits, acting_for
from api.access.background import Background
from api.access.guesses import Guesses
from api.access.mail import Mailer
from api.access.passwords import Passwords
from api.access.settings import AccessSettings
from api.access.signing import Signatures
from api.access.tokens import AccessTokens
from api.settings import ApiSettings
from runtime.clock import SystemClock
from runtime.secrets import KeyRing, TokenHasher

#: Mails and notes of use under way.
_BACKGROUND_MAX: Final = 200
#: Who is the issuer where no public URL is known.
_NAMELESS: Final = "sluice"


class Door:
    """Made without touching the loop; `close` ends what it began."""

    def __init__(
        self, pool: "asyncpg.Pool[asyncpg.Record]", ring: KeyRing, settings: ApiSettings, access: AccessSettings
    ) -> None:
        clock, hasher = SystemClock(), TokenHasher(ring)
        self._pool, self._waits = pool, (waits := Waits.of(settings))
        self.guesses = guesses = Guesses(
            clock, per_minute=access.auth_guesses_per_minute, addresses_max=access.auth_addresses_max
        )
        logins = Guesses(clock, per_minute=access.auth_logins_per_minute, addresses_max=access.auth_addresses_max)
        self._passwords = Passwords(at_once=access.auth_hashes_at_once, waiting_max=access.auth_hashes_waiting_max)
        self.background = Background(most=_BACKGROUND_MAX)
        self.mailer = Mailer(access.smtp_url, access.smtp_from, self.background)
        self.tokens = AccessTokens(
            pool, ring, clock, issuer=settings.public_url or _NAMELESS, lifetime_s=access.auth_access_token_s
        )
        self.authority = Authority(
            pool, hasher, self.tokens, guesses, Signatures(clock), self.background, waits=waits
        )
        self.accounts = Accounts(pool, hasher, self._passwords, self.tokens, guesses, logins, access, waits=waits)

    def acting_for(self, organisation: UUID) -> AbstractAsyncContextManager[Any]:
        """A short transaction that reads for whoever was let in, after its request's own has ended."""
        return acting_for(self._pool, self._waits, organisation)

    async def close(self, _: web.Application) -> None:
        await self.background.close()
        self._passwords.close()

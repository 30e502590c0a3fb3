"""Passwords, as argon2id hashes. Left out: where they are kept, and how often one may be guessed."""

import asyncio
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Annotated, Final

import msgspec
from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from api.http.problems import OVERLOADED, unavailable
from api.http.spelt import STORABLE

PASSWORD_CHARACTERS: Final = (10, 128)

NewPassword = Annotated[
    str,
    msgspec.Meta(min_length=PASSWORD_CHARACTERS[0], max_length=PASSWORD_CHARACTERS[1], extra_json_schema=STORABLE),
]
Password = Annotated[str, msgspec.Meta(max_length=PASSWORD_CHARACTERS[1], extra_json_schema=STORABLE)]

#: RFC 9106's second choice: 64 MiB, three passes.
_hasher: Final = PasswordHasher()


class Passwords:
    """Hashes beside the event loop, a bounded number at once."""

    def __init__(self, *, at_once: int, waiting_max: int) -> None:
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix="password")
        self._most = at_once + waiting_max
        self._asked = 0
        _nobodys_hash()

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def hash(self, password: str) -> str:
        """Raises the problem of too many at once."""
        return str(await self._run(hash_password, password))

    async def verify(self, stored: str | None, password: str) -> bool:
        """Whether it is the one of `stored`; without one it takes as long to say no. Raises as `hash` does."""
        matches = await self._run(_verify, stored or _nobodys_hash(), password)
        return bool(matches) and stored is not None

    async def _run(self, work: object, *arguments: str) -> object:
        if self._asked >= self._most:
            raise unavailable(OVERLOADED, "too many passwords are being checked: try again")
        self._asked += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)  # type: ignore[arg-type]
        finally:
            self._asked -= 1


def hash_password(password: str) -> str:
    """Takes a tenth of a second."""
    return _hasher.hash(_normal(password))


def _verify(stored: str, password: str) -> bool:
    try:
        return _hasher.verify(stored, _normal(password))
    except (VerificationError, InvalidHashError):
        return False


def _normal(password: str) -> bytes:
    """One spelling of what keyboards compose in several."""
    return unicodedata.normalize("NFKC", password).encode("utf-8", "surrogatepass")


@lru_cache(maxsize=1)
def _nobodys_hash() -> str:
    return _hasher.hash(b"of an account that is not there")

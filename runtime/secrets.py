"""The service's keys, and what is made with them: token hashes, tokens, sealed texts.

Every use has a key of its own, derived from the ring's, so that none of them tells anything about another.
Left out: where credentials are kept and who may use them.
"""

import binascii
import itertools
import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Final
from zlib import crc32

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from runtime.errors import ConfigurationError, MissingSettingError
from runtime.settings import setting

if TYPE_CHECKING:
    from _hashlib import HASH

VARIABLE: Final = "SLUICE_SECRET_KEYS"
KEY_BYTES: Final = 32
KEYS_MAX: Final = 16
KEY_ID_MAX: Final = 255

DEVICE_PREFIX: Final = "ds_live_"
GATEWAY_PREFIX: Final = "gw_live_"
API_KEY_PREFIX: Final = "sk_live_"
REFRESH_PREFIX: Final = "rt_live_"
INVITATION_PREFIX: Final = "iv_live_"
RESET_PREFIX: Final = "pr_live_"
REGISTRATION_PREFIX: Final = "dr_live_"

_SECRET: Final = re.compile(r"(?:ds|gw|sk|rt|iv|pr|dr)_live_[A-Za-z0-9_]+|eyJ[\w\-]+\.[\w\-]+\.[\w\-]+")
_SECRET_BYTES: Final = re.compile(_SECRET.pattern.encode())
#: What a JSON text writes a character of a token as, if it does not write the character itself.
_ESCAPE: Final = re.compile(r"\\(?:u00([2-7][0-9A-Fa-f])|.)", re.DOTALL)
#: Twice the longest that is made here.
JWT_CHARACTERS_MAX: Final = 2_048
_JWT: Final = re.compile(r"eyJ[\w-]+\.[\w-]+\.[\w-]+", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class SecretSettings:
    """The keys under which tokens are hashed and receipts and cursors sealed."""

    secret_keys: str = setting(
        "",
        secret=True,
        why="id:base64url[,id:base64url], the first writes, all read; `sluice token keys` makes or rotates them, "
        "`sluice up` makes its own",
    )


# ---------------------------------------------------------------- the ring


@dataclass(frozen=True)
class Key:
    """One key of the ring. What was made with it names it by `id`, or is tried against every key."""

    id: int
    secret: bytes

    def derive(self, purpose: str) -> bytes:
        """The key for one use."""
        return HKDF(SHA256(), KEY_BYTES, salt=None, info=b"sluice " + purpose.encode()).derive(self.secret)


@dataclass(frozen=True)
class KeyRing:
    """The keys, newest first: the first makes what is new, all of them still read."""

    keys: tuple[Key, ...]

    @classmethod
    def parse(cls, text: str) -> "KeyRing":
        """Raises `ConfigurationError` that says what is wrong without showing a key."""
        if not text.strip():
            raise MissingSettingError(f"{VARIABLE} is not set: `sluice token keys` makes a value for it")
        keys = tuple(_parse_key(part) for part in text.split(","))
        if len({key.id for key in keys}) < len(keys):
            raise ConfigurationError(f"{VARIABLE}: two keys have the same id")
        if len(keys) > KEYS_MAX:
            raise ConfigurationError(f"{VARIABLE}: at most {KEYS_MAX} keys: drop the last ones")
        return cls(keys)

    def rotated(self) -> "KeyRing":
        """The ring with a new key in front of the others."""
        taken = {key.id for key in self.keys}
        # Counting on from the newest, so that a dropped key's id comes back as late as possible.
        start = self.keys[0].id if self.keys else 0
        candidates = ((start + step) % KEY_ID_MAX + 1 for step in range(KEY_ID_MAX))
        new = next(candidate for candidate in candidates if candidate not in taken)
        return KeyRing((Key(new, secrets.token_bytes(KEY_BYTES)), *self.keys))

    def __str__(self) -> str:
        """As `parse` reads it: a secret."""
        return ",".join(f"{key.id}:{base64url(key.secret)}" for key in self.keys)

    def __repr__(self) -> str:
        return f"KeyRing(ids={[key.id for key in self.keys]})"


def _parse_key(part: str) -> Key:
    identifier, separator, encoded = part.strip().partition(":")
    shape = f"{VARIABLE} is a list of id:key, each id a number from 0 to {KEY_ID_MAX}"
    if not separator or not identifier.isdecimal() or int(identifier) > KEY_ID_MAX:
        raise ConfigurationError(f"{shape}: `sluice token keys` makes one")
    try:
        secret = _from_text(encoded)
    except ValueError:
        raise ConfigurationError(f"{VARIABLE}: key {identifier} is not base64url") from None
    if len(secret) < KEY_BYTES:
        raise ConfigurationError(f"{VARIABLE}: key {identifier} has {len(secret)} bytes, {KEY_BYTES} are needed")
    return Key(int(identifier), secret)


def new_ring() -> KeyRing:
    return KeyRing(()).rotated()


def kept_keys(path: Path) -> str:
    """The ring kept in the file `path`, made there by whoever comes first.

    Raises `ConfigurationError` for a file that cannot be made or read.
    """
    try:
        if not path.exists():
            _keep(path, str(new_ring()))
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"the secret keys in {path} cannot be kept or read: {error}") from error


def _keep(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all, and never replaces one that is there."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            return
        directory = os.open(path.parent, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)
    finally:
        Path(temporary).unlink()


# ---------------------------------------------------------------- hashes of tokens


class TokenHasher:
    """HMAC-SHA-256 of tokens: what the database keeps, so that a copy of it lets nobody in."""

    def __init__(self, ring: KeyRing) -> None:
        self.ring = ring
        self._states = [_hmac_states(key.derive("tokens")) for key in ring.keys]

    def digest(self, token: str) -> bytes:
        """Under the newest key: what is stored of a new token."""
        return _hmac(self._states[0], token.encode("utf-8", "surrogatepass"))

    def digests(self, token: str) -> list[bytes]:
        """Under every key, newest first: what a token may be stored as."""
        body = token.encode("utf-8", "surrogatepass")
        return [_hmac(states, body) for states in self._states]


_BLOCK: Final = 64


# HMAC (RFC 2104) by copies of its two prepared states takes 0.6 µs a token, `hmac.digest` 1.4.
def _hmac_states(key: bytes) -> "tuple[HASH, HASH]":
    padded = key.ljust(_BLOCK, b"\0")
    return sha256(bytes(byte ^ 0x36 for byte in padded)), sha256(bytes(byte ^ 0x5C for byte in padded))


def _hmac(states: "tuple[HASH, HASH]", body: bytes) -> bytes:
    inner, outer = states[0].copy(), states[1].copy()
    inner.update(body)
    outer.update(inner.digest())
    return outer.digest()


# ---------------------------------------------------------------- tokens

_ALPHABET: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_BASE: Final = len(_ALPHABET)
_PAIRS: Final = [a + b for a in _ALPHABET for b in _ALPHABET]
_SQUARE: Final = _BASE * _BASE
RANDOM_CHARACTERS: Final = 30
CHECKSUM_CHARACTERS: Final = 6


def make_token(prefix: str) -> str:
    """A new token: the prefix, 178 random bits, and a checksum that tells a mistyped one without a look-up."""
    body = prefix + "".join(secrets.choice(_ALPHABET) for _ in range(RANDOM_CHARACTERS))
    return body + _checksum(body)


def without_secrets(text: str) -> str:
    """`text` with every token and JWT in it blotted out."""
    if "_live_" not in text and "eyJ" not in text:  # a tenth of the price, and nearly always true
        return text
    return _SECRET.sub("***", text)


def without_secrets_in_json(text: str) -> str:
    """A JSON `text` with every token and JWT in it blotted out, also those that are spelt with escapes."""
    plain = _ESCAPE.sub(_unescaped, text) if "\\u00" in text else text
    blotted = without_secrets(plain)
    return text if blotted == plain else blotted


def _unescaped(escape: re.Match[str]) -> str:
    character = chr(int(escape[1], 16)) if escape[1] else ""
    return character if character.isalnum() or character in ("_", "-", ".") else escape[0]


def without_secrets_in_bytes(raw: bytes) -> bytes:
    """`raw`, which may be anything, with every token and JWT in it blotted out."""
    return _SECRET_BYTES.sub(b"***", raw)


def plausible_token(token: str, prefix: str) -> bool:
    """Whether `make_token(prefix)` can have made it: says nothing about its being known."""
    return (
        len(token) == len(prefix) + RANDOM_CHARACTERS + CHECKSUM_CHARACTERS
        and token.startswith(prefix)
        and token.isascii()
        and _checksum(token[:-CHECKSUM_CHARACTERS]) == token[-CHECKSUM_CHARACTERS:]
    )


def plausible_jwt(token: str) -> bool:
    """Whether it looks like a JWT, of a length that ours have: says nothing about whose it is."""
    return len(token) <= JWT_CHARACTERS_MAX and _JWT.fullmatch(token) is not None


def _checksum(body: str) -> str:
    rest, low = divmod(crc32(body.encode("ascii")), _SQUARE)
    high, middle = divmod(rest, _SQUARE)
    return _PAIRS[high] + _PAIRS[middle] + _PAIRS[low]


# ---------------------------------------------------------------- sealed texts


class BadSealError(ValueError):
    """The text was not sealed by this service for this purpose, or with a key that is no longer kept."""


_NONCE_BYTES: Final = 12
_COUNTER_BITS: Final = 32


class Seal:
    """Turns bytes into an opaque text and back (AES-256-GCM): nobody else can read it or make one.

    One per purpose, used by one thread of one process: not by both sides of a fork.
    """

    def __init__(self, ring: KeyRing, purpose: str) -> None:
        self._ciphers = {key.id: AESGCM(key.derive("seal " + purpose)) for key in ring.keys}
        newest = ring.keys[0].id
        self._head = bytes([newest])
        self._cipher = self._ciphers[newest]
        self._nonces = _nonces()

    def seal(self, plain: bytes) -> str:
        nonce = next(self._nonces)
        return base64url(self._head + nonce + self._cipher.encrypt(nonce, plain, None))

    def open(self, text: str) -> bytes:
        """Raises `BadSealError`."""
        try:
            sealed = _from_text(text)
            cipher = self._ciphers[sealed[0]]
            return cipher.decrypt(sealed[1 : 1 + _NONCE_BYTES], sealed[1 + _NONCE_BYTES :], None)
        except (ValueError, IndexError, KeyError, InvalidTag):
            raise BadSealError("not sealed by this service, or damaged") from None


def _nonces() -> Iterator[bytes]:
    # A random start and a counter repeat far later than random nonces would: receipts are made by the
    # thousand a second, and 2^32 random ones under one key are too many.
    while True:
        start = secrets.token_bytes(_NONCE_BYTES - _COUNTER_BITS // 8)
        for count in itertools.count():
            if count >> _COUNTER_BITS:
                break
            yield start + count.to_bytes(_COUNTER_BITS // 8, "big")


def base64url(raw: bytes) -> str:
    """RFC 4648, section 5, without padding."""
    # A third of what base64.urlsafe_b64encode takes, and a receipt has one.
    return binascii.b2a_base64(raw, newline=False).rstrip(b"=").translate(_TO_URL).decode("ascii")


def _from_text(text: str) -> bytes:
    """Raises `ValueError` for anything but base64url without padding."""
    if "+" in text or "/" in text or "=" in text:
        raise ValueError("not base64url")
    raw = text.encode("ascii").translate(_FROM_URL)
    try:
        return binascii.a2b_base64(raw + b"=" * (-len(raw) % 4), strict_mode=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from None


_FROM_URL: Final = bytes.maketrans(b"-_", b"+/")
_TO_URL: Final = bytes.maketrans(b"+/", b"-_")

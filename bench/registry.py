"""Devices with tokens for a run, made in bulk by the registry's own rules and hashing. Left out: one at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from runtime.ids import uuid7
from runtime.secrets import DEVICE_PREFIX, KeyRing, TokenHasher, make_token

#: Each credential and each place of a device counts the epoch of changes on by one, in one and the same row:
#: within a transaction that takes longer with every one.
DEVICES_A_TRANSACTION: Final = 250
SERIES_MAX: Final = 10_000_000

_ORGANISATION: Final = """
WITH made AS (
    INSERT INTO organisations (organisation_id, name, series_max) VALUES ($1, $2, $3) RETURNING organisation_id)
SELECT append_audit('organisation.created', organisation_id::text, '{}') FROM made"""
#: A run sends as fast as it can: limits are counted as always, which has its cost, and never reached.
_LIMITS: Final = """
INSERT INTO limit_overrides (organisation_id, device_id, requests_per_minute, readings_per_minute, bytes_per_day)
SELECT $1, device, 1000000000, 1000000000, 1000000000000 FROM unnest($2::uuid[]) AS d (device)"""
_SITE: Final = "INSERT INTO sites (site_id, organisation_id, name) VALUES ($1, $2, 'Bench site')"
_DEVICES: Final = """
INSERT INTO devices (device_id, organisation_id, name, local_id)
SELECT device, $1, 'Device ' || number, 'bench-' || number FROM unnest($2::uuid[], $3::int[]) AS d (device, number)"""
_PLACES: Final = """
INSERT INTO device_sites (device_id, organisation_id, site_id, valid_from)
SELECT device, $1, $3, '-infinity' FROM unnest($2::uuid[]) AS d (device)"""
_CREDENTIALS: Final = """
INSERT INTO credentials (credential_id, organisation_id, kind, device_id, token_hash, name)
SELECT credential, $1, 'device', device, hash, 'bench'
FROM unnest($2::uuid[], $3::uuid[], $4::bytea[]) AS c (credential, device, hash)"""


@dataclass(frozen=True)
class Registered:
    """An organisation of the run's own, and its devices with their tokens, in the same order."""

    organisation: UUID
    devices: Sequence[UUID]
    tokens: Sequence[str]


async def register(connection: Any, secret_keys: str, count: int, *, overrides: bool = True) -> Registered:
    """Make an organisation with `count` devices. `connection` is a session of the login itself, without a role.

    Without `overrides` each device has the limits that devices have unless somebody says otherwise.
    """
    hasher = TokenHasher(KeyRing.parse(secret_keys))
    organisation, site = uuid7(), uuid7()
    async with connection.transaction():
        await _act_for(connection, organisation)
        await connection.execute(_ORGANISATION, organisation, f"Bench {organisation}", SERIES_MAX)
        await connection.execute(_LIMITS, organisation, [None])
        await connection.execute(_SITE, site, organisation)
    devices = [uuid7() for _ in range(count)]
    tokens = [make_token(DEVICE_PREFIX) for _ in range(count)]
    for first in range(0, count, DEVICES_A_TRANSACTION):
        some = devices[first : first + DEVICES_A_TRANSACTION]
        hashes = [hasher.digest(token) for token in tokens[first : first + DEVICES_A_TRANSACTION]]
        async with connection.transaction():
            await _act_for(connection, organisation)
            await connection.execute(_DEVICES, organisation, some, list(range(first, first + len(some))))
            await connection.execute(_LIMITS, organisation, some if overrides else [])
            await connection.execute(_PLACES, organisation, some, site)
            await connection.execute(_CREDENTIALS, organisation, [uuid7() for _ in some], some, hashes)
    return Registered(organisation, devices, tokens)


async def add_tokens(connection: Any, secret_keys: str, organisation: UUID, devices: Sequence[UUID]) -> list[str]:
    """A further token for each of these devices of an organisation."""
    hasher = TokenHasher(KeyRing.parse(secret_keys))
    tokens = [make_token(DEVICE_PREFIX) for _ in devices]
    async with connection.transaction():
        await _act_for(connection, organisation)
        hashes = [hasher.digest(token) for token in tokens]
        await connection.execute(_CREDENTIALS, organisation, [uuid7() for _ in devices], devices, hashes)
    return tokens


async def _act_for(connection: Any, organisation: UUID) -> None:
    await connection.execute("SET LOCAL ROLE sluice_app")
    await connection.execute("SELECT set_config('sluice.organisation', $1, true)", str(organisation))

"""`sluice verify --audit`: whether the log of changes is what was written, entry after entry.

Every organisation's chain is read from its first entry: each names the hash of the one before it, and its own hash is
that of its content. The head that is kept beside tells of entries that were cut off at the end, and the registry of
organisations and people that no entry tells of. Left out: the readings (`workers.verify`), and what whoever may write
every table can make fit: a chain made anew as a whole, or cut off at its end with the head set back. Only a number of
entries and a last hash that were noted elsewhere tell of those.
"""

from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any, Final
from uuid import UUID

import click
import orjson

from deploy.database import check_up_to_date
from deploy.settings import DeploySettings
from runtime.postgres import PostgresSettings, check_role, connect
from runtime.settings import Settings

#: Sees every organisation's.
ROLE: Final = "sluice_worker"
NOBODYS: Final = UUID(int=0)
_START: Final = sha256(b"").digest()
_ROWS_AT_ONCE: Final = 1_000

# Those that must be there, too.
_HEADS: Final = """
SELECT c.chain, h.sequence, h.hash
FROM (SELECT chain FROM audit_heads UNION SELECT chain FROM audit_log UNION SELECT organisation_id FROM organisations
      UNION SELECT $2 WHERE EXISTS (SELECT FROM users)) c (chain)
LEFT JOIN audit_heads h USING (chain)
WHERE $1::uuid IS NULL OR c.chain = $1 ORDER BY 1
"""
_ENTRIES: Final = """
SELECT sequence, previous_hash, hash, audit_canonical(l) AS canonical FROM audit_log l
WHERE chain = $1 ORDER BY sequence
"""
# What cannot have come to be without an entry in the chain. An organisation that is older than this rule was found.
_UNTOLD_ORGANISATION: Final = """
SELECT organisation_id::text FROM organisations o WHERE organisation_id = $1 AND NOT EXISTS (
    SELECT FROM audit_log l WHERE l.chain = $1 AND l.action IN ('organisation.created', 'organisation.found'))
"""
# An account is made with a session of its own, or by an operator.
_UNTOLD_PERSON: Final = """
SELECT user_id::text FROM users EXCEPT SELECT user_id::text FROM audit_log WHERE chain = $1
EXCEPT SELECT subject FROM audit_log WHERE chain = $1 AND action = 'admin.created' LIMIT 1
"""


@dataclass(frozen=True)
class Chain:
    """One organisation's: how long it is, where it ends, and where it is broken first."""

    organisation_id: str | None
    entries: int
    hash: str
    broken_at: int | None
    message: str = ""


async def verify_audit(settings: Settings, organisation: UUID | None) -> bool:
    """Whether all chains are whole. Raises `ConfigurationError`, `UnavailableError`."""
    await check_up_to_date(settings)
    connection: Any = await connect(settings.get(PostgresSettings), role=ROLE, application="sluice verify audit")
    try:
        await check_role(connection)
        chains = await check_chains(connection, organisation)
    finally:
        await connection.close()
    is_whole = all(chain.broken_at is None for chain in chains)
    if settings.get(DeploySettings).json:
        click.echo(orjson.dumps({"chains": [asdict(chain) for chain in chains], "ok": is_whole}).decode())
    else:
        for chain in chains:
            click.echo(_sentence(chain))
        click.echo("no difference" if is_whole else "the log of changes was tampered with")
    return is_whole


async def check_chains(connection: Any, organisation: UUID | None = None) -> list[Chain]:
    """Every chain, or one, in a session of the worker's role."""
    # One snapshot: heads and entries of the same moment.
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        return [await _chain(connection, head) for head in await connection.fetch(_HEADS, organisation, NOBODYS)]


async def _chain(connection: Any, head: Any) -> Chain:
    name = None if head["chain"] == NOBODYS else str(head["chain"])
    expected, sequence = _START, 0
    last = head["sequence"]
    async for entry in connection.cursor(_ENTRIES, head["chain"], prefetch=_ROWS_AT_ONCE):
        trouble = _trouble(entry, sequence + 1, expected)
        if trouble:
            return Chain(name, sequence, expected.hex(), sequence + 1, trouble)
        expected, sequence = entry["hash"], entry["sequence"]
    if last is None and sequence:
        return Chain(name, sequence, expected.hex(), sequence, "the end of the chain is not kept any more")
    if last is not None and (sequence, expected) != (last, head["hash"]):
        return Chain(name, sequence, expected.hex(), sequence + 1, f"{last} entries were written")
    untold = await connection.fetchval(_UNTOLD_PERSON if name is None else _UNTOLD_ORGANISATION, head["chain"])
    if untold is not None:
        what = "person" if name is None else "organisation"
        return Chain(name, sequence, expected.hex(), 1, f"no entry tells of the {what} {untold}: some are gone")
    return Chain(name, sequence, expected.hex(), None)


def _trouble(entry: Any, sequence: int, expected: bytes) -> str:
    if entry["sequence"] != sequence:
        return f"entry {sequence} is missing"
    if entry["previous_hash"] != expected:
        return "it does not follow the entry before it"
    if sha256(expected + entry["canonical"].encode()).digest() != entry["hash"]:
        return "its content is not what was written"
    return ""


def _sentence(chain: Chain) -> str:
    whose = f"organisation {chain.organisation_id}" if chain.organisation_id else "of no organisation"
    if chain.broken_at is None:
        return f"{whose}: {chain.entries} entries, the last one's hash {chain.hash}"
    return f"BROKEN {whose}: entry {chain.broken_at}: {chain.message}"

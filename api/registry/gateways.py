"""The machines that act for a site: its one server and its edge devices, known by their hardware.

Each has a token that ingest takes as the site's gateway's and that its heartbeats are made with. Left out: how the
token is signed (`api.access.signing`).
"""

from collections.abc import Sequence
from typing import Any, Final, Protocol
from uuid import UUID

from api.http.problems import FORBIDDEN, Problem
from api.problems import (
    EDGE_ID_TAKEN,
    EDGE_LIMIT,
    EDGE_NOT_FOUND,
    SERVER_MISSING,
    SERVER_NOT_FOUND,
    SERVER_REGISTERED,
    SITE_NOT_FOUND,
)
from api.registry import audit, sites
from api.registry.credentials import Credentials
from runtime.ids import uuid7

_SERVER: Final = """
SELECT hardware_id, hostname, version, process_count, credential_id, registered_at, heard_at
FROM site_servers WHERE site_id = $1
"""
_PUT_SERVER: Final = """
INSERT INTO site_servers (site_id, organisation_id, hardware_id, hostname, version, credential_id)
VALUES ($1, $2, $3, $4, $5, $6)
ON CONFLICT (site_id) DO UPDATE SET hostname = EXCLUDED.hostname, version = EXCLUDED.version,
    credential_id = EXCLUDED.credential_id, registered_at = now()
"""
_REMOVE_SERVER: Final = "DELETE FROM site_servers WHERE site_id = $1 RETURNING credential_id"
_EDGES: Final = """
SELECT edge_id, hardware_id, version, process_count, registered_at, heard_at,
       CASE WHEN heard_at IS NULL THEN 'provisioning'
            WHEN heard_at > now() - make_interval(secs => $2) THEN 'online' ELSE 'offline' END AS status
FROM edge_devices WHERE site_id = $1 ORDER BY edge_id LIMIT $3
"""
_EDGE: Final = "SELECT hardware_id, credential_id FROM edge_devices WHERE site_id = $1 AND edge_id = $2"
_EDGES_COUNTED: Final = "SELECT count(*) FROM edge_devices WHERE site_id = $1"
_PUT_EDGE: Final = """
INSERT INTO edge_devices (edge_device_id, site_id, organisation_id, edge_id, hardware_id, version, credential_id)
VALUES ($1, $2, $3, $4, $5, $6, $7)
ON CONFLICT (site_id, edge_id) DO UPDATE SET version = EXCLUDED.version, credential_id = EXCLUDED.credential_id,
    registered_at = now()
"""
_REMOVE_EDGE: Final = "DELETE FROM edge_devices WHERE site_id = $1 AND edge_id = $2 RETURNING credential_id"
_HEARD_SERVER: Final = """
UPDATE site_servers SET version = $2, process_count = coalesce($3, process_count), heard_at = now()
WHERE credential_id = $1
"""
_HEARD_EDGE: Final = """
UPDATE edge_devices SET version = $2, process_count = coalesce($3, process_count), heard_at = now()
WHERE credential_id = $1
"""


class Signer(Protocol):
    """Makes JWTs."""

    async def sign(self, connection: Any, claims: dict[str, Any]) -> str: ...


class Gateways:
    """Registers the machines of an organisation's sites."""

    def __init__(self, connection: Any, organisation: UUID, credentials: Credentials, signer: Signer) -> None:
        self._connection = connection
        self._organisation = organisation
        self._credentials = credentials
        self._signer = signer

    async def register_server(self, site: UUID, hardware_id: str, hostname: str, version: str) -> str:
        """Its token. The same hardware gets a new one in place of the old, which ends with the transaction.

        Raises the problems of a site that is not there, and of one that has another server.
        """
        await sites.lock(self._connection, site)
        known = await self._connection.fetchrow(_SERVER, site)
        if known is not None and known["hardware_id"] != hardware_id:
            raise Problem(SERVER_REGISTERED, "another server is registered at the site: remove that one first")
        credential, token = await self._new_token(site, "server", hostname)
        await self._connection.execute(
            _PUT_SERVER, site, self._organisation, hardware_id, hostname, version, credential
        )
        await self._end(known)
        await audit.record(self._connection, "site.server_registered", site, hostname=hostname, version=version)
        return token

    async def register_edge(
        self, site: UUID, edge_id: str, hardware_id: str, version: str, edges_max: int
    ) -> tuple[str, str]:
        """Its token, and the host name of the site's server. The same hardware gets a new token, as a server does.

        Raises the problems of a site that is not there or has no server, of an id that another hardware has, and of
        more edge devices than a site may have.
        """
        await sites.lock(self._connection, site)
        server = await self._connection.fetchrow(_SERVER, site)
        if server is None:
            raise Problem(SERVER_MISSING, "register the site's server first: an edge device sends to it")
        known = await self._connection.fetchrow(_EDGE, site, edge_id)
        if known is not None and known["hardware_id"] != hardware_id:
            raise Problem(EDGE_ID_TAKEN, f"edgeId: another hardware is {edge_id} at this site: remove that one first")
        if known is None and await self._connection.fetchval(_EDGES_COUNTED, site) >= edges_max:
            raise Problem(EDGE_LIMIT, f"a site has up to {edges_max} edge devices: remove some first")
        credential, token = await self._new_token(site, "edge", edge_id)
        await self._connection.execute(
            _PUT_EDGE, uuid7(), site, self._organisation, edge_id, hardware_id, version, credential
        )
        await self._end(known)
        await audit.record(self._connection, "site.edge_registered", site, edge_id=edge_id, version=version)
        return token, server["hostname"]

    async def _new_token(self, site: UUID, kind: str, name: str) -> tuple[UUID, str]:
        credential = uuid7()
        claims = {
            "sub": str(site),
            "org": str(self._organisation),
            "kind": kind,
            "name": name,
            "jti": str(credential),
        }
        token = await self._signer.sign(self._connection, claims)
        await self._credentials.keep_gateway_token(self._organisation, site, credential, token, name=f"{kind} {name}")
        return credential, token

    async def _end(self, known: Any) -> None:
        if known is not None:
            await self._credentials.revoke(known["credential_id"])


async def server_of(connection: Any, site: UUID) -> Any:
    """The site's server, None without one."""
    return await connection.fetchrow(_SERVER, site)


async def edges_of(connection: Any, site: UUID, silence_s: int, limit: int) -> Sequence[Any]:
    """The site's edge devices by their ids."""
    rows: list[Any] = await connection.fetch(_EDGES, site, silence_s, limit)
    return rows


async def remove_server(connection: Any, credentials: Credentials, site: UUID) -> None:
    """Another may be registered then. Raises the problems of a site and of a server that is not there."""
    await sites.lock(connection, site)
    credential = await connection.fetchval(_REMOVE_SERVER, site)
    if credential is None:
        raise Problem(SERVER_NOT_FOUND)
    await credentials.revoke(credential)
    await audit.record(connection, "site.server_removed", site)


async def remove_edge(connection: Any, credentials: Credentials, site: UUID, edge_id: str) -> None:
    """Another may have its id then. Raises the problems of a site and of an edge device that is not there."""
    await sites.lock(connection, site)
    credential = await connection.fetchval(_REMOVE_EDGE, site, edge_id)
    if credential is None:
        raise Problem(EDGE_NOT_FOUND)
    await credentials.revoke(credential)
    await audit.record(connection, "site.edge_removed", site, edge_id=edge_id)


async def hear(connection: Any, credential: UUID | None, version: str, process_count: int | None) -> None:
    """A heartbeat. Raises the problem of a token that is neither a server's nor an edge device's."""
    for statement in (_HEARD_SERVER, _HEARD_EDGE):
        if await connection.execute(statement, credential, version, process_count) != "UPDATE 0":
            return
    raise Problem(FORBIDDEN, "the token is no server's and no edge device's: those are heard by their own")


def check_own(site: UUID, callers: UUID | None) -> None:
    """Raises the problem of a site that is not there for one that is not the caller's own."""
    if site != callers:
        raise Problem(SITE_NOT_FOUND)

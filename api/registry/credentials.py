"""Tokens and keys: made here, shown once; what is kept of them is a hash."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from api.registry.broker_passwords import Handovers
from runtime.ids import uuid7
from runtime.secrets import API_KEY_PREFIX, DEVICE_PREFIX, GATEWAY_PREFIX, TokenHasher, make_token


class Credentials:
    """Makes tokens; what is returned is shown once, the database keeps a hash."""

    def __init__(self, connection: Any, hasher: TokenHasher) -> None:
        self._connection = connection
        self._hasher = hasher

    async def add_device_token(
        self, organisation: UUID, device: UUID, *, name: str = "", expires_at: datetime | None = None
    ) -> str:
        """It is its password at the MQTT broker as well, in place of the token before."""
        token, handovers = make_token(DEVICE_PREFIX), Handovers(self._hasher.ring)
        await self._keep(
            uuid7(), token, "device", organisation, device=device, name=name, expires_at=expires_at,
            broker_password=await handovers.give(self._connection, organisation, device, token),
        )  # fmt: skip
        return token

    async def add_gateway_token(
        self, organisation: UUID, site: UUID, *, name: str = "", expires_at: datetime | None = None
    ) -> str:
        token = make_token(GATEWAY_PREFIX)
        await self._keep(uuid7(), token, "gateway", organisation, site=site, name=name, expires_at=expires_at)
        return token

    async def keep_gateway_token(
        self, organisation: UUID, site: UUID, credential: UUID, token: str, *, name: str
    ) -> None:
        """One that was made elsewhere and names its credential itself."""
        await self._keep(credential, token, "gateway", organisation, site=site, name=name)

    async def add_api_key(
        self,
        organisation: UUID,
        scopes: Sequence[str],
        *,
        name: str = "",
        expires_at: datetime | None = None,
        credential: UUID | None = None,
        created_by: UUID | None = None,
    ) -> str:
        token = make_token(API_KEY_PREFIX)
        await self._keep(
            credential or uuid7(), token, "api_key", organisation, scopes=scopes, name=name, expires_at=expires_at,
            created_by=created_by,
        )  # fmt: skip
        return token

    async def revoke(self, credential: UUID) -> None:
        await self._connection.execute(
            "UPDATE credentials SET revoked_at = now() WHERE credential_id = $1 AND revoked_at IS NULL", credential
        )

    async def revoke_named(self, name: str) -> None:
        """Revoke every credential of the organisation that has this name."""
        await self._connection.execute(
            "UPDATE credentials SET revoked_at = now() WHERE name = $1 AND revoked_at IS NULL", name
        )

    async def _keep(
        self,
        credential: UUID,
        token: str,
        kind: str,
        organisation: UUID,
        *,
        device: UUID | None = None,
        site: UUID | None = None,
        scopes: Sequence[str] = (),
        name: str,
        expires_at: datetime | None = None,
        created_by: UUID | None = None,
        broker_password: str | None = None,
    ) -> None:
        await self._connection.execute(
            "INSERT INTO credentials (credential_id, organisation_id, kind, device_id, site_id, token_hash, name,"
            " scopes, expires_at, created_by, broker_password) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)",
            credential,
            organisation,
            kind,
            device,
            site,
            self._hasher.digest(token),
            name,
            list(scopes),
            expires_at,
            created_by,
            broker_password,
        )

"""What the tests of people share: an API on a database, people in it, and requests from any address.

Left out: what is expected of them.
"""

import itertools
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final
from uuid import UUID

import asyncpg
from aiohttp import ClientSession
from argon2 import PasswordHasher
from prometheus_client import CollectorRegistry

from api.access.settings import AccessSettings
from api.devices.downlink import Downlink, NoDownlink
from api.http.edge import OPERATIONS
from api.http.operations import Operation
from api.metrics import ApiMetrics
from api.registry.credentials import Credentials
from api.registry.organisations import acting_for, add_organisation
from api.server import create_app
from api.serving import ApiFace
from api.settings import ApiSettings
from runtime.http.server import HttpServer, HttpSettings
from runtime.ids import uuid7
from runtime.postgres import connect, open_pool
from runtime.secrets import KeyRing, TokenHasher, new_ring
from runtime.sockets import address_of, listen
from tests.databases import Database

RING: Final = new_ring()
PASSWORD: Final = "correct horse battery"
API_URL: Final = "https://api.sluice.example"
HOME: Final = "203.0.113.7"
#: Cheap: what a hash costs is not what is tested.
_hasher: Final = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
_count: Final = itertools.count()
_NO_DOWNLINK: Final = NoDownlink()


@dataclass
class Answer:
    """What was answered."""

    status: int
    body: Any
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def code(self) -> tuple[int, str]:
        return self.status, self.body["code"]


@dataclass(frozen=True)
class Person:
    """Somebody with an account."""

    user: UUID
    email: str


@dataclass
class People:
    """An API on a database, one organisation in it with a key of an owner's, and requests."""

    database: Database
    url: str
    session: ClientSession
    organisation: UUID
    key: str
    operations: tuple[Operation, ...] = ()

    async def ask(
        self,
        method: str,
        path: str,
        token: str | None = None,
        body: Any = None,
        *,
        address: str = HOME,
        headers: Mapping[str, str] | None = None,
        **query: Any,
    ) -> Answer:
        sent = {"X-Forwarded-For": address} | dict(headers or {})
        if token is not None:
            sent["Authorization"] = f"Bearer {token}"
        parameters = {name.rstrip("_"): str(value) for name, value in query.items() if value is not None}
        url = path if path.startswith("http") else f"{self.url}{path}"
        async with self.session.request(method, url, json=body, headers=sent, params=parameters) as answer:
            raw = await answer.read()
            return Answer(answer.status, await answer.json(content_type=None) if raw else None, answer.headers)

    async def superuser(self, sql: str, *values: Any) -> list[Any]:
        connection = await asyncpg.connect(self.database.superuser_url)
        try:
            return list(await connection.fetch(sql, *values))
        finally:
            await connection.close()

    async def person(self, role: str | None = "viewer", organisation: UUID | None = None, **more: Any) -> Person:
        """Somebody new, and a member where there is a role."""
        number = next(_count)
        person = Person(uuid7(), f"person-{number}@example.org")
        await self.superuser(
            "INSERT INTO users (user_id, email, name, password_hash, super_admin) VALUES ($1, $2, $3, $4, $5)",
            person.user, person.email, f"Person {number}", _hasher.hash(PASSWORD), more.get("super_admin", False),
        )  # fmt: skip
        if role is not None:
            await self.join(person, role, organisation or self.organisation)
        return person

    async def join(self, person: Person, role: str, organisation: UUID) -> None:
        await self.superuser(
            "INSERT INTO memberships (organisation_id, user_id, role) VALUES ($1, $2, $3)",
            organisation, person.user, role,
        )  # fmt: skip

    async def login(self, person: Person, password: str = PASSWORD, *, address: str = HOME, **more: Any) -> Answer:
        body = {"email": person.email, "password": password} | more
        return await self.ask("POST", "/api/v1/auth/login", body=body, address=address)

    async def token(self, person: Person, **more: Any) -> str:
        answer = await self.login(person, **more)
        assert answer.status == 200, answer.body
        access: str = answer.body["access_token"]
        return access

    async def token_as(self, role: str, organisation: UUID | None = None) -> str:
        person = await self.person(role, organisation)
        return await self.token(person)

    async def tenant(self) -> tuple[UUID, str]:
        """Another organisation, and an API key of an owner's."""
        return await tenant(self.database)

    async def api_key(self, *scopes: str, **more: Any) -> str:
        return (await tenant(self.database, self.organisation, scopes, **more))[1]

    async def audited(self, organisation: UUID | None) -> list[tuple[str, UUID | None]]:
        rows = await self.superuser(
            "SELECT action, user_id FROM audit_log WHERE organisation_id IS NOT DISTINCT FROM $1 ORDER BY sequence",
            organisation,
        )
        return [(row["action"], row["user_id"]) for row in rows]


async def tenant(
    database: Database, organisation: UUID | None = None, scopes: tuple[str, ...] = ("owner",), **more: Any
) -> tuple[UUID, str]:
    connection = await connect(database.settings, role=None, application="test")
    wanted = organisation or uuid7()
    async with acting_for(connection, wanted):
        if organisation is None:
            await add_organisation(connection, wanted, "Test")
        key = await Credentials(connection, TokenHasher(RING)).add_api_key(wanted, scopes, **more)
    await connection.close()
    return wanted, key


@asynccontextmanager
async def people(
    database: Database,
    *,
    ring: KeyRing = RING,
    public_url: str = "https://sluice.example",
    api: Mapping[str, Any] = MappingProxyType({}),
    downlink: Downlink = _NO_DOWNLINK,
    **access: Any,
) -> AsyncIterator[People]:
    """`api` are settings of `ApiSettings`, `access` of `AccessSettings`.

    Requests come from a trusted proxy that names the address.
    """
    pool = await open_pool(database.settings, role="sluice_app", application="test", size_max=6)
    metrics = ApiMetrics(CollectorRegistry())
    app = create_app(
        pool=pool,
        ring=ring,
        settings=ApiSettings(public_url=public_url, api_url=API_URL, **api),
        metrics=metrics,
        access=AccessSettings(**access),
        trusted_proxies=("127.0.0.0/8",),
        downlink=downlink,
    )
    face = ApiFace(app, metrics)
    await face.start()
    listener = listen("TEST", "127.0.0.1:0")
    server = HttpServer(listener, face.handler, HttpSettings(), face.refuse, face.request_factory)
    await server.start()
    organisation, key = await tenant(database)
    async with ClientSession() as session:
        url = f"http://{address_of(listener)}"
        yield People(database, url, session, organisation, key, app[OPERATIONS])
    await server.stop(5)
    await face.stop()
    await pool.close()

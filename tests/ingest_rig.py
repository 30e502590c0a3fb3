"""What the tests of the way in share: a registry, the ingest face on a socket, and a client that speaks raw HTTP.

Left out: what is expected of an answer.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
from prometheus_client import CollectorRegistry

from api.registry.credentials import Credentials as TokenMaker
from api.registry.devices import add_device
from api.registry.organisations import acting_for, add_organisation
from api.registry.sites import add_site
from deploy.generation import ensure_generation, open_generation
from ingest.credentials import Listener
from ingest.http.compose import make_service
from ingest.http.service import IngestService
from ingest.limits import Limits, LimitSettings
from ingest.metrics import IngestMetrics
from ingest.paced.lane import PacedLane
from ingest.settings import IngestSettings, PacedSettings, SpoolSettings
from ingest.spool.ends import ends_in
from ingest.spool.spool import Spool
from runtime.clock import Clock, SystemClock
from runtime.http.cors import Origins
from runtime.http.server import HttpServer, HttpSettings
from runtime.ids import uuid7
from runtime.log import Log, LogSettings
from runtime.migrate import SESSION
from runtime.notifications import Notifications
from runtime.postgres import PostgresSettings, connect, open_pool
from runtime.secrets import KeyRing, TokenHasher, new_ring
from runtime.sockets import listen
from schemas import record as records
from schemas.record import PG_EPOCH_US, Record
from tests.databases import Database, Server

ROLE = "sluice_ingest"
DEADLINE_S = 120.0
PARTITIONS = 4
HTTP_FIELDS = frozenset(one.name for one in fields(HttpSettings))
SPOOL_FIELDS = frozenset(one.name for one in fields(SpoolSettings))
PACED_FIELDS = frozenset(one.name for one in fields(PacedSettings))
LIMIT_FIELDS = frozenset(one.name for one in fields(LimitSettings))
#: Tests send as fast as they can, and mean no limit unless they set one.
UNLIMITED = {name: 0 for name in LIMIT_FIELDS if not name.endswith("_max")}


# ---------------------------------------------------------------- the registry and the log


@dataclass(frozen=True)
class Tenant:
    """An organisation with a site, a device `fridge` that stands there, and their tokens."""

    organisation: UUID
    site: UUID
    device: UUID
    token: str
    gateway: str
    api_key: str


@dataclass
class Installation:
    """A migrated database with a generation of a SQLite log."""

    database: Database
    log_settings: LogSettings
    ring: KeyRing = field(default_factory=new_ring)

    @property
    def limits(self) -> Path:
        """What the faces count stands here, as the processes of one machine share it."""
        return Path(self.log_settings.log_url.removeprefix("sqlite://")).parent / "limits"

    @property
    def hasher(self) -> TokenHasher:
        return TokenHasher(self.ring)

    @asynccontextmanager
    async def acting_for(self, organisation: UUID) -> AsyncIterator[Any]:
        """A session of the API that acts for one organisation."""
        connection = await asyncpg.connect(self.database.url)
        try:
            async with acting_for(connection, organisation):
                yield connection
        finally:
            await connection.close()

    async def superuser(self, query: str, *arguments: Any) -> list[Any]:
        connection = await asyncpg.connect(self.database.superuser_url)
        try:
            return [tuple(row) for row in await connection.fetch(query, *arguments)]
        finally:
            await connection.close()

    async def tenant(self) -> Tenant:
        organisation = uuid7()
        async with self.acting_for(organisation) as connection:
            await add_organisation(connection, organisation, "test")
            site = await add_site(connection, organisation, "test")
            device = await add_device(connection, organisation, site, "test", "fridge")
            tokens = TokenMaker(connection, self.hasher)
            return Tenant(
                organisation,
                site,
                device,
                await tokens.add_device_token(organisation, device),
                await tokens.add_gateway_token(organisation, site),
                await tokens.add_api_key(organisation, ["owner"]),
            )

    async def add_device(self, tenant: Tenant, local_id: str, site: UUID | None = None) -> UUID:
        async with self.acting_for(tenant.organisation) as connection:
            return await add_device(connection, tenant.organisation, site or tenant.site, "test", local_id)

    async def execute(self, tenant: Tenant, query: str, *arguments: Any) -> None:
        async with self.acting_for(tenant.organisation) as connection:
            await connection.execute(query, *arguments)

    @asynccontextmanager
    async def open_log(self, **settings: Any) -> AsyncIterator[Log]:
        connection = await asyncpg.connect(self.database.owner_url)
        try:
            _, log = await open_generation(connection, replace(self.log_settings, **settings), client_id="test")
        finally:
            await connection.close()
        try:
            yield log
        finally:
            await log.close()

    @asynccontextmanager
    async def face(
        self,
        *,
        log: Log | None = None,
        database_url: str | None = None,
        clock: Clock | None = None,
        listener: Listener | None = None,
        spool: Path | None = None,
        lane: Path | None = None,
        origins: Origins | None = None,
        log_queue_bytes_max: int = 64_000_000,
        **settings: Any,
    ) -> AsyncIterator["Face"]:
        """One process's ingest, serving on a port of its own.

        It has a spool in the directory `spool`, and a paced lane in `lane`, if they are given.
        `settings` are those of ingest, the spool, the lane, HTTP and limits.
        """
        if log is None:
            async with (
                self.open_log(log_queue_bytes_max=log_queue_bytes_max) as own,
                self.face(
                    log=own,
                    database_url=database_url,
                    clock=clock,
                    listener=listener,
                    spool=spool,
                    lane=lane,
                    origins=origins,
                    **settings,
                ) as face,
            ):
                yield face
            return
        postgres = PostgresSettings(database_url=database_url or self.database.url)
        pool = await open_pool(postgres, role=ROLE, application="test", size_max=2)
        http = {name: settings.pop(name) for name in list(settings) if name in HTTP_FIELDS}
        limits = UNLIMITED | {name: settings.pop(name) for name in list(settings) if name in LIMIT_FIELDS}
        spooling = SpoolSettings(**{name: settings.pop(name) for name in list(settings) if name in SPOOL_FIELDS})
        pacing = PacedSettings(**{name: settings.pop(name) for name in list(settings) if name in PACED_FIELDS})
        ingest = IngestSettings(**settings)
        registry = CollectorRegistry()
        metrics = IngestMetrics(registry)
        clock = clock or SystemClock()
        counted = Limits(LimitSettings(**limits), clock, self.limits)
        spooled = None
        if spool is not None:
            spooled = Spool(
                log=log,
                directory=spool,
                end=ends_in(pool),
                settings=spooling,
                log_settings=self.log_settings,
                clock=clock,
                metrics=metrics,
            )
        paced = None
        if lane is not None:
            paced = PacedLane(
                log=log,
                spool=spooled,
                limits=counted,
                pool=pool,
                directory=lane,
                settings=pacing,
                log_settings=self.log_settings,
                clock=clock,
                metrics=metrics,
            )
        service = make_service(
            log=log,
            pool=pool,
            listener=listener or Notifications(postgres, role=ROLE, application="test"),
            ring=self.ring,
            limits=counted,
            settings=ingest,
            clock=clock,
            metrics=metrics,
            spool=spooled,
            lane=paced,
            origins=origins,
        )
        listening = listen("TEST", "127.0.0.1:0")
        server = HttpServer(listening, service.handle, HttpSettings(**http), service.refuse)
        await service.start()
        await server.start()
        await _followed(service)
        try:
            yield Face(listening.getsockname()[1], service, server, log, registry)
        finally:
            await server.stop(0.2)
            await service.stop()
            pool.terminate()


async def _followed(service: IngestService) -> None:
    """Until then what is looked up is not kept."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            if service._callers._credentials._epoch >= 0:
                return
            await asyncio.sleep(0.002)


def install(server: Server, template: str, directory: Path) -> Iterator[Installation]:
    """For a fixture: dropped when it ends."""
    database = asyncio.run(server.create(f"test_{uuid7().hex}", template))
    settings = LogSettings(log_url=f"sqlite:///{directory}/log", log_linger_ms=0, log_keep_landed_h=0)
    asyncio.run(_make_log(database, settings))
    yield Installation(database, settings)
    asyncio.run(server.drop(database.name))


async def _make_log(database: Database, settings: LogSettings) -> None:
    owner = await connect(database.settings, role=None, application="test", url=database.owner_url, **SESSION)
    try:
        await ensure_generation(owner, settings, PARTITIONS)
    finally:
        await owner.close()


# ---------------------------------------------------------------- the client


@dataclass(frozen=True)
class Reply:
    """What came back, whole."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The code of an error body, which has exactly the fields every error of this face has."""
        error = self.json()["error"]
        always = {"code", "message", "request_id"}
        assert always <= set(error) <= always | {"rejected", "limit"}
        return str(error["code"])


class Wire:
    """One connection, byte for byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, raw: bytes) -> None:
        self.writer.write(raw)
        await self.writer.drain()

    async def reply(self, *, to_head: bool = False) -> Reply:
        """The next answer. `to_head`: one to a HEAD, whose length is told but not sent."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        line, *fields = head.rstrip("\r\n").split("\r\n")
        version, status, _ = line.split(" ", 2)
        assert version == "HTTP/1.1"
        headers = {name.lower(): value for name, value in (field.split(": ", 1) for field in fields)}
        assert len(headers) == len(fields), f"a header stands twice: {head}"
        if status == "100":
            return Reply(100, headers, b"")
        assert headers["cache-control"] == "no-store"
        assert headers["x-request-id"]
        length = 0 if to_head or status == "204" else int(headers["content-length"])
        return Reply(int(status), headers, await self.reader.readexactly(length))

    async def ask(self, raw: bytes) -> Reply:
        await self.send(raw)
        return await self.reply()

    async def closed(self) -> bool:
        """Whether the server ends the connection without another byte."""
        try:
            return await self.reader.read(1) == b""
        except ConnectionResetError:
            return True


class Face:
    """A running ingest face, and requests to it."""

    def __init__(
        self, port: int, service: IngestService, server: HttpServer, log: Log, registry: CollectorRegistry
    ) -> None:
        self.port = port
        self.registry = registry
        self.service = service
        self.server = server
        self.log = log

    def counted(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels among others."""
        return sum(
            sample.value
            for metric in self.registry.collect()
            for sample in metric.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Wire]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            async with asyncio.timeout(DEADLINE_S):
                yield Wire(reader, writer)
        finally:
            writer.transport.abort()

    async def raw(self, *parts: bytes) -> Reply:
        """The answer to what is sent, on a connection of its own."""
        async with self.connect() as wire:
            return await wire.ask(b"".join(parts))

    async def post(self, token: str, body: Any, **headers: str) -> Reply:
        """`body` as JSON, or bytes as they are; `X_Device_Id="a"` is a header."""
        return await self.raw(post_bytes(token, body, **headers))

    async def get(self, target: str, token: str | None = None) -> Reply:
        return await self.raw(head_of("GET", target, token))

    async def records(self) -> list[Record]:
        """Everything that stands in the log, by partition and position."""
        reader = self.log.reader()
        bounds = await self.log.bounds()
        found: list[bytes] = []
        await reader.assign({partition: where.start for partition, where in bounds.items()})
        total = sum(where.end - where.start for where in bounds.values())
        while len(found) < total:
            for part in await reader.read(bytes_max=64_000_000, wait_s=1.0):
                found += part.bodies
        await reader.close()
        return [records.decode(body) for body in found]

    async def records_of(self, device: UUID) -> list[Record]:
        return [record for record in await self.records() if record.device == device.bytes]


def head_of(method: str, target: str, token: str | None = None, **headers: str) -> bytes:
    fields = {"Host": "test"} | ({"Authorization": f"Bearer {token}"} if token else {})
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"{method} {target} HTTP/1.1\r\n{lines}\r\n".encode()


def post_bytes(token: str | None, body: Any, **headers: str) -> bytes:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    fields = {"Content_Type": "application/json", "Content_Length": str(len(raw))} | headers
    return head_of("POST", "/v1/ingest", token, **fields) + raw


def measured(*readings: tuple[str, Any], **more: Any) -> dict[str, Any]:
    """A submission of (type, value) pairs."""
    return {"measurements": [{"type": name, "value": value} for name, value in readings]} | more


def rows(record: Record) -> list[tuple[str, str, str, int, Any, int]]:
    """(metric, label, unit, µs since 1970, value, quality) of a record's readings, by channel."""
    return [
        (channel.metric, channel.label, channel.unit, time + PG_EPOCH_US, value, quality)
        for channel in record.channels
        for time, value, quality in zip(
            channel.unpack_times(), channel.unpack_values(), channel.unpack_quality(), strict=True
        )
    ]

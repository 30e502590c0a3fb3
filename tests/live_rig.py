"""What the tests of streams share: an API that follows a log, its client, and what it was told."""

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from aiohttp import ClientResponse, ClientSession, ClientTimeout
from prometheus_client import CollectorRegistry

from api.access.authority import Waits
from api.live.hub import Live
from api.live.settings import LiveSettings
from api.metrics import ApiMetrics
from api.platform.live import LISTENS
from api.registry.credentials import Credentials
from api.registry.organisations import acting_for
from api.server import create_app
from api.serving import ApiFace
from api.settings import ApiSettings
from deploy.generation import open_generation
from runtime.http.server import HttpServer, HttpSettings
from runtime.log.port import Log
from runtime.postgres import PostgresSettings, connect, open_pool
from runtime.secrets import TokenHasher, new_ring
from runtime.sockets import address_of, listen
from tests.landing_rig import Rig, until

RING = new_ring()
PATH = "/api/v1/readings/stream"
WAIT_S = 120.0


@dataclass
class Event:
    """One event as a client takes it; `id` is the last one that came, with it or before."""

    name: str
    data: Any
    id: str


class Stream:
    """A client that listens: reads lines as WHATWG HTML says."""

    def __init__(self, answer: ClientResponse) -> None:
        self.answer = answer
        self.last_id = ""
        self.comments = 0
        self.retry_ms = 0

    async def next(self, *names: str) -> Event | None:
        """The next event, of these names if any are given; None when the stream has ended."""
        fields: dict[str, str] = {}
        async with asyncio.timeout(WAIT_S):
            while True:
                raw = await self.answer.content.readline()
                if not raw:
                    return None
                line = raw.decode().rstrip("\n")
                if line:
                    self._take(line, fields)
                    continue
                self.last_id = fields.get("id", self.last_id)
                if "data" in fields and (not names or fields.get("event") in names):
                    return Event(fields["event"], json.loads(fields["data"]), self.last_id)
                fields = {}

    def _take(self, line: str, fields: dict[str, str]) -> None:
        name, _, value = line.partition(":")
        if not name:
            self.comments += 1
        elif name == "retry":
            self.retry_ms = int(value)
        else:
            fields[name] = value.removeprefix(" ")

    async def readings(self, count: int) -> list[Any]:
        """The next ones, at least so many."""
        rows: list[Any] = []
        while len(rows) < count:
            event = await self.next()
            assert event is not None, f"the stream ended after {len(rows)} of {count}"
            assert event.name in ("readings", "position"), event
            rows += event.data if event.name == "readings" else []
        return rows


@dataclass
class Api:
    """An API on a rig's database and log."""

    rig: Rig
    url: str
    session: ClientSession
    live: Live
    registry: CollectorRegistry
    keys: dict[UUID, str] = field(default_factory=dict)

    async def key(self, organisation: UUID) -> str:
        if organisation not in self.keys:
            self.keys[organisation] = await self.make_key(organisation)
        return self.keys[organisation]

    async def make_key(self, organisation: UUID) -> str:
        connection = await connect(self.rig.postgres, role=None, application="test")
        try:
            async with acting_for(connection, organisation):
                return await Credentials(connection, TokenHasher(RING)).add_api_key(organisation, ["readings:read"])
        finally:
            await connection.close()

    @asynccontextmanager
    async def listening(
        self, organisation: UUID, last_id: str = "", *, key: str = "", **query: Any
    ) -> AsyncIterator[Stream]:
        """A stream that has been told its position."""
        async with self.asked(organisation, last_id, key=key, **query) as answer:
            assert answer.status == 200, await answer.text()
            stream = Stream(answer)
            first = await stream.next()
            assert first is not None
            assert (first.name, bool(first.id)) == ("position", True)
            yield stream

    @asynccontextmanager
    async def asked(
        self, organisation: UUID, last_id: str = "", *, key: str = "", **query: Any
    ) -> AsyncIterator[ClientResponse]:
        headers = {"Authorization": f"Bearer {key or await self.key(organisation)}", "Accept-Encoding": "gzip"}
        if last_id:
            headers["Last-Event-ID"] = last_id
        parameters = {name: str(value) for name, value in query.items()}
        async with self.session.get(f"{self.url}{PATH}", params=parameters, headers=headers) as answer:
            yield answer

    def sample(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"sluice_api_live_{name}", labels) or 0.0


@asynccontextmanager
async def api_on(rig: Rig, *, postgres: PostgresSettings | None = None, **limits: Any) -> AsyncIterator[Api]:
    """An API whose streams follow the rig's log through one that it opens itself."""
    registry = CollectorRegistry()
    metrics, settings = ApiMetrics(registry), LiveSettings(**({"live_poll_ms": 20, "live_check_s": 0.2} | limits))
    pool = await open_pool(postgres or rig.postgres, role="sluice_app", application="test", size_max=4)
    logs: deque[Log] = deque()

    async def open_log() -> Log:
        while logs:
            await logs.pop().close()
        connection = await connect(postgres or rig.postgres, role="sluice_reader", application="test")
        try:
            logs.append((await open_generation(connection, rig.log_settings, client_id="test"))[1])
        finally:
            await connection.close()
        return logs[0]

    live = Live(pool, RING, settings, metrics, open_log, needs=LISTENS, waits=Waits.of(ApiSettings()))
    app = create_app(pool=pool, ring=RING, settings=ApiSettings(), metrics=metrics, live=live, limits=settings)
    face = ApiFace(app, metrics)
    await face.start()
    listener = listen("TEST", "127.0.0.1:0")
    server = HttpServer(listener, face.handler, HttpSettings(), face.refuse, face.request_factory)
    await server.start()
    async with ClientSession(timeout=ClientTimeout(total=None), read_bufsize=2**24) as session:
        here = Api(rig, f"http://{address_of(listener)}", session, live, registry)

        async def is_open() -> bool:
            return live.trouble is None

        await until(is_open)
        try:
            yield here
        finally:
            live.end()
            await server.stop(5)
            await face.stop()
            for log in logs:
                await log.close()
            await pool.close()

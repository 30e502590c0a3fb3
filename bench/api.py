"""`sluice bench registry`: what the API takes for lists, look-ups, changes and logins among many devices.

One request at a time on one connection, as its client sees it over loopback: an upper bound of the server's own time.
Each list is asked for by every filter that there is, its first, middle and last page; PostgreSQL says how it plans
them. Left out: many requests at once.
"""

import asyncio
import http.client
import itertools
import json
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import urlencode
from uuid import UUID

import asyncpg

from api.registry.devices import FIRST, page_sql
from bench.errors import BenchError
from bench.parts import Parts, progress, real_parts, sluice_command, workshop
from bench.registry import Registered, register
from bench.usage import free_port
from runtime.ids import uuid7
from runtime.secrets import API_KEY_PREFIX, KeyRing, TokenHasher, make_token
from schemas.models import MODELS, models_like

PAGE: Final = 50
#: Of the way to the middle and the end: a twentieth of all devices, as far as one page may have.
STEPS: Final = 20
STEP_MAX: Final = 500
EMAIL: Final = "bench@example.org"
PASSWORD: Final = "correct horse battery"
MODEL_PART: Final = "shelly"
LOGINS: Final = 20
UNMEASURED: Final = 5

_ACT: Final = "SELECT set_config('sluice.organisation', $1, true)"
_KEY: Final = """
INSERT INTO credentials (credential_id, organisation_id, kind, token_hash, name, scopes)
VALUES ($1, $2, 'api_key', $3, 'bench', '{owner}')"""
_SITE: Final = "SELECT site_id FROM sites LIMIT 1"
# Of each model as many, a third of them online; another third has fallen silent and nobody has noted it yet.
_DESCRIBE: Final = """
UPDATE devices d SET model = ($1::text[])[1 + n % cardinality($1::text[])], online = n % 3 < 2, cadence_s = 60,
    last_seen_at = now() - CASE n % 3 WHEN 0 THEN interval '0' ELSE interval '1 hour' END,
    online_until = now() + CASE n % 3 WHEN 0 THEN interval '1 day' ELSE interval '-1 minute' END
FROM (SELECT device_id, row_number() OVER (ORDER BY device_id) AS n FROM devices) numbered
WHERE numbered.device_id = d.device_id"""


class Filter(NamedTuple):
    """What a list is narrowed by."""

    of: str
    """`account` or `site`."""
    online: bool | None
    model: bool

    @property
    def name(self) -> str:
        parts = [self.of, {None: "", True: "online", False: "offline"}[self.online], "model" if self.model else ""]
        return " ".join(part for part in parts if part)


FILTERS: Final = tuple(
    itertools.starmap(Filter, itertools.product(("account", "site"), (None, True, False), (False, True)))
)


@dataclass(frozen=True)
class ApiFigures:
    """Seconds of each request, by what it was; and what each list's plan reads."""

    devices: int
    seconds: Mapping[str, Sequence[float]]
    plans: Mapping[str, "Plan"]


class Plan(NamedTuple):
    """What PostgreSQL did for a list's middle page."""

    indexes: Sequence[str]
    scans_all: bool
    """Whether it read a table from its beginning."""
    rows_dropped: int
    """That it read and did not want."""


def measure(devices: int, requests: int, services: Path) -> ApiFigures:
    """Raises `BenchError` when a run cannot be made, or a request is not answered with success."""
    with real_parts(services) as parts, asyncio.Runner() as runner:
        return runner.run(_measure(devices, requests, parts))


async def _measure(devices: int, requests: int, parts: Parts) -> ApiFigures:
    progress(f"registering {devices} devices")
    connection = await asyncpg.connect(parts.database_url)
    try:
        registered = await register(connection, parts.environment["SLUICE_SECRET_KEYS"], devices, overrides=False)
        async with connection.transaction():
            await connection.execute("SET LOCAL ROLE sluice_app")
            await connection.execute(_ACT, str(registered.organisation))
            await connection.execute(_DESCRIBE, sorted(MODELS))
            site = await connection.fetchval(_SITE)
            key = await add_key(connection, registered, parts)
        await _analyzed(parts)
        _make_admin(parts)
        async with workshop(parts) as shop:
            port = free_port()
            # A pool's first requests make its sessions, and those their plans.
            await shop.role("api", SLUICE_API_LISTEN=f"127.0.0.1:{port}", SLUICE_AUTH_LOGINS_PER_MINUTE="100000")
            client = _Client(port, key, registered.organisation, UUID(str(site)), devices)
            seconds = await asyncio.to_thread(lambda: dict(client.measured(registered.devices, requests)))
        plans = {one.name: await _plan(connection, registered, UUID(str(site)), one) for one in FILTERS}
    finally:
        await connection.close()
    return ApiFigures(devices, seconds, plans)


async def add_key(connection: Any, registered: Registered, parts: Parts) -> str:
    key = make_token(API_KEY_PREFIX)
    hasher = TokenHasher(KeyRing.parse(parts.environment["SLUICE_SECRET_KEYS"]))
    await connection.execute(_KEY, uuid7(), registered.organisation, hasher.digest(key))
    return key


async def _analyzed(parts: Parts) -> None:
    """What autovacuum does within minutes: statistics, and pages that indexes alone may answer for."""
    connection = await asyncpg.connect(parts.owner_url)
    await connection.execute("VACUUM (ANALYZE) devices, device_sites, sites, credentials")
    await connection.close()


def _make_admin(parts: Parts) -> None:
    done = subprocess.run(
        sluice_command("admin", "create", EMAIL), env=dict(parts.environment), input=PASSWORD + "\n", text=True,
        stdout=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    if done.returncode:
        raise BenchError("`sluice admin create` failed")


class _Client:
    """One connection to the API."""

    def __init__(self, port: int, key: str, organisation: UUID, site: UUID, devices: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port)
        self._key = key
        self._of = {"account": f"acc_{organisation.hex}", "site": f"site_{site.hex}"}
        self._site = f"site_{site.hex}"
        self._step = min(STEP_MAX, devices // STEPS)

    def measured(self, devices: Sequence[UUID], requests: int) -> Iterator[tuple[str, list[float]]]:
        for one in FILTERS:
            progress(f"lists: {one.name}")
            for page, query in self._pages(one).items():
                yield f"list {one.name}, {page} page", self._times(requests, lambda _, q=query: self._list(q))  # type: ignore[misc]
        progress("one at a time")
        get = [f"/v1/devices/dev_{device.hex}" for device in devices[:: max(1, len(devices) // requests)]]
        yield "get a device", self._times(requests, lambda number: self.ask("GET", get[number % len(get)]))
        yield "create a device", self._times(requests, self._create)
        yield "log in", self._times(LOGINS, self._log_in)

    def ask(self, method: str, path: str, body: object = None) -> Any:
        """What is answered. Raises `BenchError` for anything but success."""
        headers = {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"}
        self._connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = self._connection.getresponse()
        raw = answer.read()
        if answer.status >= 300:
            raise BenchError(f"{method} {path} was answered {answer.status}: {raw[:200]!r}")
        return raw

    def _pages(self, one: Filter) -> dict[str, dict[str, str]]:
        """The queries of a list's first, middle and last page, found by going through it."""
        query = {f"{one.of}_id": self._of[one.of]}
        if one.online is not None:
            query["online"] = str(one.online).lower()
        if one.model:
            query["model"] = MODEL_PART
        cursors: list[str] = []
        while True:
            after = {"cursor": cursors[-1]} if cursors else {}
            found = json.loads(self._list({**query, **after, "limit": str(self._step)}))
            if found["next_cursor"] is None:
                break
            cursors.append(found["next_cursor"])
        if not cursors:
            raise BenchError(f"the list {one.name} has one page: take more devices")
        small = {**query, "limit": str(PAGE)}
        middle = {**small, "cursor": cursors[len(cursors) // 2]}
        return {"first": small, "middle": middle, "last": {**small, "cursor": cursors[-1]}}

    def _list(self, query: Mapping[str, str]) -> Any:
        return self.ask("GET", f"/v1/devices?{urlencode(query)}")

    def _create(self, number: int) -> Any:
        new = {"site_id": self._site, "local_id": f"new-{number}", "name": "New", "model": "diy_esp32"}
        return self.ask("POST", "/v1/devices", new)

    def _log_in(self, _: int) -> Any:
        return self.ask("POST", "/api/v1/auth/login", {"email": EMAIL, "password": PASSWORD})

    @staticmethod
    def _times(count: int, request: Callable[[int], object]) -> list[float]:
        """Seconds of each of `count` requests, after some that nobody measures."""
        taken = []
        for number in range(UNMEASURED + count):
            began = time.perf_counter()
            request(number)
            taken.append(time.perf_counter() - began)
        return taken[UNMEASURED:]


async def _plan(connection: Any, registered: Registered, site: UUID, one: Filter) -> Plan:
    """How the API's own statement is carried out, under its role."""
    middle = sorted(registered.devices)[len(registered.devices) // 2]
    arguments: list[Any] = [registered.organisation, middle or FIRST, PAGE + 1]
    arguments += [models_like(MODEL_PART)] if one.model else []
    arguments += [site] if one.of == "site" else []
    sql = page_sql(one.of == "site", one.online, one.model)
    async with connection.transaction():
        await connection.execute("SET LOCAL ROLE sluice_app")
        await connection.execute(_ACT, str(registered.organisation))
        (row,) = await connection.fetch(f"EXPLAIN (ANALYZE, FORMAT JSON) {sql}", *arguments)
    nodes = list(_nodes(json.loads(row[0])[0]["Plan"]))
    return Plan(
        sorted({node["Index Name"] for node in nodes if "Index Name" in node}),
        any(node["Node Type"] == "Seq Scan" and node["Relation Name"] != "sites" for node in nodes),
        sum(round(node.get("Rows Removed by Filter", 0) * node["Actual Loops"]) for node in nodes),
    )


def _nodes(plan: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield plan
    for below in plan.get("Plans", ()):
        yield from _nodes(below)

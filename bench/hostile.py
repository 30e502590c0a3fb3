"""`sluice bench hostile`: hostile requests at the ingest face, while good devices go on sending.

Attackers come from many addresses of loopback with tokens that are valid, unknown or none; each one's requests follow
from the seed and its number. Left out: what they send (`bench.attacks`).
"""

import asyncio
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import asyncpg
import orjson
import uvloop

from bench.attacks import Attacker, Stolen
from bench.books import Books
from bench.errors import BenchError
from bench.load import percentiles_ms
from bench.parts import Parts, Role, Workshop, progress, real_parts, workshop
from bench.registry import Registered, register
from bench.usage import free_port, memory_bytes
from bench.workload import json_post
from runtime.ids import uuid7
from runtime.secrets import API_KEY_PREFIX, GATEWAY_PREFIX, KeyRing, TokenHasher, make_token

#: What answers a method that HTTP does not have: a 5xx that blames the request.
NO_METHOD: Final = 501
#: Answers that blame the request, or took it.
HONEST: Final = frozenset({200, 202, 204, 400, 401, 403, 404, 405, 408, 409, 413, 414, 415, 422, 429, 431, NO_METHOD})
#: What a 503 may give as its reason; it also has to say when to come back.
HONEST_503: Final = frozenset({"overloaded", "log_unavailable", "outcome_unknown", "registry_unavailable"})
GO_ON: Final = b"HTTP/1.1 100 "
SILENCE_S: Final = 0.05
VICTIMS: Final = 4
VICTIM_PAUSE_S: Final = 0.02
SETTLE_S: Final = 5.0
LANDING_TIMEOUT_S: Final = 60.0
MEMORY_GROWTH_MAX_BYTES: Final = 50_000_000
#: A stolen token that is over its limit would get 429 for anything it sends, and nothing behind would be tried.
LIMITS: Final = {
    f"SLUICE_LIMIT_{subject}_{what}": "0"
    for subject in ("DEVICE", "GATEWAY", "ORGANISATION")
    for what in ("REQUESTS_PER_MINUTE", "READINGS_PER_MINUTE", "BYTES_PER_DAY")
}

_ACT: Final = "SELECT set_config('sluice.organisation', $1, true)"
_SITE: Final = "SELECT site_id FROM sites LIMIT 1"
_CREDENTIAL: Final = """
INSERT INTO credentials (credential_id, organisation_id, kind, site_id, token_hash, name, scopes)
VALUES ($1, $2, $3, $4, $5, 'bench', $6)"""


@dataclass(frozen=True)
class Options:
    """How much is sent, by how many at once."""

    requests: int
    attackers: int
    seed: int


@dataclass
class Tally:
    """What came back."""

    statuses: Counter[int] = field(default_factory=Counter)
    codes_503: Counter[str] = field(default_factory=Counter)
    silent: int = 0
    """Requests that had no answer: cut off, or not over when their sender gave up."""
    dishonest: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class HostileFigures:
    """What a run showed."""

    options: Options
    seconds: float
    tally: Tally
    faults: Mapping[str, float]
    """Answers of 5xx but 501 and 503 as ingest itself counted them, seen by their senders or not, by status."""
    failures_logged: int
    good_sent: int
    good_latencies_ms: Mapping[str, float]
    memory_before_bytes: int
    memory_after_bytes: int

    @property
    def memory_growth_bytes(self) -> int:
        return self.memory_after_bytes - self.memory_before_bytes

    @property
    def failures(self) -> list[str]:
        """Why the run is no success; empty when it is."""
        found = [f"attacker and request {one}" for one in self.tally.dishonest[:10]]
        found += [f"{count:g} answers of {status}" for status, count in self.faults.items()]
        if self.failures_logged:
            found.append(f"{self.failures_logged} requests failed in ingest's log")
        if self.memory_growth_bytes > MEMORY_GROWTH_MAX_BYTES:
            found.append(f"memory grew by {self.memory_growth_bytes / 1e6:.1f} MB")
        return found


def measure(options: Options, services: Path) -> HostileFigures:
    """Raises `BenchError` when ingest dies, a good reading is refused or lost, or a run cannot be made."""
    with real_parts(services) as parts, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_measure(options, parts))


async def _measure(options: Options, parts: Parts) -> HostileFigures:
    keys = parts.environment["SLUICE_SECRET_KEYS"]
    connection = await asyncpg.connect(parts.database_url)
    try:
        attacked = await register(connection, keys, 1)
        stolen = await _steal(connection, keys, attacked)
        victims = await register(connection, keys, VICTIMS)
    finally:
        await connection.close()
    books = Books(parts, victims.organisation)
    await books.open()
    try:
        async with workshop(parts) as shop:
            return await _attack(options, shop, books, stolen, victims)
    finally:
        await books.close()


async def _steal(connection: Any, keys: str, attacked: Registered) -> Stolen:
    """A gateway's token and an API key beside the device's."""
    hasher = TokenHasher(KeyRing.parse(keys))
    gateway, api_key = make_token(GATEWAY_PREFIX), make_token(API_KEY_PREFIX)
    async with connection.transaction():
        await connection.execute("SET LOCAL ROLE sluice_app")
        await connection.execute(_ACT, str(attacked.organisation))
        site: UUID = await connection.fetchval(_SITE)
        rows: list[tuple[str, UUID | None, str, list[str]]] = [
            ("gateway", site, gateway, []),
            ("api_key", None, api_key, ["owner"]),
        ]
        for kind, where, token, scopes in rows:
            values = uuid7(), attacked.organisation, kind, where, hasher.digest(token), scopes
            await connection.execute(_CREDENTIAL, *values)
    return Stolen(attacked.tokens[0], gateway, api_key)


async def _attack(
    options: Options, shop: Workshop, books: Books, stolen: Stolen, victims: Registered
) -> HostileFigures:
    port = free_port()
    ingest = await shop.role("ingest", SLUICE_HTTP_LISTEN=f"127.0.0.1:{port}", SLUICE_LOG_LEVEL="info", **LIMITS)
    await shop.role("worker")
    stop = asyncio.Event()
    good = [asyncio.create_task(_serve_good(port, token, stop)) for token in victims.tokens]
    await asyncio.sleep(SETTLE_S)
    before = memory_bytes(ingest.pid, "VmRSS")
    progress(f"{options.requests} hostile requests from {options.attackers} attackers, seed {options.seed}")
    began = time.perf_counter()
    tally = await _attackers(options, port, stolen, good)
    seconds = time.perf_counter() - began
    await asyncio.sleep(SETTLE_S)
    after = memory_bytes(ingest.pid, "VmRSS")
    stop.set()
    latencies = [one for found in await asyncio.gather(*good) for one in found]
    await books.landed(LANDING_TIMEOUT_S)
    await books.check(len(latencies))
    faults = await _faults(ingest)
    failures = ingest.process.output().count("a request failed")
    return HostileFigures(
        options,
        seconds,
        tally,
        faults,
        failures,
        len(latencies),
        percentiles_ms(latencies, 50, 99, 100),
        before,
        after,
    )


async def _faults(ingest: Role) -> dict[str, float]:
    counted = {
        name.partition('status="')[2][:3]: value
        for name, value in (await ingest.metrics()).items()
        if name.startswith("sluice_ingest_requests_total")
    }
    told = ("503", str(NO_METHOD))
    return {status: value for status, value in counted.items() if status >= "500" and status not in told and value}


async def _attackers(options: Options, port: int, stolen: Stolen, good: list["asyncio.Task[list[float]]"]) -> Tally:
    """Raises what made a good device fail, at once."""
    tally = Tally()
    share, rest = divmod(options.requests, options.attackers)
    attacks = [
        asyncio.create_task(_one_attacker(options.seed + number, share + (number < rest), port, stolen, tally))
        for number in range(options.attackers)
    ]
    waiting = {*attacks}
    while waiting:
        done, _ = await asyncio.wait({*waiting, *good}, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        waiting -= done
    return tally


async def _one_attacker(seed: int, requests: int, port: int, stolen: Stolen, tally: Tally) -> None:
    attacker = Attacker(seed, stolen)
    source = f"127.{1 + seed % 200}.{seed // 200 % 250}.{2 + seed % 250}"
    for number in range(requests):
        raw, cut, pause_s = _made(attacker)
        try:
            answer = await _ask(port, source, raw, cut, pause_s)
        except ConnectionRefusedError:
            raise BenchError(f"ingest does not listen any more, after request {number} of {seed}") from None
        except OSError:
            answer = b""
        _judge(answer, attacker.secret, f"{seed}/{number}", tally)


def _made(attacker: Attacker) -> tuple[bytes, int, float]:
    raw = attacker.request()
    return raw, attacker.cut(raw), attacker.pause_s()


async def _ask(port: int, source: str, raw: bytes, cut: int, pause_s: float) -> bytes:
    """The first answer, as far as it came before patience was over: what is cut off has none."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0))
    answer = b""
    try:
        with suppress(TimeoutError, asyncio.IncompleteReadError, ConnectionError):
            async with asyncio.timeout(SILENCE_S + pause_s):
                writer.write(raw[:cut])
                await asyncio.sleep(pause_s)
                writer.write(raw[cut:])
                while not answer or answer.startswith(GO_ON):
                    answer = await reader.readuntil(b"\r\n\r\n")
                length = answer.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
                if length and not raw.startswith(b"HEAD"):
                    answer += await reader.readexactly(int(length))
    finally:
        writer.transport.abort()
    return answer


def _judge(answer: bytes, secret: bytes, request: str, tally: Tally) -> None:
    if not answer or answer.startswith(GO_ON):
        tally.silent += 1
        return
    status = int(answer[9:12])
    tally.statuses[status] += 1
    if secret in answer:
        tally.dishonest.append(f"{request}: a token in the answer {answer[:80]!r}")
    elif status == 503 and b"\r\nRetry-After: " in answer:
        with suppress(ValueError, KeyError, TypeError):
            code = orjson.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"]
            tally.codes_503[code] += 1
            if code in HONEST_503:
                return
        tally.dishonest.append(f"{request}: {answer[:200]!r}")
    elif status not in HONEST:
        tally.dishonest.append(f"{request}: {answer[:200]!r}")


async def _serve_good(port: int, token: str, stop: asyncio.Event) -> list[float]:
    """A device that sends a reading every few milliseconds on one connection; how long each took, in s."""
    latencies: list[float] = []
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    first_ts = int(time.time()) - 10_000_000
    try:
        while not stop.is_set():
            measurement = {"type": "co2", "value": 400 + len(latencies) % 100, "ts": first_ts + len(latencies)}
            began = time.perf_counter()
            writer.write(json_post(token, orjson.dumps({"measurements": [measurement]})))
            answer = await reader.readuntil(b"\r\n\r\n")
            length = int(answer.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            body = await reader.readexactly(length)
            if not answer.startswith(b"HTTP/1.1 202 ") or not body.startswith(b'{"accepted":1,'):
                raise BenchError(f"a good device got {answer[9:12]!r}: {body[:200]!r}")
            latencies.append(time.perf_counter() - began)
            await asyncio.sleep(VICTIM_PAUSE_S)
    except (ConnectionError, asyncio.IncompleteReadError) as error:
        raise BenchError(f"a good device lost its connection after {len(latencies)} readings: {error}") from None
    finally:
        writer.transport.abort()
    return latencies

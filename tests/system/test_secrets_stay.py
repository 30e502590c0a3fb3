"""No token, key or password is found anywhere after a run in which they were sent wherever something can be sent.

Ingest, worker and API run at debug level, over TLS on every link, and lose their log and their database on the way.
Left out: what a process holds in memory, and the files that an operator gave the secrets in.
"""

import asyncio
import json
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import asyncpg
import pytest

from deploy.generation import open_generation
from runtime.log import LogSettings
from runtime.secrets import API_KEY_PREFIX, DEVICE_PREFIX, GATEWAY_PREFIX, make_token, new_ring
from tests.certificates import Authority
from tests.contract.conftest import read_all
from tests.secure_parts import SecureParts, secure_parts
from tests.support import ask, eventually
from tests.system.roles import Role, clean_environment, role, sluice

JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJnZWhlaW0tc3ViamVjdCJ9.c2lnbmF0dXJlLWdlaGVpbQ"
TIMEOUT_S = 60.0


@dataclass
class Stage:
    """What runs, how it is reached, and what came back."""

    parts: SecureParts
    environment: dict[str, str]
    client: ssl.SSLContext
    seeded: dict[str, str]
    tokens: dict[str, str]
    secrets: list[str]
    answers: list[bytes] = field(default_factory=list)

    def speak(self, server: Role, *pieces: bytes) -> int:
        """The status of the answer to what is sent on a connection of its own; 0 for none."""
        where = urlsplit(server.url)
        with (
            socket.create_connection((where.hostname or "", where.port or 0), TIMEOUT_S) as plain,
            self.client.wrap_socket(plain, server_hostname="localhost") as wire,
        ):
            for piece in pieces:
                wire.sendall(piece)
            answer = b""
            while chunk := wire.recv(65536):
                answer += chunk
        self.answers.append(answer)
        return int(answer[9:12] or 0)

    def get(self, server: Role, target: str, token: str | None = None, **headers: str) -> int:
        return self.speak(server, head("GET", target, token, headers))

    def post(self, server: Role, body: Any, token: str | None, **headers: str) -> int:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.speak(server, head("POST", "/v1/ingest", token, {"Content_Length": str(len(raw))} | headers), raw)


def head(method: str, target: str, token: str | None, headers: dict[str, str]) -> bytes:
    fields = {"Host": "localhost", "Connection": "close"}
    if token is not None:
        fields["Authorization"] = f"Bearer {token}"
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"{method} {target} HTTP/1.1\r\n{lines}\r\n".encode()


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    files = tmp_path_factory.mktemp("certificates")
    authority = Authority(files)
    shown = authority.sign("server", "localhost", "127.0.0.1")
    ring = str(new_ring())
    with secure_parts(tmp_path_factory.mktemp("parts")) as parts:
        environment = clean_environment(
            **{name: url for name, url in parts.environment.items() if name != "SLUICE_MQTT_URL"},
            SLUICE_SECRET_KEYS=ring,
            SLUICE_LOG_LEVEL="debug",
            SLUICE_TLS_CERTIFICATE_FILE=shown.certificate,
            SLUICE_TLS_KEY_FILE=shown.key,
            SLUICE_LOG_APPEND_TIMEOUT_MS="1000",
            SLUICE_DATA_DIR=str(tmp_path_factory.mktemp("data")),
            SLUICE_LIMIT_DEVICE_REQUESTS_PER_MINUTE="0",
            SLUICE_LIMIT_UNKNOWN_REQUESTS_PER_MINUTE="0",
        )
        sluice(environment, "migrate")
        seeded = json.loads(sluice(environment, "seed", "--json"))
        tokens = {
            "device": seeded["ingest_token"],
            "api key": seeded["api_key"],
            "gateway": sluice(environment, "token", "gateway", seeded["site_id"]).strip(),
            "unknown device": make_token(DEVICE_PREFIX),
            "unknown gateway": make_token(GATEWAY_PREFIX),
            "unknown api key": make_token(API_KEY_PREFIX),
        }
        secrets = [token[8:] for token in tokens.values()]
        secrets += [JWT.rpartition(".")[2], ring.partition(":")[2], *parts.passwords]
        yield Stage(parts, environment, ssl.create_default_context(cafile=authority.file), seeded, tokens, secrets)


# ---------------------------------------------------------------- everywhere that something can be sent


def bodies(secret: str) -> list[Any]:
    """Bodies with `secret` in every place there is."""
    good = {"type": "temperature", "value": 21.5}
    single: list[Any] = [
        {"type": secret, "value": 1},
        {"type": f"my_{secret}"[:64], "value": 1},
        {"type": "note", "value": secret},
        {"type": "note", "value": f"the token is {secret}, keep it", "label": "a"},
        {"type": "temperature", "value": secret},
        good | {"label": secret},
        good | {"label": f"x{secret}"},
        good | {"unit": secret},
        {"type": "mine", "value": 1, "unit": secret[:16]},
        good | {"ts": secret},
        good | {"ts": f"2026-01-01T00:00:00 {secret}"},
        good | {"metadata": {secret: secret}},
        {"type": "note", "value": {secret: [secret]}},
        {"type": "note", "value": [secret]},
        {secret: secret},
        secret,
        [secret],
        {"type": "note", "value": secret, "label": "conflict", "ts": 1_790_000_000},
        {"type": "note", "value": f"{secret} again", "label": "conflict", "ts": 1_790_000_000},
    ]
    whole: list[Any] = [
        {"measurements": [good], "device": secret},
        {"measurements": [good], "ts": secret},
        {"measurements": [good], secret: secret},
        {"measurements": secret},
        {secret: [good]},
        [secret],
        secret,
        f'{{"measurements": [{{"type": "{secret}", '.encode(),
        f"token={secret}".encode(),
        f'{{"measurements":[{{"type":"a","value":"{secret}","value":1}}]}}'.encode(),
        b"\xff" + secret.encode(),
    ]
    return [*({"measurements": [good, one]} for one in single), *whole]


def send_bodies(stage: Stage, ingest: Role) -> None:
    for secret in (*stage.tokens.values(), JWT):
        for body in bodies(secret):
            stage.post(ingest, body, stage.tokens["device"])
        stage.post(ingest, bodies(secret)[0], stage.tokens["gateway"], X_Device_Id=secret)
        stage.post(ingest, bodies(secret)[0], secret)


def send_targets(stage: Stage, ingest: Role, api: Role) -> None:
    good = stage.tokens["device"]
    device = stage.seeded["device_id"]
    for secret in (*stage.tokens.values(), JWT):
        for target in (
            f"/v1/ingest?token={secret}&temp=1",
            f"/v1/ingest/shelly/{secret}?temp=1",
            f"/v1/ingest/shelly/{secret}&temp=1&{secret}=1",
            f"/v1/ingest/{secret}",
            f"/{secret}",
            f"/v1/receipts/{secret}",
            f"/v1/ingest?token={secret.replace('_', '%5F')}&temp=1",
            f"http://localhost/v1/ingest?token={secret}&temp=1",
        ):
            stage.get(ingest, target)
        for query in ("device", "ts", "temp", "event", "error", "id", "unknown", secret):
            stage.get(ingest, f"/v1/ingest?token={good}&hum=40&{query}={secret}")
        for name in (
            "X_Device_Id", "Prefer", "Content_Type", "Content_Encoding", "Idempotency_Key", "Cookie", "X_Request_Id",
        ):  # fmt: skip
            stage.post(ingest, bodies("x")[5], good, **{name: secret})
        for target in (
            f"/api/v1/readings?device_id={secret}",
            f"/api/v1/readings?device_id={device}&metric={secret}&label={secret}",
            f"/api/v1/readings?device_id={device}&from={secret}",
            f"/api/v1/readings?device_id={device}&cursor={secret}",
            f"/api/v1/readings?device_id={device}&{secret}=1",
            f"/api/v1/{secret}",
            f"/api/v1/readings?token={secret}",
        ):
            stage.get(api, target, stage.tokens["api key"])
            stage.get(api, target, secret)


def send_junk(stage: Stage, ingest: Role, api: Role) -> None:
    """What is no HTTP, with a secret where the parser stumbles."""
    for secret in (*stage.tokens.values(), JWT):
        for raw in (
            f"GET /v1/ingest?token={secret} HTTP/9.9\r\nHost: a\r\n\r\n",
            f"{secret} / HTTP/1.1\r\nHost: a\r\n\r\n",
            f"GET / HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {secret}\x01\r\n\r\n",
            f"GET / HTTP/1.1\r\nHost: a\r\n{secret} : x\r\n\r\n",
            f"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: {secret}\r\n\r\n",
            f"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: {secret}\r\n\r\n",
            f"POST /v1/ingest HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {stage.tokens['device']}\r\n"
            f"Transfer-Encoding: chunked\r\n\r\n{secret}\r\n",
            f"GET / HTTP/1.1\r\nHost: a\r\nX: {secret * 300}\r\n\r\n",
        ):
            for server in (ingest, api):
                assert stage.speak(server, raw.encode()) in (400, 404, 431, 501)


def send_while_broken(stage: Stage, ingest: Role, api: Role) -> None:
    """While the database, then the log, is away: what is known goes on, everything else is an honest 503."""
    stage.parts.services("kill", "timescaledb")
    seen = {stage.post(ingest, {"measurements": []}, stage.tokens["unknown device"]) for _ in range(3)}
    for secret in (*stage.tokens.values(), JWT):
        stage.get(ingest, f"/v1/ingest?token={secret}&temp=2")
        stage.get(ingest, "/v1/receipts/x", secret)
        stage.get(api, f"/api/v1/readings?device_id={stage.seeded['device_id']}", secret)
    assert stage.get(ingest, f"/v1/ingest?token={make_token(DEVICE_PREFIX)}&temp=2") == 503
    stage.parts.services("start", "timescaledb", "--tls")
    stage.parts.services("kill", "kafka")
    for secret in (*stage.tokens.values(), JWT):
        stage.post(ingest, bodies(secret)[3], stage.tokens["device"])
        stage.get(ingest, f"/v1/ingest?token={stage.tokens['device']}&event={secret}")
    stage.parts.services("start", "kafka", "--tls")
    assert seen <= {401, 422, 503}


# ---------------------------------------------------------------- everywhere that something may have stayed


def found_in(where: str, content: bytes, secrets: list[str]) -> list[str]:
    """Where a secret stands, as it is, in lower case or as hexadecimal digits."""
    lowered = content.lower()
    return [
        f"{where}: secret {number} at {lowered.index(form)}: {content[max(0, lowered.index(form) - 80) :][:160]!r}"
        for number, secret in enumerate(secrets)
        for form in (secret.lower().encode(), secret.encode().hex().encode(), quote(secret).lower().encode())
        if form in lowered
    ][:5]


async def tables(url: str) -> dict[str, bytes]:
    """Every row of every table that is not PostgreSQL's own, as text."""
    connection = await asyncpg.connect(url)
    try:
        names = await connection.fetch(
            "SELECT format('%I.%I', schemaname, tablename) AS name FROM pg_tables"
            " WHERE schemaname NOT IN ('pg_catalog', 'information_schema') AND schemaname NOT LIKE 'pg\\_temp%'"
        )
        content = {}
        for (name,) in names:
            rows = await connection.fetch(f"SELECT t::text AS row FROM {name} t")
            content[name] = "\n".join(row["row"] or "" for row in rows).encode()
        return content
    finally:
        await connection.close()


async def records(stage: Stage) -> list[bytes]:
    connection = await asyncpg.connect(stage.parts.superuser_url)
    try:
        _, log = await open_generation(connection, LogSettings(log_url=stage.parts.log_url), client_id="test")
    finally:
        await connection.close()
    try:
        return [body for bodies in (await read_all(log)).values() for body in bodies]
    finally:
        await log.close()


def landed(stage: Stage) -> bool:
    async def look() -> bool:
        connection = await asyncpg.connect(stage.parts.superuser_url)
        try:
            return bool(await connection.fetchval("SELECT count(*) > 0 FROM text_readings WHERE value LIKE '%last%'"))
        finally:
            await connection.close()

    return asyncio.run(look())


def test_no_secret_stays_anywhere(stage: Stage) -> None:
    left: list[str] = []
    with (
        role(stage.environment, "ingest", "--listen", "127.0.0.1:0") as ingest,
        role(stage.environment, "worker") as worker,
        role(stage.environment, "api", "--listen", "127.0.0.1:0") as api,
    ):
        roles = {"ingest": ingest, "worker": worker, "api": api}
        send_bodies(stage, ingest)
        send_targets(stage, ingest, api)
        send_junk(stage, ingest, api)
        send_while_broken(stage, ingest, api)
        last = {"measurements": [{"type": "note", "value": "the last one"}]}
        eventually("readings are taken again", lambda: stage.post(ingest, last, stage.tokens["device"]) == 202, 60.0)
        eventually("everything has landed", lambda: landed(stage), 60.0)
        for name, running in roles.items():
            left += found_in(f"metrics of {name}", ask(f"{running.metrics_url}/metrics").body, stage.secrets)
            left += found_in(f"readiness of {name}", ask(f"{running.metrics_url}/health/ready").body, stage.secrets)
        said = {name: json.dumps(running.lines, ensure_ascii=False).encode() for name, running in roles.items()}
    for name, lines in said.items():
        assert b'"ready"' in lines
        assert b"a request failed" not in lines
        left += found_in(f"log of {name}", lines, stage.secrets)
    for number, answer in enumerate(stage.answers):
        left += found_in(f"answer {number}", answer, stage.secrets)
    content = asyncio.run(tables(stage.parts.superuser_url))
    assert len(content["public.quarantine"].splitlines()) > 50
    assert b"***" in content["public.text_readings"]
    assert b"***" in content["public.series"]
    for table, rows in content.items():
        left += found_in(f"table {table}", rows, stage.secrets)
    bodies = asyncio.run(records(stage))
    assert len(bodies) > 100
    left += found_in("the log's records", b"".join(bodies), stage.secrets)
    left += found_in("what the servers logged", stage.parts.written().encode(), stage.secrets)
    for file in Path(stage.environment["SLUICE_DATA_DIR"]).rglob("*"):
        if file.is_file():
            left += found_in(str(file), file.read_bytes(), stage.secrets)
    assert left == []

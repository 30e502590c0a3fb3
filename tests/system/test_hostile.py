"""Thousands of hostile requests: none is a fault of ours, and a good device is served meanwhile.

Every request is made from a seed, so that a failure comes again. Left out: bodies and queries by themselves, which
Hypothesis makes in the tests of the formats.
"""

import asyncio
import gzip
import json
import logging
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import uvloop
import zstandard

from runtime.secrets import make_token
from tests.databases import Server
from tests.ingest_rig import Face, Installation, Tenant, head_of, install, measured, post_bytes
from tests.landing_rig import until

SEED = 20_261_121
ATTACKERS = 8
ATTACKS = 500
SILENCE_S = 0.05
HONEST = {200, 202, 204, 400, 401, 403, 404, 405, 408, 413, 415, 422}


@pytest.fixture(scope="module")
def fortress(
    timescaledb: Server, timescaledb_template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Installation]:
    yield from install(timescaledb, timescaledb_template, tmp_path_factory.mktemp("hostile"))


class Attacker:
    """Makes requests that are wrong somewhere, or not at all, from a source of randomness of its own."""

    def __init__(self, seed: int, tenant: Tenant) -> None:
        self._random = random.Random(seed)
        self._tenant = tenant
        self.secret = tenant.token[8:].encode()

    def request(self) -> bytes:
        raw = self._pick(self._post, self._get, self._receipt, self._packed, self._chunked, self._head)()
        return self._damaged(raw) if self._random.random() < 0.3 else raw

    def pause_s(self) -> float:
        """Now and then a request comes in two pieces."""
        return self._random.choice([0.0] * 9 + [0.005])

    def cut(self, raw: bytes) -> int:
        return self._random.randrange(len(raw) + 1)

    def _pick(self, *choices: Any) -> Any:
        return self._random.choice(choices)

    def _token(self) -> str:
        good = self._tenant
        return str(
            self._pick(
                good.token, good.token, good.token, good.gateway, good.api_key, make_token("ds_live_"),
                good.token[:-1], good.token + "x", good.token.swapcase(), "", "\x7f", "é" * 10, "%00", "A" * 3000,
            )
        )  # fmt: skip

    def _text(self) -> str:
        return str(
            self._pick(
                "", "a", "temperature", "x" * 70, "\0", "\ud800", "é☃", "${ev.tC}", "nan", "\u202e", "' OR 1=1",
                "2026-11-01T08:00:00Z", "9" * 50, self._tenant.token, "\x1b[31m", "fridge", "-1e309", "value",
            )
        )  # fmt: skip

    def _json(self, depth: int = 0) -> Any:
        kind = self._random.randrange(9 if depth < 4 else 6)
        if kind < 6:
            return self._pick(
                None, True, 0, -1, 2**53 + 1, 10**60, 10**300, 0.1, float("nan"), float("inf"), 1e308, self._text(),
            )  # fmt: skip
        if kind < 7:
            return [self._json(depth + 1) for _ in range(self._random.randrange(4))]
        names = ["type", "value", "label", "unit", "ts", "device", "measurements", self._text()]
        return {self._pick(*names): self._json(depth + 1) for _ in range(self._random.randrange(5))}

    def _measurement(self) -> Any:
        if self._random.random() < 0.2:
            return self._json()
        fields = {
            "type": self._pick("temperature", "co2", "mine", self._text()),
            "value": self._pick(21.5, self._json()),
        }
        for name in ("label", "unit", "ts"):
            if self._random.random() < 0.3:
                fields[name] = self._pick(self._json(), self._text(), time.time() - self._random.random() * 1e6)
        return fields

    def _body(self) -> bytes:
        if self._random.random() < 0.2:
            return bytes(self._pick(self._random.randbytes(100), b"", b"[" * 2000, b"\xff\xfe", b"{" * 50, b"[]"))
        one = {"measurements": [self._measurement() for _ in range(self._random.randrange(6))]}
        if self._random.random() < 0.3:
            one[self._pick("device", "ts", "measurements", "x")] = self._json()
        content = self._pick(one, [one, one], self._json(), [self._json()])
        return json.dumps(content, ensure_ascii=self._pick(True, False)).encode("utf-8", "surrogatepass")

    def _headers(self) -> dict[str, str]:
        chance = self._random.random()
        if chance < 0.8:
            return {}
        return dict(
            self._pick(
                {"Content_Type": self._pick("text/html", "", "application/json;" * 100)},
                {"Content_Encoding": self._pick("br", "gzip", "zstd", "x", "")},
                {"X_Device_Id": self._pick("fridge", "é", "\x01", "x" * 500, "")},
                {"Prefer": self._pick("wait=stored", "wait", ";;;")},
                {"Expect": self._pick("100-continue", "x")},
                {"Connection": self._pick("close", "upgrade", "x")},
                {"Upgrade": "h2c", "Connection": "Upgrade"},
                {"Transfer_Encoding": self._pick("chunked", "gzip, chunked", "x")},
                {"Content_Length": self._pick("-1", "0", "5", "1e5", "9" * 30, "4000001", "")},
                {"Authorization": self._pick("Basic x", "Bearer", "", self._tenant.token)},
            )
        )

    def _post(self) -> bytes:
        return post_bytes(self._token(), self._body(), **self._headers())

    def _packed(self) -> bytes:
        body = self._body()
        encoding, packed = self._pick(
            ("gzip", gzip.compress(body)), ("zstd", zstandard.compress(body)), ("gzip", gzip.compress(body)[:-3]),
            ("zstd", body), ("gzip", gzip.compress(body) * 20), ("zstd", zstandard.compress(bytes(5_000_000))),
            ("gzip", gzip.compress(bytes(100_000))),
        )  # fmt: skip
        return post_bytes(self._token(), packed, Content_Encoding=encoding)

    def _chunked(self) -> bytes:
        body = self._body()
        size = self._pick(b"%x" % len(body), b"%x" % (len(body) + 1), b"zz", b"-1", b"f" * 20, b"")
        head = head_of("POST", "/v1/ingest", self._token(), Transfer_Encoding="chunked")
        end = self._pick(b"0\r\n\r\n", b"0\r\n", b"\r\n", b"")
        return bytes(head + size + b"\r\n" + body + b"\r\n" + end)

    def _get(self) -> bytes:
        names = ["temp", "hum", "ts", "device", "token", "id", "battery", self._text()]
        values = ["21.5", "nan", "${ev.tC}", "%00", "%ff", "+", "%", "1e999", self._text()]
        pairs = [f"{self._pick(*names)}={self._pick(*values)}" for _ in range(self._random.randrange(5))]
        if self._random.random() < 0.02:
            pairs *= 50
        query = self._pick("&", "?", "&&", ";").join(pairs)
        base = self._pick(
            "/v1/ingest?token={}&", "/v1/ingest/shelly/{}?", "/v1/ingest/shelly/{}&", "/v1/ingest/{}?", "{}"
        )
        return self._target(
            self._pick("GET", "GET", "GET", "HEAD", "OPTIONS", "PUT"), base.format(self._token()) + query
        )

    def _receipt(self) -> bytes:
        text = self._pick("x", "A" * 80, self._random.randbytes(60).hex(), "%00", "../ingest", "")
        return self._target("GET", f"/v1/receipts/{text}")

    def _target(self, method: str, target: str) -> bytes:
        line = f"{method} {target} HTTP/1.1\r\nHost: test\r\n".encode("utf-8", "surrogatepass")
        return line + f"Authorization: Bearer {self._tenant.token}\r\n\r\n".encode()

    def _head(self) -> bytes:
        return bytes(
            self._pick(
                self._random.randbytes(200), b"GET / HTTP/1.1\r\n\r\n", b"\r\n" * 50,
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET " + b"/" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
                b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n", b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
                b"GET / HTTP/1.1\r\nHost: a\r\n" + b"A: b\r\n" * 80 + b"\r\n", b"\x16\x03\x01\x00\xa5\x01",
                b"GET http://x/v1/ingest HTTP/1.1\r\nHost: x\r\n\r\n", b"GET / HTTP/0.9\r\n\r\n",
            )
        )  # fmt: skip

    def _damaged(self, raw: bytes) -> bytes:
        at = self.cut(raw)
        junk = self._random.randbytes(self._random.randrange(1, 4))
        return bytes(
            self._pick(raw[:at] + junk + raw[at:], raw[:at] + junk + raw[at + len(junk) :], raw[:at], raw + junk)
        )


async def attack(face: Face, attacker: Attacker, seen: Counter[int]) -> None:
    for _ in range(ATTACKS):
        raw = attacker.request()
        async with face.connect() as wire:
            with suppress(ConnectionError, asyncio.IncompleteReadError, TimeoutError):
                async with asyncio.timeout(SILENCE_S):  # what is cut off has no answer before its time is over
                    cut = attacker.cut(raw)
                    await wire.send(raw[:cut])
                    await asyncio.sleep(attacker.pause_s())
                    await wire.send(raw[cut:])
                    reply = await wire.reply(to_head=raw.startswith(b"HEAD"))
                seen[reply.status] += 1
                assert reply.status in HONEST, (reply, raw)
                assert attacker.secret not in reply.body, (reply, raw)


def faults(face: Face) -> dict[str, float]:
    """Answers of 5xx that the face counted, seen by the attackers or not."""
    face.service._publish()
    counted = [
        sample
        for metric in face.registry.collect()
        for sample in metric.samples
        if sample.name == "sluice_ingest_requests_total"
    ]
    return {one.labels["status"]: one.value for one in counted if one.labels["status"] >= "500"}


async def serve_good(face: Face, tenant: Tenant, stop: asyncio.Event) -> tuple[int, float]:
    """A device that sends a reading every few milliseconds; how many, and the longest it waited."""
    sent, longest_s = 0, 0.0
    async with face.connect() as wire:
        while not stop.is_set():
            began = time.monotonic()
            reply = await wire.ask(post_bytes(tenant.token, measured(("co2", sent))))
            longest_s = max(longest_s, time.monotonic() - began)
            assert (reply.status, reply.json()["accepted"]) == (202, 1)
            sent += 1
            await asyncio.sleep(0.005)
    return sent, longest_s


def test_no_hostile_request_is_a_fault_of_ours_or_anybody_elses(
    fortress: Installation, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        tenant, victim = await fortress.tenant(), await fortress.tenant()
        seen: Counter[int] = Counter()
        stop = asyncio.Event()
        async with fortress.face(wait_stored_s=0.01, http_body_timeout_s=0.5) as face:
            good = asyncio.create_task(serve_good(face, victim, stop))
            attackers = [Attacker(SEED + number, tenant) for number in range(ATTACKERS)]
            await asyncio.gather(*(attack(face, attacker, seen) for attacker in attackers))
            stop.set()
            sent, longest_s = await good
            assert sent > 50
            assert longest_s < 2.0
            assert sum(seen.values()) > 0.7 * ATTACKERS * ATTACKS
            assert {202, 400, 401, 403, 404, 405, 413, 415, 422} <= set(seen)
            values = [record.channels[0].unpack_values() for record in await face.records_of(victim.device)]
            assert values == [(float(number),) for number in range(sent)]
            assert faults(face) == {}
            await until(lambda: _quiet(face))

        for secret in (tenant.token, tenant.gateway, tenant.api_key, victim.token):
            assert secret[8:] not in caplog.text
        assert [record for record in caplog.records if record.levelno > logging.INFO] == []

    with caplog.at_level("DEBUG"), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # as the roles run
        runner.run(asyncio.wait_for(test(), 60))


async def _quiet(face: Face) -> bool:
    return face.server.count() == 0 and face.service._room.taken == 0

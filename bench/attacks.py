"""Hostile requests, each made from a seed so that a finding comes again. Left out: sending them (`bench.hostile`).

Some are wrong somewhere (head, token, encoding, body, time), some are no HTTP at all, and some are perfectly good.
"""

import gzip
import json
import random
import time
from dataclasses import dataclass
from typing import Any, Final

import zstandard

from runtime.secrets import make_token

DAMAGED_SHARE: Final = 0.3
PAUSED_SHARE: Final = 0.1
PAUSE_S: Final = 0.005
DAY_S: Final = 86_400


@dataclass(frozen=True)
class Stolen:
    """Valid tokens of one organisation in the wrong hands."""

    device: str
    gateway: str
    api_key: str


class Attacker:
    """Makes requests from a source of randomness of its own; the clock alone differs between runs of one seed."""

    def __init__(self, seed: int, stolen: Stolen) -> None:
        self._random = random.Random(seed)
        self._stolen = stolen
        self.secret = stolen.device[8:].encode()
        """What no answer may hold."""

    def request(self) -> bytes:
        posts, gets = [self._post] * 6, [self._get] * 2
        raw = self._pick(*posts, *gets, self._receipt, self._packed, self._chunked, self._head)()
        return self._damaged(raw) if self._random.random() < DAMAGED_SHARE else raw

    def pause_s(self) -> float:
        """Now and then a request comes in two pieces."""
        return PAUSE_S if self._random.random() < PAUSED_SHARE else 0.0

    def cut(self, raw: bytes) -> int:
        return self._random.randrange(len(raw) + 1)

    def _pick(self, *choices: Any) -> Any:
        return self._random.choice(choices)

    # ------------------------------------------------------------ parts of a request

    def _token(self) -> str:
        good = self._stolen
        return str(
            self._pick(
                *[good.device] * 12, good.gateway, good.gateway, good.api_key, make_token("ds_live_"),
                good.device[:-1], good.device + "x", good.device.swapcase(), "", "\x7f", "é" * 10, "%00", "A" * 3000,
            )
        )  # fmt: skip

    def _text(self) -> str:
        return str(
            self._pick(
                "", "a", "temperature", "x" * 70, "\0", "\ud800", "é☃", "${ev.tC}", "nan", "\u202e", "' OR 1=1",
                "2026-11-01T08:00:00Z", "9" * 50, self._stolen.device, "\x1b[31m", "fridge", "-1e309", "value",
            )
        )  # fmt: skip

    def _time(self) -> Any:
        now = time.time()
        return self._pick(
            now, now - self._random.random() * 1e6, int(now * 1e3), int(now * 1e9), now + 700, 0, -1,
            now - 4000 * DAY_S, 3.1, 1e308, -1e308, 10**30, "1970-01-01T00:00:00Z", "9999-12-31T23:59:60Z",
            "0000-00-00T00:00:00Z",
            "2026-11-01T08:00:00+99:99", "2026-11-01T08:00:00." + "9" * 500 + "Z", "2026-W45-1", "now", "", "NaN",
            True, {}, [now], "2026-11-01 08:00", "2026-02-30T00:00:00Z", "−5", "١٢٣",
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
        for name in ("label", "unit"):
            if self._random.random() < 0.3:
                fields[name] = self._pick(self._json(), self._text(), f"{self._random.random()}")
        if self._random.random() < 0.4:
            fields["ts"] = self._time()
        return fields

    def _body(self) -> bytes:
        if self._random.random() < 0.2:
            return bytes(
                self._pick(
                    self._random.randbytes(100), b"", b"[" * 2000, b"\xff\xfe", b"{" * 50, b"[]", b"[" * 100_000,
                    b'{"measurements":[{"type":"a","value":' + b"[" * 990 + b"]" * 990 + b"}]}", b" " * 5000 + b"{}",
                    b'{"measurements":[' + b"{}," * 20_000 + b"{}]}", b"9" * 5000, b'{"a":' * 700 + b"1" + b"}" * 700,
                )
            )  # fmt: skip
        one = {"measurements": [self._measurement() for _ in range(self._random.randrange(6))]}
        if self._random.random() < 0.3:
            one[self._pick("device", "measurements", "x")] = self._json()
        if self._random.random() < 0.2:
            one["ts"] = self._time()
        content = self._pick(one, one, one, one, [one, one], self._json(), [self._json()])
        return json.dumps(content, ensure_ascii=self._pick(True, False)).encode("utf-8", "surrogatepass")

    def _headers(self) -> dict[str, str]:
        if self._random.random() < 0.8:
            return {}
        return dict(
            self._pick(
                {"Content-Type": self._pick("text/html", "", "application/json;" * 100)},
                {"Content-Encoding": self._pick("br", "gzip", "zstd", "x", "")},
                {"X-Device-Id": self._pick("fridge", "é", "\x01", "x" * 500, "")},
                {"Prefer": self._pick("wait=stored", "wait", ";;;", "respond-async")},
                {"Idempotency-Key": self._pick("a", '"a"', "x" * 5000, "é", "", self._stolen.device)},
                {"X-Forwarded-For": self._pick("10.0.0.1", "x", "1.2.3.4, " * 300, "::1%x", "")},
                {"Expect": self._pick("100-continue", "x")},
                {"Connection": self._pick("close", "upgrade", "x")},
                {"Upgrade": "h2c", "Connection": "Upgrade"},
                {"Transfer-Encoding": self._pick("chunked", "gzip, chunked", "x")},
                {"Content-Length": self._pick("-1", "0", "5", "1e5", "9" * 30, "4000001", "")},
                {"Authorization": self._pick("Basic x", "Bearer", "", self._stolen.device)},
            )
        )

    # ------------------------------------------------------------ requests

    def _post(self) -> bytes:
        return post(self._token(), self._body(), self._headers())

    def _packed(self) -> bytes:
        body = self._body()
        encoding, packed = self._pick(
            ("gzip", gzip.compress(body)), ("zstd", zstandard.compress(body)), ("gzip", gzip.compress(body)[:-3]),
            ("zstd", body), ("gzip", gzip.compress(body) * 20), ("zstd", zstandard.compress(bytes(5_000_000))),
            ("gzip", gzip.compress(bytes(100_000))), ("zstd", zstandard.compress(body)[:-1]), ("gzip", body),
        )  # fmt: skip
        return post(self._token(), packed, {"Content-Encoding": encoding})

    def _chunked(self) -> bytes:
        body = self._body()
        size = self._pick(b"%x" % len(body), b"%x" % (len(body) + 1), b"zz", b"-1", b"f" * 20, b"")
        start = head("POST", "/v1/ingest", self._token(), {"Transfer-Encoding": "chunked"})
        end = self._pick(b"0\r\n\r\n", b"0\r\n", b"\r\n", b"")
        return bytes(start + size + b"\r\n" + body + b"\r\n" + end)

    def _get(self) -> bytes:
        names = ["temp", "hum", "ts", "device", "token", "id", "battery", self._text()]
        values = ["21.5", "nan", "${ev.tC}", "%00", "%ff", "+", "%", "1e999", self._text(), str(self._time())]
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
        return line + f"Authorization: Bearer {self._stolen.device}\r\n\r\n".encode()

    def _head(self) -> bytes:
        return bytes(
            self._pick(
                self._random.randbytes(200), b"GET / HTTP/1.1\r\n\r\n", b"\r\n" * 50,
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET " + b"/" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
                b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n", b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
                b"GET / HTTP/1.1\r\nHost: a\r\n" + b"A: b\r\n" * 80 + b"\r\n", b"\x16\x03\x01\x00\xa5\x01",
                b"GET http://x/v1/ingest HTTP/1.1\r\nHost: x\r\n\r\n", b"GET / HTTP/0.9\r\n\r\n",
                b"POST /v1/ingest HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
                b"POST /v1/ingest HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
                b"GET //[:::]/ HTTP/1.1\r\nHost: a\r\n\r\n", b"GET http://[x HTTP/1.1\r\nHost: a\r\n\r\n",
                b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 20_000 + b"\r\n\r\n", b"GET\t/\tHTTP/1.1\r\n\r\n",
            )
        )  # fmt: skip

    def _damaged(self, raw: bytes) -> bytes:
        at = self.cut(raw)
        junk = self._random.randbytes(self._random.randrange(1, 4))
        return bytes(
            self._pick(raw[:at] + junk + raw[at:], raw[:at] + junk + raw[at + len(junk) :], raw[:at], raw + junk)
        )


def head(method: str, target: str, token: str, headers: dict[str, str]) -> bytes:
    fields = {"Host": "test"} | ({"Authorization": f"Bearer {token}"} if token else {}) | headers
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"{method} {target} HTTP/1.1\r\n{lines}\r\n".encode()


def post(token: str, body: bytes, headers: dict[str, str]) -> bytes:
    fields = {"Content-Type": "application/json", "Content-Length": str(len(body))} | headers
    return head("POST", "/v1/ingest", token, fields) + body

"""How answers go out: packed, in pieces, or not at all since the client has them. Operations of the tests' own."""

import asyncio
import gzip
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import zstandard
from aiohttp import ClientError, ClientSession
from prometheus_client import CollectorRegistry

from api.access.door import Door
from api.access.settings import AccessSettings
from api.faces import FACES, PLATFORM
from api.http.accepting import best_encoding, best_type
from api.http.edge import create_app
from api.http.operations import PUBLIC, Call, Nothing, Reply, operation, operations_of, unchanged
from api.http.repeats import Repeats
from api.metrics import ApiMetrics
from api.serving import ApiFace
from api.settings import ApiSettings
from runtime.addresses import Proxies
from runtime.http.cors import Origins
from runtime.http.server import HttpServer, HttpSettings
from runtime.secrets import new_ring
from runtime.sockets import address_of, listen
from tests.support import run

TEXT = b'{"text": "' + b"spam and eggs, " * 200 + b'"}'
ENDS = b"-end"


class Fails(msgspec.Struct, kw_only=True):
    """When a stream fails."""

    after: int | None = None
    type: str = "application/x-ndjson"
    pieces: int = 3


class Probe:
    """Operations that anybody may call."""

    def __init__(self) -> None:
        self.computed = 0
        self.closed = 0

    @operation(PLATFORM, "GET", "/large", PUBLIC, versioned=True)
    async def large(self, call: Call[Nothing, Nothing, Nothing]) -> Reply[Any]:
        """More than a kilobyte"""
        return Reply(TEXT, version="7", headers={"Vary": "Accept"})

    @operation(PLATFORM, "GET", "/lock", PUBLIC)
    async def lock(self, call: Call[Nothing, Nothing, Nothing]) -> Reply[Any]:
        """What has a version for those who change it, and says more than that is of"""
        return Reply(TEXT, version="7")

    @operation(PLATFORM, "GET", "/small", PUBLIC)
    async def small(self, call: Call[Nothing, Nothing, Nothing]) -> Reply[Any]:
        """Less"""
        return Reply(b"{}")

    @operation(PLATFORM, "GET", "/picture", PUBLIC, content_type="image/png")
    async def picture(self, call: Call[Nothing, Nothing, Nothing]) -> Reply[Any]:
        """What is packed already"""
        return Reply(TEXT)

    @operation(PLATFORM, "GET", "/costly", PUBLIC, versioned=True)
    async def costly(self, call: Call[Nothing, Nothing, Nothing]) -> Reply[Any]:
        """What is computed for those alone who do not have it"""
        if call.known("7"):
            return unchanged("7")
        self.computed += 1
        return Reply(TEXT, version="7")

    @operation(PLATFORM, "PUT", "/large", PUBLIC)
    async def change(self, call: Call[Nothing, Nothing, Nothing]) -> list[str]:
        """The versions of `If-Match`"""
        return list(call.versions or ())

    @operation(PLATFORM, "GET", "/stream", PUBLIC, versioned=True)
    async def stream(self, call: Call[Nothing, Fails, Nothing]) -> Reply[Any]:
        """Pieces, and then an end or a failure"""
        return Reply(self._pieces(call.query), content_type=call.query.type, version="8")

    async def _pieces(self, query: Fails) -> AsyncIterator[bytes]:
        try:
            for number in range(query.pieces):
                if number == query.after:
                    raise OSError("the database is away")
                yield TEXT
            yield ENDS
        finally:
            self.closed += 1


class Server:
    """The probe, served; `get` gives status, headers and body as they came."""

    def __init__(self, url: str, session: ClientSession, probe: Probe) -> None:
        self.url = url
        self.session = session
        self.probe = probe

    async def get(self, path: str, method: str = "GET", **headers: str) -> tuple[int, Any, bytes]:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.session.request(method, f"{self.url}{path}", headers=sent) as answer:
            return answer.status, answer.headers, await answer.read()


@asynccontextmanager
async def served(**http: Any) -> AsyncIterator[Server]:
    metrics, ring, probe = ApiMetrics(CollectorRegistry()), new_ring(), Probe()
    pool: Any = None  # nobody has to be let in
    door = Door(pool, ring, ApiSettings(), AccessSettings())
    operations = operations_of(probe)
    origins = Origins(("https://app.example.org",))
    app = create_app(operations, door.authority, Repeats(ring), Proxies(()), FACES, origins, metrics)
    app.on_cleanup.append(door.close)
    face = ApiFace(app, metrics)
    await face.start()
    listener = listen("TEST", "127.0.0.1:0")
    server = HttpServer(listener, face.handler, HttpSettings(**http), face.refuse, face.request_factory)
    await server.start()
    try:
        headers = {"Accept-Encoding": ""}
        async with ClientSession(auto_decompress=False, headers=headers) as session:
            yield Server(f"http://{address_of(listener)}", session, probe)
    finally:
        await server.stop(5)
        await face.stop()


def unpacked(encoding: str | None, body: bytes) -> bytes:
    if encoding == "gzip":
        return gzip.decompress(body)
    return zstandard.ZstdDecompressor().decompressobj().decompress(body) if encoding == "zstd" else body


@pytest.mark.parametrize(
    ("accepted", "encoding"),
    [
        ("", None),
        ("gzip", "gzip"),
        ("zstd", "zstd"),
        ("gzip, deflate, br, zstd", "zstd"),
        ("gzip;q=1.0, zstd;q=0.5", "gzip"),
        ("gzip;q=0", None),
        ("br", None),
        ("*", "zstd"),
        ("identity, gzip;q=0.1", None),
        ("GZIP ; Q=0.8", "gzip"),
        ("gzip;q=2", None),
    ],
)
def test_answers_are_packed_as_the_client_takes_them(accepted: str, encoding: str | None) -> None:
    async def test() -> None:
        async with served() as it:
            for path, whole in (("/large", TEXT), ("/stream", 3 * TEXT + ENDS)):
                status, headers, body = await it.get(path, Accept_Encoding=accepted)
                assert (status, headers.get("Content-Encoding")) == (200, encoding)
                assert unpacked(encoding, body) == whole
                assert (len(body) < len(whole) / 4) == (encoding is not None)
                assert "Accept-Encoding" in headers["Vary"]
            assert (await it.get("/large", Accept_Encoding=accepted))[1]["Vary"] == "Accept, Origin, Accept-Encoding"

    run(test())


def test_what_is_small_or_packed_or_has_to_arrive_at_once_is_not_packed() -> None:
    async def test() -> None:
        async with served() as it:
            for path in ("/small", "/picture", "/stream?type=text/event-stream"):
                _, headers, _ = await it.get(path, Accept_Encoding="gzip")
                assert "Content-Encoding" not in headers, path
                assert "Accept-Encoding" not in headers["Vary"], path

    run(test())


def test_a_known_version_is_not_sent_again() -> None:
    async def test() -> None:
        async with served() as it:
            for path, version in (("/large", "7"), ("/stream", "8")):
                for held in (f'"{version}"', f'W/"{version}"', f'"1", "{version}"', "*"):
                    status, headers, body = await it.get(path, If_None_Match=held)
                    assert (status, body, "Content-Type" in headers) == (304, b"", False), held
                    assert headers["ETag"] == ("W/" if held.startswith("W/") else "") + f'"{version}"'
                for held in ('"70"', "", f"{version}0"):
                    assert (await it.get(path, If_None_Match=held))[0] == 200
            for path in ("/small", "/lock"):
                assert (await it.get(path, If_None_Match='"7"'))[0] == 200

    run(test())


def test_a_handler_may_know_before_it_computes() -> None:
    async def test() -> None:
        async with served() as it:
            _, headers, _ = await it.get("/costly")
            assert (await it.get("/costly", If_None_Match=headers["ETag"]))[0] == 304
            assert it.probe.computed == 1

    run(test())


def test_a_packed_answer_has_a_tag_of_its_own_that_means_the_same_version() -> None:
    async def test() -> None:
        async with served() as it:
            _, headers, _ = await it.get("/large", Accept_Encoding="gzip")
            tag = headers["ETag"]
            assert tag != '"7"'
            status, headers, _ = await it.get("/large", Accept_Encoding="gzip", If_None_Match=tag)
            assert (status, headers["ETag"]) == (304, tag)
            assert (await it.get("/large", "PUT", If_Match=tag))[2] == b'["7"]'

    run(test())


def test_a_stream_that_fails_has_no_end(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with served() as it:
            for accepted in ("", "gzip", "zstd"):
                for after in (0, 2):
                    path = f"/stream?after={after}"
                    # Before the head is out or after it: no client takes what came for the whole.
                    with pytest.raises(ClientError):
                        await it.get(path, Accept_Encoding=accepted)
                    assert caplog.records[-1].message == "an answer broke off"
                    assert caplog.records[-1].__dict__["reason"] == "the database is away"
            assert (await it.get("/stream"))[2].endswith(ENDS)

    run(test())


def test_a_stream_ends_with_its_client() -> None:
    """One that stops reading is cut after a while, and what makes the pieces is told."""

    async def test() -> None:
        async with served(http_unread_timeout_s=0.2) as it:
            async with it.session.get(f"{it.url}/stream?pieces=100000") as answer:
                await answer.content.readany()
                while not it.probe.closed:  # noqa: ASYNC110 -- nobody else knows
                    await asyncio.sleep(0.01)
                with pytest.raises(ClientError):
                    await answer.read()
            assert (await it.get("/stream"))[0] == 200

    run(test())


def test_the_head_alone_takes_no_piece() -> None:
    async def test() -> None:
        async with served() as it:
            status, headers, body = await it.get("/stream", "HEAD")
            assert (status, headers["Content-Type"], body) == (200, "application/x-ndjson", b"")
            assert it.probe.closed == 0
            assert (await it.get("/small"))[0] == 200

    run(test())


# ---------------------------------------------------------------- negotiation

FORMS = ["application/json", "text/csv", "text/html"]


@pytest.mark.parametrize(
    ("accepted", "kind"),
    [
        ("", "application/json"),
        ("*/*", "application/json"),
        ("text/csv", "text/csv"),
        ("Text/CSV; header=present", "text/csv"),
        ("text/*", "text/csv"),
        ("text/csv;q=0.5, application/json;q=0.6", "application/json"),
        ("text/csv, application/json", "text/csv"),
        ("*/*, text/html", "text/html"),
        ("text/*;q=0.9, text/csv;q=0, */*;q=0.1", "text/html"),
        ("image/png", None),
        ("application/json;q=0", None),
        ("application/json;q=0, */*", "text/csv"),
        (",;,", "application/json"),
        ("application/json;q=nonsense", "application/json"),
    ],
)
def test_the_form_is_what_the_client_wants_most(accepted: str, kind: str | None) -> None:
    assert best_type(accepted, FORMS) == kind


@pytest.mark.parametrize(
    ("accepted", "encoding"),
    [("identity;q=0, *;q=0.5", "zstd"), ("gzip;q=0.5, *;q=0", "gzip"), ("identity;q=0.5, gzip;q=0.4", None)],
)
def test_ranges_of_encodings(accepted: str, encoding: str | None) -> None:
    assert best_encoding(accepted, ("zstd", "gzip")) == encoding

"""TLS on a listener: who is let in, what is bounded before a handshake is over, and a renewed certificate."""

import asyncio
import contextlib
import logging
import os
import socket
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
import uvloop
from aiohttp import web

from runtime.errors import ConfigurationError
from runtime.http.answers import Answer
from runtime.http.refusals import Reason
from runtime.http.server import HttpServer, HttpSettings
from runtime.sockets import listen
from runtime.tls import TlsSettings, server_tls
from tests.certificates import Authority, Files

HOST = "localhost"
GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


def run(test: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # as the roles run
        runner.run(asyncio.wait_for(test, 120))


async def until(check: Callable[[], bool]) -> None:
    while not check():  # noqa: ASYNC110 - nothing tells of it
        await asyncio.sleep(0.01)


class Served:
    """A server whose every answer is `hello`, once `hold` is set."""

    def __init__(self, port: int, authority: Authority) -> None:
        self.port = port
        self.hold = asyncio.Event()
        self.hold.set()
        self.asked = 0
        self.content = b'"hello"'
        self.refused: Counter[Reason] = Counter()
        self.server: HttpServer
        self._authority = authority

    async def handle(self, _: web.BaseRequest) -> web.StreamResponse:
        self.asked += 1
        await self.hold.wait()
        return Answer(200, self.content, "1")

    def client(self, mine: Files | None = None) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self._authority.file)
        if mine is not None:
            context.load_cert_chain(mine.certificate, mine.key)
        return context

    @contextlib.asynccontextmanager
    async def connect(
        self, context: ssl.SSLContext | None = None, source: str = "127.0.0.1"
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_connection(
            "127.0.0.1",
            self.port,
            ssl=context or self.client(),
            server_hostname=HOST,
            local_addr=(source, 0),
        )
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    @contextlib.asynccontextmanager
    async def bare(
        self, source: str = "127.0.0.1"
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """A TCP connection that has said nothing yet."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, local_addr=(source, 0))
        try:
            yield reader, writer
        finally:
            writer.transport.abort()


@contextlib.asynccontextmanager
async def served(
    authority: Authority, tls: TlsSettings | None, exempt: tuple[Any, ...] = (), **settings: Any
) -> AsyncIterator[Served]:
    listener = listen("TEST", "127.0.0.1:0")
    face = Served(listener.getsockname()[1], authority)
    face.server = HttpServer(
        listener,
        face.handle,
        HttpSettings(**settings),
        lambda status, path: Answer(status, b"{}", "1"),
        tls=None if tls is None else server_tls(tls),
        exempt=exempt,
        refused=lambda reason: face.refused.update((reason,)),
    )
    await face.server.start()
    try:
        yield face
    finally:
        face.hold.set()
        await face.server.stop(0.5)


async def answered(streams: tuple[asyncio.StreamReader, asyncio.StreamWriter], raw: bytes = GET) -> bytes:
    """The status line and body of the answer."""
    reader, writer = streams
    writer.write(raw)
    head = await reader.readuntil(b"\r\n\r\n")
    return head.split(b"\r\n")[0][9:12] + b" " + await reader.readexactly(7 if b" 200 " in head else 2)


async def ended(reader: asyncio.StreamReader) -> bool:
    try:
        return await reader.read(1) == b""
    except OSError:
        return True


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def tls(authority: Authority) -> TlsSettings:
    files = authority.sign("server", HOST)
    return TlsSettings(tls_certificate_file=files.certificate, tls_key_file=files.key)


# ---------------------------------------------------------------- connections


def test_requests_go_over_tls_1_2_and_later(authority: Authority, tls: TlsSettings) -> None:
    async def test() -> None:
        async with served(authority, tls) as face:
            for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
                context = face.client()
                context.minimum_version = context.maximum_version = version
                async with face.connect(context) as streams:
                    for _ in range(3):
                        assert await answered(streams) == b'200 "hello"'
                    assert face.server.count() == 1
            old = _lowered(face.client())
            with pytest.raises(OSError):
                await face.connect(old).__aenter__()
            server = face.server._tls
            assert server is not None
            _lowered(server.context)  # it was this alone that kept it out
            async with face.connect(old) as streams:
                assert streams[1].get_extra_info("ssl_object").version() == "TLSv1.1"
            async with face.bare() as (reader, writer):
                writer.write(GET)  # plain HTTP
                with contextlib.suppress(ConnectionError):
                    assert b"HTTP/" not in await reader.read()
            await until(lambda: face.server.count() == 0)

    run(test())


def _lowered(context: ssl.SSLContext) -> ssl.SSLContext:
    """Speaking TLS 1.1 as well, which nobody should."""
    context.set_ciphers("DEFAULT@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.minimum_version = ssl.TLSVersion.TLSv1_1
    if not context.check_hostname:
        return context
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    return context


def test_a_request_that_comes_with_the_end_of_the_handshake_is_answered(
    authority: Authority, tls: TlsSettings
) -> None:
    async def test() -> None:
        async with served(authority, tls) as face:
            for _ in range(50):
                incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
                client = face.client().wrap_bio(incoming, outgoing, server_hostname=HOST)
                async with face.bare() as (reader, writer):
                    while True:
                        try:
                            client.do_handshake()
                            break
                        except ssl.SSLWantReadError:
                            writer.write(outgoing.read())
                            incoming.write(await reader.read(65536))
                    client.write(GET)
                    writer.write(outgoing.read())  # our Finished and the request in one piece
                    got = b""
                    while b"hello" not in got:
                        with contextlib.suppress(ssl.SSLWantReadError):
                            got += client.read()
                            continue
                        incoming.write(await reader.read(65536))

    run(test())


def test_a_client_without_a_certificate_of_the_authority_is_not_let_in(
    tmp_path: Path, authority: Authority, tls: TlsSettings
) -> None:
    (tmp_path / "other").mkdir()
    stranger = Authority(tmp_path / "other").sign("client", "client")
    mine = authority.sign("client", "client")

    async def test() -> None:
        settings = TlsSettings(
            tls_certificate_file=tls.tls_certificate_file,
            tls_key_file=tls.tls_key_file,
            tls_client_ca_file=authority.file,
        )
        async with served(authority, settings) as face:
            async with face.connect(face.client(mine)) as streams:
                assert await answered(streams) == b'200 "hello"'
            for files in (None, stranger):
                with pytest.raises((OSError, asyncio.IncompleteReadError)):  # TLS 1.3 tells after the client's end
                    async with face.connect(face.client(files)) as streams:
                        await answered(streams)
            assert face.asked == 1

    run(test())


# ---------------------------------------------------------------- bounds


def test_handshakes_that_never_end_are_ended_and_give_their_places_back(
    authority: Authority, tls: TlsSettings
) -> None:
    async def test() -> None:
        settings = TlsSettings(
            tls_certificate_file=tls.tls_certificate_file,
            tls_key_file=tls.tls_key_file,
            tls_handshake_timeout_s=3.0,
        )
        async with served(authority, settings, http_connections_max=3) as face:
            before = _sockets()
            async with face.bare() as silent, face.bare() as halting, face.bare():
                halting[1].write(b"\x16\x03\x01\x02\x00\x01")
                async with face.bare() as fourth:  # three handshakes under way are all there may be
                    assert await ended(fourth[0])
                assert face.refused == {"connections": 1}
                assert await ended(silent[0])
                assert await ended(halting[0])
                door: Any = face.server._door
                await until(lambda: door.under_way == 0)
                assert face.refused == {"connections": 1, "handshake": 3}
            async with face.connect() as one, face.connect() as two, face.connect() as three:
                for streams in (one, two, three):
                    assert await answered(streams) == b'200 "hello"'
                async with face.bare() as fourth:
                    assert await ended(fourth[0])
            await until(lambda: face.server.count() == 0)
            await until(lambda: _sockets() <= before)

    run(test())


def _sockets() -> int:
    """Open ones of this process."""
    links = [os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    return sum(os.path.islink(link) and os.readlink(link).startswith("socket:") for link in links)


@pytest.mark.parametrize("secure", [True, False], ids=["tls", "plain"])
def test_one_address_has_no_more_connections_than_its_bound(
    authority: Authority, tls: TlsSettings, secure: bool
) -> None:
    async def test() -> None:
        exempt = (ip_network("127.0.0.3/32"),)
        async with served(authority, tls if secure else None, exempt, http_connections_per_address_max=2) as face:

            def connect(source: str) -> Any:
                return face.connect(source=source) if secure else face.bare(source)

            async with connect("127.0.0.1") as one, connect("127.0.0.1") as two:
                for streams in (one, two):
                    assert await answered(streams) == b'200 "hello"'
                async with face.bare() as third:
                    assert await ended(third[0])
                async with connect("127.0.0.2") as other:
                    assert await answered(other) == b'200 "hello"'
                async with connect("127.0.0.3") as a, connect("127.0.0.3") as b, connect("127.0.0.3") as c:
                    for streams in (a, b, c):
                        assert await answered(streams) == b'200 "hello"'
                assert await answered(one) == b'200 "hello"'
            await until(lambda: face.server.count() == 0)
            for _ in range(5):
                async with connect("127.0.0.1") as again:
                    assert await answered(again) == b'200 "hello"'
                await until(lambda: face.server.count() == 0)
            assert face.refused == {"address": 1}

    run(test())


def test_a_slow_head_is_ended_over_tls_too(authority: Authority, tls: TlsSettings) -> None:
    async def test() -> None:
        async with (
            served(authority, tls, http_head_timeout_s=0.5, http_idle_timeout_s=3.0) as face,
            face.connect() as slow,
            face.connect() as idle,
        ):
            assert await answered(slow, GET[:-4]) == b"408 {}"
            assert await ended(slow[0])
            assert await ended(idle[0])
            assert face.refused == {"head": 1}

    run(test())


@pytest.mark.parametrize("secure", [True, False], ids=["tls", "plain"])
def test_a_client_that_does_not_read_is_let_go(authority: Authority, tls: TlsSettings, secure: bool) -> None:
    async def test() -> None:
        async with served(authority, tls if secure else None, http_unread_timeout_s=0.3) as face:
            face.content = bytes(1_000_000)
            async with face.connect() if secure else face.bare() as (reader, writer):
                reader._transport.pause_reading()  # type: ignore[attr-defined]
                writer.write(GET * 100)
                await until(lambda: face.asked > 0)
                await until(lambda: face.server.count() == 0)
                assert face.asked < 100
            assert face.refused == {"unread": 1}

    run(test())


# ---------------------------------------------------------------- the end


def test_what_is_in_flight_over_tls_is_answered_when_it_stops(authority: Authority, tls: TlsSettings) -> None:
    async def test() -> None:
        async with (
            served(authority, tls) as face,
            face.connect() as asking,
            face.connect() as idle,
            face.bare() as new,
        ):
            face.hold.clear()
            answer = asyncio.create_task(answered(asking))
            await until(lambda: face.asked == 1)
            stop = asyncio.create_task(face.server.stop(10.0))
            await asyncio.sleep(0.1)
            # Whoever is in the middle of a handshake is answered as well.
            secure = asyncio.create_task(_handshake(face, new))
            late = asyncio.create_task(answered(idle))
            await until(lambda: face.asked >= 2)
            face.hold.set()
            assert await answer == b'200 "hello"'
            assert await late == b'200 "hello"'
            assert b"hello" in await secure
            await stop
            assert face.server.count() == 0
            with pytest.raises(ConnectionRefusedError):
                await face.bare().__aenter__()

    run(test())


async def _handshake(face: Served, streams: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> bytes:
    reader, writer = streams
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = face.client().wrap_bio(incoming, outgoing, server_hostname=HOST)
    got, written = b"", False
    while b"hello" not in got:
        try:
            if not written:
                client.do_handshake()
                client.write(GET)
                written = True
            else:
                got += client.read()
        except ssl.SSLWantReadError:
            writer.write(outgoing.read())
            incoming.write(await reader.read(65536))
    return got


def test_a_silent_peer_does_not_hold_the_stop_up(authority: Authority, tls: TlsSettings) -> None:
    async def test() -> None:
        async with served(authority, tls) as face, face.bare(), face.connect() as mute:
            mute[0]._transport.pause_reading()  # type: ignore[attr-defined]
            loop = asyncio.get_running_loop()
            began = loop.time()
            await face.server.stop(60.0)
            assert loop.time() - began < 40  # drained, as all of that would have been 48

    run(test())


# ---------------------------------------------------------------- certificates


def test_a_renewed_certificate_is_shown_without_a_restart(
    authority: Authority, tls: TlsSettings, caplog: pytest.LogCaptureFixture
) -> None:
    settings = TlsSettings(
        tls_certificate_file=tls.tls_certificate_file, tls_key_file=tls.tls_key_file, tls_reload_s=0.1
    )

    key = Path(tls.tls_key_file)

    async def shown(face: Served) -> Any:
        async with face.connect() as (_, writer):
            return writer.get_extra_info("peercert")["serialNumber"]

    async def test() -> None:
        async with served(authority, settings) as face, face.connect() as old:
            first = await shown(face)
            key.write_text("half written")  # noqa: ASYNC240
            with caplog.at_level(logging.ERROR):
                await until(lambda: "no good" in caplog.text)
            assert await shown(face) == first
            authority.sign("server", HOST)
            while await shown(face) == first:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            assert await answered(old) == b'200 "hello"'

    run(test())


def test_files_that_do_not_fit_are_named(tmp_path: Path, authority: Authority, tls: TlsSettings) -> None:
    good = Files(tls.tls_certificate_file, tls.tls_key_file)
    other = authority.sign("other", HOST)
    locked = authority.sign("locked", HOST, passphrase=b"geheim")
    junk = str(tmp_path / "junk")
    Path(junk).write_text("no PEM")
    cases: list[tuple[dict[str, str], str]] = [
        ({"certificate": "/not/there", "key": good.key}, "SLUICE_TLS_CERTIFICATE_FILE=/not/there cannot be read"),
        ({"certificate": good.certificate, "key": "/not/there"}, "SLUICE_TLS_KEY_FILE=/not/there cannot be read"),
        ({"certificate": good.certificate, "key": other.key}, "SLUICE_TLS_KEY_FILE=.*is not the key of"),
        ({"certificate": locked.certificate, "key": locked.key}, "SLUICE_TLS_KEY_FILE=.*encrypted"),
        ({"certificate": junk, "key": good.key}, "SLUICE_TLS_CERTIFICATE_FILE=.*PEM"),
        ({"certificate": good.certificate, "key": junk}, "SLUICE_TLS_KEY_FILE=.*PEM"),
        ({"certificate": good.certificate}, "SLUICE_TLS_KEY_FILE names a key"),
        ({"key": good.key}, "SLUICE_TLS_KEY_FILE is set, but SLUICE_TLS_CERTIFICATE_FILE is not"),
        ({"client_ca": authority.file}, "SLUICE_TLS_CLIENT_CA_FILE is set, but SLUICE_TLS_CERTIFICATE_FILE is not"),
        ({"certificate": good.certificate, "key": good.key, "client_ca": junk}, "SLUICE_TLS_CLIENT_CA_FILE=.*PEM"),
        ({"certificate": good.certificate, "key": good.key, "client_ca": "/no"}, "SLUICE_TLS_CLIENT_CA_FILE=/no"),
    ]
    for files, message in cases:
        with pytest.raises(ConfigurationError, match=message):
            server_tls(TlsSettings(**{f"tls_{name}_file": file for name, file in files.items()}))  # type: ignore[arg-type]


def test_a_key_may_stand_in_the_file_of_its_certificate(tmp_path: Path, tls: TlsSettings) -> None:
    both = tmp_path / "both.pem"
    both.write_text(Path(tls.tls_certificate_file).read_text() + Path(tls.tls_key_file).read_text())
    assert server_tls(TlsSettings(tls_certificate_file=str(both))) is not None
    assert server_tls(TlsSettings()) is None


def test_a_listener_that_runs_out_of_descriptors_accepts_again(
    authority: Authority, tls: TlsSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with served(authority, tls) as face:
            door: Any = face.server._door
            listener = door._listener
            refused: list[int] = []

            class Full:
                """What the kernel says while there is no descriptor left."""

                def accept(self) -> tuple[socket.socket, Any]:
                    if len(refused) < 2:
                        refused.append(1)
                        raise OSError(24, "Too many open files")
                    return listener.accept()  # type: ignore[no-any-return]

                def __getattr__(self, name: str) -> Any:
                    return getattr(listener, name)

            monkeypatch.setattr(door, "_listener", Full())
            async with face.connect() as streams:
                assert await answered(streams) == b'200 "hello"'
            assert len(refused) == 2

    run(test())

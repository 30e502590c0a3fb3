"""The listener of probes and metrics: what it answers, over plain HTTP and TLS, and what it tells of refusals."""

import asyncio
import contextlib
import ssl
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY

from runtime.errors import ConfigurationError
from runtime.health import Health
from runtime.http.server import HttpSettings
from runtime.metrics import MetricsServer, MetricsSettings, metrics_tls
from runtime.sockets import address_of, listen
from runtime.tls import ServerTls, TlsSettings
from tests.certificates import Authority, Files
from tests.support import Answer, ask, run

NAME = "sluice_http_refused_connections_total"


@contextlib.asynccontextmanager
async def serving(health: Health, tls: ServerTls | None = None, **settings: Any) -> AsyncIterator[str]:
    """Where it is served."""
    with listen("TEST", "127.0.0.1:0") as listener:
        server = MetricsServer(listener, health, settings=HttpSettings(**settings), tls=tls)
        address = address_of(listener)
        await server.start()
        try:
            yield f"{'https' if tls else 'http'}://{address}"
        finally:
            await server.stop()


async def told(url: str, **options: Any) -> Answer:
    return await asyncio.to_thread(ask, url, **options)


async def told_securely(url: str, context: ssl.SSLContext) -> int:
    """The status; 0 for nobody who answers."""

    def ask_once() -> int:
        try:
            with urllib.request.urlopen(url, timeout=60, context=context) as answer:
                return int(answer.status)
        except OSError:
            return 0

    return await asyncio.to_thread(ask_once)


def refused(reason: str) -> float | None:
    return REGISTRY.get_sample_value(NAME, {"listener": "metrics", "reason": reason})


def settings_of(files: Files, client_ca: str = "") -> MetricsSettings:
    return MetricsSettings(
        metrics_tls_certificate_file=files.certificate,
        metrics_tls_key_file=files.key,
        metrics_tls_client_ca_file=client_ca,
    )


def test_probes_and_metrics_are_served() -> None:
    async def test() -> None:
        health = Health()
        forget = health.register("log", lambda: "it is away")
        async with serving(health) as url:
            assert (await told(f"{url}/health/live")).json() == {"live": True}
            ready = await told(f"{url}/health/ready")
            assert (ready.status, ready.json()) == (503, {"ready": False, "not_ready": {"log": "it is away"}})
            forget()
            health.note("spool", lambda: "ø records")
            ready = await told(f"{url}/health/ready")
            assert ready.status == 200
            assert ready.json() == {"ready": True, "not_ready": {}, "notes": {"spool": "ø records"}}
            metrics = await told(f"{url}/metrics")
            assert metrics.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            assert f'{NAME}{{listener="metrics",reason="handshake"}}'.encode() in metrics.body
            assert (await told(f"{url}/else")).status == 404
            posted = await told(f"{url}/metrics", method="POST", body=b"x")
            assert (posted.status, posted.headers["Allow"]) == (405, "GET, HEAD")
            head = await told(f"{url}/metrics", method="HEAD")
            assert (head.status, head.body) == (200, b"")

    run(test())


def test_with_a_certificate_it_speaks_tls_only_and_takes_up_a_renewed_one(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    files = authority.sign("metrics", "127.0.0.1")
    tls = metrics_tls(settings_of(files), TlsSettings(tls_reload_s=0.1))
    context = ssl.create_default_context(cafile=authority.file)

    async def shown(address: str) -> bytes | None:
        host, _, port = address.partition(":")
        _, writer = await asyncio.open_connection(host, int(port), ssl=context)
        try:
            found: bytes | None = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
            return found
        finally:
            writer.close()

    async def test() -> None:
        async with serving(Health(), tls) as url:
            address = url.removeprefix("https://")
            assert await told_securely(f"{url}/health/live", context) == 200
            before = refused("handshake")
            assert before is not None
            assert (await told(f"http://{address}/health/live")).status == 0
            assert refused("handshake") == before + 1
            first = await shown(address)
            authority.sign("metrics", "127.0.0.1")
            while await shown(address) == first:
                pass

    run(test())


def test_only_clients_of_the_authority_may_look(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    files, mine = authority.sign("metrics", "127.0.0.1"), authority.sign("prometheus", "prometheus")
    tls = metrics_tls(settings_of(files, authority.file), TlsSettings())

    async def test() -> None:
        stranger = ssl.create_default_context(cafile=authority.file)
        known = ssl.create_default_context(cafile=authority.file)
        known.load_cert_chain(mine.certificate, mine.key)
        async with serving(Health(), tls) as url:
            assert await told_securely(f"{url}/metrics", known) == 200
            assert await told_securely(f"{url}/metrics", stranger) == 0

    run(test())


def test_files_that_do_not_fit_are_named_by_their_own_settings(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    files, other = authority.sign("metrics", "127.0.0.1"), authority.sign("other", "127.0.0.1")
    for settings, name in (
        (settings_of(Files(str(tmp_path / "none"), files.key)), "SLUICE_METRICS_TLS_CERTIFICATE_FILE="),
        (settings_of(Files(files.certificate, other.key)), "SLUICE_METRICS_TLS_KEY_FILE="),
        (settings_of(Files("", files.key)), "SLUICE_METRICS_TLS_KEY_FILE is set, but SLUICE_METRICS_TLS_CERT"),
        (settings_of(files, files.key), "SLUICE_METRICS_TLS_CLIENT_CA_FILE="),
    ):
        with pytest.raises(ConfigurationError, match=f"^{name}"):
            metrics_tls(settings, TlsSettings())
    # The devices' certificate is not shown here by itself.
    assert metrics_tls(MetricsSettings(), TlsSettings(tls_certificate_file=files.certificate)) is None


def test_connections_are_bounded_and_refusals_counted() -> None:
    async def test() -> None:
        async with serving(Health(), http_connections_max=1) as url:
            host, _, port = url.removeprefix("http://").partition(":")
            before = refused("connections")
            assert before is not None
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            await reader.readuntil(b'{"live":true}')
            assert (await told(f"{url}/health/live")).status == 0
            assert refused("connections") == before + 1
            writer.close()

    run(test())

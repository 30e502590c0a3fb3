"""`sluice up`: every role in one process, on a PostgreSQL and a log of its own in a data directory.

A database or a log that the settings name is used instead of its own. Left out: what each role does (`deploy.roles`).
"""

import asyncio
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from api.serving import beside, refusing_beside
from deploy.embedded import EmbeddedPostgres
from deploy.operating import login, print_demo
from deploy.operator import seed
from deploy.process import Process
from deploy.roles.api import end_streams_first, make_api
from deploy.roles.bridge import bridge_to
from deploy.roles.ingest import make_ingest, way_in
from deploy.roles.role import serve
from deploy.roles.worker import work_on
from deploy.settings import HTTP_VARIABLE, SETTINGS_FILE, DeploySettings, http_address, load, public_url
from ingest.mqtt.metrics import BridgeMetrics
from ingest.settings import IngestSettings
from runtime.errors import ConfigurationError
from runtime.log.port import Log
from runtime.mqtt import MqttSettings
from runtime.secrets import KeyRing, SecretSettings, TokenHasher, kept_keys
from runtime.settings import CONFIG_VARIABLE, Settings
from runtime.sockets import Address, address_of, listen
from runtime.tls import TlsSettings, server_tls

_log = logging.getLogger("sluice.up")

KEYS_FILE: Final = "secret-keys"
#: Made once the first tokens were printed: until then a start makes new ones.
SHOWN_FILE: Final = "tokens-shown"

Overrides = dict[str, object]


def with_port(settings: Settings, port: int) -> str:
    """The address of SLUICE_HTTP_LISTEN on another port."""
    return str(Address(http_address(settings).host, port))


async def run_up(settings: Settings, overrides: Overrides, stop: asyncio.Event) -> None:
    """Everything, until told to stop. `overrides` are what the command line set."""
    directory = _make_directory(settings.get(DeploySettings).data_dir)
    server_tls(settings.get(TlsSettings))  # a bad certificate is told before anything is made
    with _alone_in(directory), listen(HTTP_VARIABLE, settings.get(IngestSettings).http_listen) as listener:
        postgres = _own_postgres(settings, directory)
        try:
            if postgres is not None:
                await postgres.start()
            own = _own_parts(settings, directory, postgres, address_of(listener))
            process = Process("up", load({**own, **overrides}), stop)
            await process.serve(lambda process: _start(process, directory, listener, postgres))
        finally:
            if postgres is not None:
                await postgres.stop()


async def _start(
    process: Process, directory: Path, listener: socket.socket, postgres: EmbeddedPostgres | None
) -> None:
    if postgres is not None:
        process.run_beside("PostgreSQL", postgres.ended())
    process.ignore_hangup()
    await process.expose(0)
    await process.prepare_database(may_change=True)
    ring = KeyRing.parse(process.settings.get(SecretSettings).secret_keys)
    _, log = await process.log()

    async def opened() -> Log:
        return log

    api, live = await make_api(process, ring, address_of(listener), None, opened)
    metrics = BridgeMetrics()
    common = await way_in(process, metrics)
    ingest = await make_ingest(process, log, ring, common)
    if process.settings.get(MqttSettings).mqtt_url:
        bridge = await bridge_to(process, log, ring, common, metrics)
        process.health.note("broker", lambda: bridge.trouble)  # what comes by HTTP does not need it
    await work_on(process, log)
    handler = beside(ingest.serves, ingest.handle, api.handler)
    refuse = refusing_beside(ingest.serves, ingest.refuse, api.refuse)
    server = await serve(process, listener, handler, refuse, api.request_factory)
    end_streams_first(process, live)
    ingest.connections = server.count
    await _show_demo(process.settings, directory, TokenHasher(ring), listener, renew=postgres is not None)


async def _show_demo(
    settings: Settings, directory: Path, hasher: TokenHasher, listener: socket.socket, *, renew: bool
) -> None:
    shown = directory / SHOWN_FILE
    connection = await login(settings)
    try:
        demo = await seed(connection, hasher, renew=renew and not shown.exists())
    finally:
        await connection.close()
    print_demo(settings, demo, public_url(settings, address_of(listener)), config=directory / SETTINGS_FILE)
    shown.touch()


# ---------------------------------------------------------------- the data directory


def _make_directory(name: str) -> Path:
    """Private to us, as everything in it; PostgreSQL's user may pass through to its own part."""
    os.umask(0o077)
    directory = Path(name).absolute()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(0o711 if os.geteuid() == 0 else 0o700)
    except OSError as error:
        raise ConfigurationError(f"SLUICE_DATA_DIR={directory} cannot be used: {error}") from error
    return directory


@contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    with (directory / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigurationError(
                f"SLUICE_DATA_DIR={directory} is in use by another `sluice up`: end that, or use another directory"
            ) from None
        yield


def _own_postgres(settings: Settings, directory: Path) -> EmbeddedPostgres | None:
    """None where the settings name a database; they may not hide one that the directory holds already."""
    own = EmbeddedPostgres(directory)
    if not _is_set(settings, directory, "SLUICE_DATABASE_URL"):
        return own
    if own.exists:
        raise ConfigurationError(
            f"SLUICE_DATA_DIR={directory} holds a database of its own, and SLUICE_DATABASE_URL names another: "
            "unset that, or use another directory"
        )
    return None


def _own_parts(settings: Settings, directory: Path, postgres: EmbeddedPostgres | None, address: Address) -> Overrides:
    """Settings of the parts in the directory; a file with them lets other commands reach this one's."""
    own: Overrides = {"data_dir": str(directory)}
    if not _is_set(settings, directory, "SLUICE_SECRET_KEYS"):
        own["secret_keys"] = kept_keys(directory / KEYS_FILE)
    if not _is_set(settings, directory, "SLUICE_LOG_URL"):
        own["log_url"] = f"sqlite:///{directory / 'log'}"
    if not _is_set(settings, directory, "SLUICE_API_URL"):
        own["api_url"] = public_url(settings, address)  # one listener has both faces
    if postgres is not None:
        own |= {"database_url": postgres.url("sluice"), "database_owner_url": postgres.url("sluice_owner")}
    draft = directory / f".{SETTINGS_FILE}"
    draft.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in own.items()))
    draft.replace(directory / SETTINGS_FILE)
    return own


def _is_set(settings: Settings, directory: Path, variable: str) -> bool:
    """Whether somebody chose a value; what an earlier start here wrote down is no choice."""
    (one,) = [one for one in settings.listing if one.variable == variable]
    config = os.environ.get(CONFIG_VARIABLE)
    ours = one.origin == "file" and config and Path(config).absolute() == directory / SETTINGS_FILE
    return one.origin != "default" and bool(one.value) and not ours

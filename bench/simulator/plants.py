"""Plants as their owner makes them: found or created, provisioned, their packages opened, their tokens renewed.

All of it over the HTTP API. Left out: what they do then (`bench.simulator.device`).
"""

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, NamedTuple, Protocol
from uuid import UUID

from bench.errors import BenchError
from bench.simulator.speech import Identity
from runtime.mqtt import Address, Endpoint
from schemas.plants import PACKAGE_HOURS, AuthMethod, Lifecycle

PATH: Final = ("api", "v1", "plants")
PAGE: Final = 100
#: By which a later run knows its plants again; nobody else's are touched.
MARK: Final[Mapping[str, object]] = {"simulated": True}
_EARLY_S: Final = 300.0


class Ask(Protocol):
    """Sends a request to the API, and gives the JSON that it answers; blocks. Raises `SluiceError` for a refusal."""

    def __call__(self, method: str, *path: str, body: object = None, **query: object) -> Any: ...


class Broker(NamedTuple):
    """Where plants find the broker, if not where their packages say."""

    address: Address
    cafile: str | None
    """Whom it is vouched for by, beside whom the packages name."""


@dataclass
class Plant:
    """A plant with its package, as the installer has brought it."""

    identity: Identity
    method: AuthMethod
    address: Address
    password: str | None
    token_ends_s: float = 0.0
    """Unix seconds; of a TOKEN plant's token."""

    @property
    def endpoint(self) -> Endpoint:
        if self.method is AuthMethod.MTLS:
            return Endpoint(self.address, None, None)
        return Endpoint(self.address, str(self.identity.plant), self.password)


class Api:
    """The Plants face for a fleet; one request at a time, since a login that has ended is renewed once."""

    def __init__(self, ask: Ask, organisation: UUID, broker: Broker | None) -> None:
        self._ask_now = ask
        self._organisation = organisation
        self._broker = broker
        self._turn = asyncio.Lock()

    async def fleet(self, method: AuthMethod, count: int) -> AsyncIterator[Plant]:
        """So many plants that log in by `method`, those of an earlier run among them.

        Raises `BenchError` for one of them that may not connect.
        """
        found = await self._found(method)
        for number in range(1, count + 1):
            serial = f"SIM-{method}-{number}"
            yield await self._plant(method, serial, found.get(serial))

    async def renew(self, plant: Plant) -> None:
        """Another token; the one before is good no longer."""
        answer = await self._ask("POST", *PATH, str(plant.identity.plant), "mqtt-token")
        plant.password = answer["token"]
        plant.token_ends_s = datetime.fromisoformat(answer["expiresAt"]).timestamp()

    # ------------------------------------------------------------ parts

    async def _ask(self, method: str, *path: str, body: object = None, **query: object) -> Any:
        async with self._turn:
            return await asyncio.to_thread(self._ask_now, method, *path, body=body, **query)

    async def _found(self, method: AuthMethod) -> dict[str, Any]:
        """By serial number: those that a simulator has made."""
        rows: list[Any] = []
        page, pages = 1, 1
        while page <= pages:
            answer = await self._ask("GET", *PATH, page=page, limit=PAGE, authMethod=str(method))
            rows += answer["data"]
            page, pages = page + 1, answer["meta"]["totalPages"]
        return {row["serialNumber"]: row for row in rows if row["metadata"] == MARK}

    async def _plant(self, method: AuthMethod, serial: str, row: Any) -> Plant:
        if row is not None and row["lifecycleStatus"] == Lifecycle.SUSPENDED:
            raise BenchError(f"plant {row['id']} ({serial}) is suspended: reactivate it, or delete it")
        if row is not None and row["lifecycleStatus"] == Lifecycle.ACTIVE and _is_kept(row):
            return self._opened(await self._ask("GET", *PATH, row["id"], "provision", "download"))
        if row is not None and row["lifecycleStatus"] != Lifecycle.PENDING:
            await self._ask("DELETE", *PATH, row["id"])  # nobody has its keys any more
            row = None
        row = row or await self._create(method, serial)
        return self._opened(await self._ask("POST", *PATH, row["id"], "provision"))

    async def _create(self, method: AuthMethod, serial: str) -> Any:
        body = {
            "name": f"Simulated {serial}", "serialNumber": serial, "type": "GATEWAY", "authMethod": str(method),
            "metadata": MARK,
        }  # fmt: skip
        return await self._ask("POST", *PATH, body=body)

    def _opened(self, package: Any) -> Plant:
        security, mqtt = package["security"], package["mqtt"]
        method = AuthMethod(package["authMethod"])
        identity = Identity(UUID(package["plantId"]), self._organisation, bytes.fromhex(security["hmacSecret"]))
        if self._broker is None:
            address = Address(mqtt["broker"], mqtt["port"], ssl.create_default_context(cadata=security.get("caCert")))
        else:
            address = self._broker.address
        if method is AuthMethod.MTLS and address.tls is not None:
            address = address._replace(tls=_showing(security, None if self._broker is None else self._broker.cafile))
        return Plant(identity, method, address, security.get("password"))


def _is_kept(row: Any) -> bool:
    """Whether the package of an earlier run can be had once more, and for some minutes yet."""
    made = datetime.fromisoformat(row["activatedAt"]).timestamp()
    return time.time() < made + PACKAGE_HOURS * 3_600 - _EARLY_S


def _showing(security: Mapping[str, str], cafile: str | None) -> ssl.SSLContext:
    """TLS with a plant's certificate and key, which OpenSSL takes from files alone."""
    tls = ssl.create_default_context(cadata=security["caCert"])
    if cafile is not None:
        tls.load_verify_locations(cafile)
    with TemporaryDirectory(prefix="sluice-plant-") as directory:
        certificate, key = Path(directory, "certificate"), Path(directory, "key")
        certificate.write_text(security["clientCert"])
        key.write_text(security["clientKey"])
        tls.load_cert_chain(certificate, key)
    return tls

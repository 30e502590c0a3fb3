"""The role `broker`: whom the MQTT broker knows, kept equal to the registry; on the broker's host."""

import socket
from pathlib import Path
from typing import Final

from api.certificates.revocation import RevocationLists
from api.certificates.settings import CertificateSettings
from api.http.problems import Problem
from deploy.operating import login
from deploy.process import Process
from deploy.roles.role import Role
from runtime.errors import ConfigurationError, UnavailableError
from runtime.mqtt import endpoint
from runtime.postgres import PostgresSettings
from runtime.secrets import KeyRing, SecretSettings, TokenHasher
from runtime.settings import Settings
from workers.broker.keeper import VARIABLE, Keeper, OwnUser
from workers.broker.lists import ListFile, Lists
from workers.broker.metrics import BrokerMetrics
from workers.broker.planning import MARK
from workers.broker.settings import BrokerSettings

#: As `deploy/mosquitto/acl` names them.
KEEPER_USER: Final = "sluice-broker"
BRIDGE_USER: Final = "sluice-bridge"
COMMANDS_USER: Final = "sluice-commands"


async def current_lists(settings: Settings) -> Lists:
    """Of revoked certificates, made anew where that is due, as the API makes them.

    Raises `UnavailableError`, `ConfigurationError`.
    """
    ring = KeyRing.parse(settings.get(SecretSettings).secret_keys)
    connection = await login(settings)
    try:
        async with connection.transaction():
            await connection.execute("SET LOCAL ROLE sluice_app")
            found = await RevocationLists(ring, settings.get(CertificateSettings)).current(connection)
    except Problem as error:
        raise UnavailableError(error.message) from None
    finally:
        await connection.close()
    if not found:
        raise UnavailableError("there is no certificate authority: `sluice ca init`")
    return Lists("".join(one.pem for one in found), min(one.next_update for one in found))


def own_users(settings: Settings) -> dict[str, OwnUser]:
    """Bridges, command senders and who keeps the identities, as the settings know their passwords.

    Raises `ConfigurationError`.
    """
    broker = settings.get(BrokerSettings)
    keeper = endpoint(broker.broker_url, VARIABLE)
    if keeper.user != KEEPER_USER or not keeper.password:
        raise ConfigurationError(f"{VARIABLE} has to name the user {KEEPER_USER}, with a password")
    hasher = TokenHasher(KeyRing.parse(settings.get(SecretSettings).secret_keys))
    passwords = {
        KEEPER_USER: keeper.password,
        BRIDGE_USER: broker.broker_bridge_password,
        COMMANDS_USER: broker.broker_commands_password,
    }
    # The mark stands in a file of the broker's: without our keys nothing can be tried against it.
    return {
        name: OwnUser(MARK + hasher.digest(f"{name} {password}").hex()[:16], password)
        for name, password in passwords.items()
        if password
    }


def list_file(settings: Settings) -> ListFile | None:
    """None for a broker that takes no certificates. Raises `ConfigurationError` for half of what it needs."""
    broker = settings.get(BrokerSettings)
    if bool(broker.broker_crl_file) != bool(broker.broker_pid_file):
        raise ConfigurationError(
            "SLUICE_BROKER_CRL_FILE and SLUICE_BROKER_PID_FILE go together: the broker is told when its list is new"
        )
    if not broker.broker_crl_file:
        return None
    return ListFile(Path(broker.broker_crl_file), Path(broker.broker_pid_file), lambda: current_lists(settings))


def keep_broker(process: Process) -> None:
    """From now on, until the process ends. Raises `ConfigurationError`."""
    settings = process.settings
    keeper = Keeper(
        settings.get(PostgresSettings),
        settings.get(BrokerSettings),
        KeyRing.parse(settings.get(SecretSettings).secret_keys),
        own_users(settings),
        list_file(settings),
        BrokerMetrics(),
    )
    process.run_beside("broker", keeper.run())
    process.health.note("broker", lambda: keeper.trouble)


async def _work_broker(process: Process, listeners: list[socket.socket]) -> None:
    keep_broker(process)


BROKER: Final = Role("broker", 9466, lambda settings: 1, lambda settings: None, _work_broker)

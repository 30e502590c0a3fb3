"""The Plants face: what a plant connects with, given and taken away; its commands.

Left out: what that is (`api.registry.provisioning`).
"""

from datetime import timedelta
from typing import Final

from api.faces import PLANTS
from api.http.operations import Call, Example, Nothing, Reply, operation
from api.plants import examples
from api.plants.codes import BAD_PLANT, INVALID_UUID, ONE_CODE
from api.plants.operations import CHANGES, ONE, READS
from api.plants.shapes import (
    Command,
    Commands,
    CommandToSend,
    Meta,
    MqttToken,
    OnePlant,
    Paged,
    RotatedSecret,
    Said,
)
from api.problems import AUTHORITY_MISSING, CERTIFICATE_LIMIT, COMMAND_LIMIT, PLANT_NOT_FOUND, PLANT_REFUSED
from api.registry import commands, plants
from api.registry.commands import NewCommand
from api.registry.provisioning import Package, Provisioning
from api.settings import ApiSettings
from schemas.commands import Way
from schemas.plants import SECRET_GRACE_MINUTES, Lifecycle

_COMMANDS: Final = f"{ONE}/commands"


class PlantSecurityOperations:
    """What is asked of one plant under `/api/v1/plants/{id}`."""

    def __init__(self, provisioning: Provisioning, settings: ApiSettings) -> None:
        self._provisioning = provisioning
        self._timeout = timedelta(seconds=settings.command_timeout_s)
        self._open_max = settings.commands_open_max

    @operation(
        PLANTS, "POST", f"{ONE}/mqtt-token", CHANGES, missing=PLANT_NOT_FOUND, malformed=BAD_PLANT, codes=ONE_CODE,
        problems=[PLANT_REFUSED], example=Example(answer=examples.MQTT_TOKEN),
    )  # fmt: skip
    async def mqtt_token(self, call: Call[OnePlant, Nothing, Nothing]) -> MqttToken:
        """Issue a new MQTT JWT for a TOKEN-auth plant

        The plant's name at the broker is its id, the token its password. The one before is good no longer.
        """
        token = await self._provisioning.issue_token(call.connection, call.path.id)
        return MqttToken(token.expires_at, token.text)

    @operation(
        PLANTS, "POST", f"{ONE}/provision", CHANGES, missing=PLANT_NOT_FOUND, malformed=BAD_PLANT, codes=ONE_CODE,
        problems=[PLANT_REFUSED, AUTHORITY_MISSING, CERTIFICATE_LIMIT], repeatable=True,
        example=Example(answer=examples.PACKAGE),
    )  # fmt: skip
    async def provision(self, call: Call[OnePlant, Nothing, Nothing]) -> Package:
        """Generate provisioning package for a plant

        A PENDING plant becomes ACTIVE. The package is kept for a day, encrypted, for `provision/download`.
        """
        return await self._provisioning.provision(call.connection, call.path.id)

    @operation(
        PLANTS, "GET", f"{ONE}/provision/download", CHANGES, missing=PLANT_NOT_FOUND, malformed=BAD_PLANT,
        codes=ONE_CODE, problems=[PLANT_REFUSED], writes=True, example=Example(answer=examples.PACKAGE),
    )  # fmt: skip
    async def download_package(self, call: Call[OnePlant, Nothing, Nothing]) -> Reply[Package]:
        """Download provisioning package as JSON file

        For a day after it was made.
        """
        package = await self._provisioning.package(call.connection, call.path.id)
        name = f'attachment; filename="plant-{call.path.id}.json"'
        return Reply(package, headers={"Content-Disposition": name})

    @operation(
        PLANTS, "POST", f"{ONE}/reactivate", CHANGES, missing=PLANT_NOT_FOUND, malformed=BAD_PLANT, codes=ONE_CODE,
        problems=[PLANT_REFUSED], example=Example(answer=examples.SAID),
    )  # fmt: skip
    async def reactivate(self, call: Call[OnePlant, Nothing, Nothing]) -> Said:
        """Reactivate a suspended plant"""
        await self._provisioning.reactivate(call.connection, call.path.id)
        return Said("Plant reactivated")

    @operation(
        PLANTS, "POST", f"{ONE}/revoke", CHANGES, missing=PLANT_NOT_FOUND, malformed=BAD_PLANT, codes=ONE_CODE,
        problems=[PLANT_REFUSED], example=Example(answer=examples.SAID),
    )  # fmt: skip
    async def revoke(self, call: Call[OnePlant, Nothing, Nothing]) -> Said:
        """Revoke plant certificate and HMAC secret

        For good: the plant is DECOMMISSIONED, and so are its password, tokens and commands that were under way.
        """
        await self._provisioning.revoke(call.connection, call.path.id)
        return Said("Plant revoked")

    @operation(
        PLANTS, "POST", f"{ONE}/rotate-secret", CHANGES, missing=PLANT_NOT_FOUND, malformed=BAD_PLANT,
        codes=ONE_CODE, problems=[PLANT_REFUSED], repeatable=True, example=Example(answer=examples.ROTATED_SECRET),
    )  # fmt: skip
    async def rotate_secret(self, call: Call[OnePlant, Nothing, Nothing]) -> RotatedSecret:
        """Rotate plant HMAC secret (1h grace period for both old and new)"""
        secret = await self._provisioning.rotate_secret(call.connection, call.path.id)
        return RotatedSecret(SECRET_GRACE_MINUTES, secret)

    @operation(
        PLANTS, "POST", f"{ONE}/suspend", CHANGES, missing=PLANT_NOT_FOUND, malformed=BAD_PLANT, codes=ONE_CODE,
        problems=[PLANT_REFUSED], example=Example(answer=examples.SAID),
    )  # fmt: skip
    async def suspend(self, call: Call[OnePlant, Nothing, Nothing]) -> Said:
        """Suspend a plant (temporary disable)

        What it sends meanwhile goes to the quarantine.
        """
        await self._provisioning.suspend(call.connection, call.path.id)
        return Said("Plant suspended")

    @operation(
        PLANTS, "GET", _COMMANDS, READS, missing=PLANT_NOT_FOUND, malformed=INVALID_UUID,
        example=Example(answer=examples.COMMANDS),
    )  # fmt: skip
    async def plant_commands(self, call: Call[OnePlant, Paged, Nothing]) -> Commands:
        """List command history for a plant

        The newest first.
        """
        await plants.require_one(call.connection, call.path.id)
        rows, total = await commands.find(call.connection, call.path.id, call.query.offset, call.query.limit)
        return Commands([Command.of(row) for row in rows], Meta.of(call.query, total))

    @operation(
        PLANTS, "POST", _COMMANDS, CHANGES, status=201, missing=PLANT_NOT_FOUND, malformed=BAD_PLANT,
        codes=ONE_CODE, problems=[PLANT_REFUSED, COMMAND_LIMIT], repeatable=True,
        example=Example(examples.COMMAND_TO_SEND, examples.COMMAND),
    )  # fmt: skip
    async def send_command(self, call: Call[OnePlant, Nothing, CommandToSend]) -> Command:
        """Send a command to a plant via MQTT

        It is answered before it is sent: the history tells what became of it.
        """
        held = await plants.hold(call.connection, call.path.id)
        plants.require(held, "be sent a command", Lifecycle.ACTIVE)
        target = None if call.body.target is None else call.body.target.value
        new = NewCommand(call.body.command, call.body.payload, target, Way.PLANT)
        row = await commands.ask(
            call.connection, call.organisation, call.path.id, new, timeout=self._timeout, open_max=self._open_max
        )
        return Command.of(row)

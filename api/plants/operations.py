"""The Plants face: plants made, listed, shown, changed and removed. Left out: their security and commands."""

from datetime import UTC, datetime, timedelta
from typing import Any, Final

import msgspec

from api.access.scopes import DEVICES_READ, DEVICES_WRITE
from api.faces import PLANTS
from api.http.operations import Call, Example, Nothing, Reply, Role, needs, operation
from api.http.problems import FORBIDDEN, STALE, Problem
from api.plants import examples
from api.plants.codes import BAD_PLANT, INVALID_UUID, ONE_CODE
from api.plants.energy import energy_of_day
from api.plants.shapes import (
    AtRisk,
    CertificateStats,
    Energy,
    Listed,
    Meta,
    OnePlant,
    Plant,
    Plants,
    PlantToCreate,
    PlantToUpdate,
    Said,
    WholePlant,
)
from api.problems import PLANT_EXISTS, PLANT_NOT_FOUND, PLANT_REFUSED
from api.registry import plants, sites
from api.registry.plants import NewPlant
from api.settings import ApiSettings

PATH: Final = "/api/v1/plants"
ONE: Final = f"{PATH}/{{id}}"
READS: Final = needs(Role.VIEWER, DEVICES_READ)
CHANGES: Final = needs(Role.MEMBER, DEVICES_WRITE)
_AT_RISK_MAX: Final = 100


class PlantOperations:
    """`/api/v1/plants`."""

    def __init__(self, settings: ApiSettings) -> None:
        self._settings = settings
        self._renewal = timedelta(days=settings.plant_renewal_days)

    @operation(PLANTS, "GET", PATH, READS, example=Example(answer=examples.PLANTS))
    async def list_plants(self, call: Call[Nothing, Listed, Nothing]) -> Plants:
        """List all plants

        In the order in which they were created.
        """
        query = call.query
        rows, total = await plants.find(
            call.connection, call.organisation, query.auth_method, query.offset, query.limit
        )
        return Plants([Plant.of(row) for row in rows], Meta.of(query, total))

    @operation(
        PLANTS, "POST", PATH, CHANGES, status=201, problems=[PLANT_EXISTS], repeatable=True,
        example=Example(examples.PLANT_TO_CREATE, examples.PLANT),
    )  # fmt: skip
    async def create_plant(self, call: Call[Nothing, Nothing, PlantToCreate]) -> Reply[Plant]:
        """Create a new plant

        It is PENDING until it is provisioned. A serial number is one plant's of an organisation.
        """
        body = call.body
        new = NewPlant(body.name.value, body.serial_number.value, body.type, body.auth_method, body.metadata)
        plant = await plants.create(call.connection, call.organisation, new)
        row = await plants.get(call.connection, plant)
        return Reply(Plant.of(row), version=str(row["version"]), headers={"Location": f"{PATH}/{plant}"})

    @operation(PLANTS, "GET", f"{PATH}/certificate-stats", READS, example=Example(answer=examples.CERTIFICATE_STATS))
    async def certificate_stats(self, call: Call[Nothing, Nothing, Nothing]) -> CertificateStats:
        """Get mTLS certificate health statistics"""
        counts, at_risk = await plants.certificate_health(
            call.connection, call.organisation, self._renewal, _AT_RISK_MAX
        )
        return CertificateStats(**counts, at_risk_plants=[AtRisk.of(row) for row in at_risk])

    @operation(
        PLANTS, "GET", ONE, READS, missing=PLANT_NOT_FOUND, malformed=INVALID_UUID,
        example=Example(answer=examples.WHOLE_PLANT),
    )  # fmt: skip
    async def get_plant(self, call: Call[OnePlant, Nothing, Nothing]) -> Reply[WholePlant]:
        """Get plant by ID

        With its alerts and the groups of devices that it is in.
        """
        plant = call.path.id
        row = await plants.get(call.connection, plant)
        whole = WholePlant.whole(
            row, await plants.alerts(call.connection, plant), await plants.groups(call.connection, plant)
        )
        return Reply(whole, version=str(row["version"]))

    @operation(
        PLANTS, "PATCH", ONE, CHANGES, missing=PLANT_NOT_FOUND, malformed=BAD_PLANT, codes=ONE_CODE,
        problems=[PLANT_REFUSED, STALE], example=Example(examples.PLANT_TO_UPDATE, examples.PLANT),
    )  # fmt: skip
    async def update_plant(self, call: Call[OnePlant, Nothing, PlantToUpdate]) -> Reply[Plant]:
        """Update a plant

        What is absent stays. `authMethod` can be another only until the plant is provisioned. With `organizationId`
        all that the plant ever measured goes to that organisation; sites and groups that it was in stay behind.
        """
        plant, body = call.path.id, call.body
        if body.organization_id is not msgspec.UNSET and not call.caller.super_admin:
            raise Problem(FORBIDDEN, "a super-admin alone gives a plant to another organisation")
        if body.organization_id is not msgspec.UNSET:
            await sites.hold(call.connection)
        await plants.change(call.connection, plant, call.versions, body.values)
        if body.organization_id is not msgspec.UNSET:
            await plants.hand_over(call.connection, plant, body.organization_id)
        return await _found(call)

    @operation(
        PLANTS, "DELETE", ONE, CHANGES, missing=PLANT_NOT_FOUND, malformed=INVALID_UUID, problems=[STALE],
        example=Example(answer=examples.SAID),
    )  # fmt: skip
    async def delete_plant(self, call: Call[OnePlant, Nothing, Nothing]) -> Said:
        """Delete a plant

        It is cut off, and its serial number is free again. What it measured stays for the retention period.
        """
        await plants.remove(call.connection, call.path.id, call.versions)
        return Said("Plant deleted")

    @operation(
        PLANTS, "GET", f"{ONE}/energy/today", READS, missing=PLANT_NOT_FOUND, malformed=INVALID_UUID,
        example=Example(answer=examples.ENERGY),
    )  # fmt: skip
    async def energy_today(self, call: Call[OnePlant, Nothing, Nothing]) -> Energy:
        """Energy summary for the plant for today (UTC)

        From the counters `energy_produced`, `energy_imported` and `energy_exported`, in kWh.
        `selfConsumptionPct` is what of the production was not exported.
        """
        await plants.require_one(call.connection, call.path.id)
        return await energy_of_day(call.connection, call.path.id, datetime.now(UTC), self._settings)


async def _found(call: Call[OnePlant, Any, Any]) -> Reply[Plant]:
    row = await plants.get(call.connection, call.path.id)
    return Reply(Plant.of(row), version=str(row["version"]))

"""How a site's own devices come in over MQTT, as operations: their prefix, and the password that goes with it."""

from datetime import datetime
from typing import Annotated, Any, Final, Literal

import msgspec

from api.faces import SITES
from api.http.operations import Call, Example, Nothing, operation
from api.problems import SITE_BROKER_NOT_FOUND, SITE_NOT_FOUND
from api.registry import site_brokers
from api.registry.broker_passwords import Handovers
from api.sites.shapes import OfSite
from api.sites.sites import CHANGES, ONE, READS
from runtime.secrets import KeyRing

PATH: Final = f"{ONE}/mqtt"
TemperatureUnit = Annotated[
    Literal["C", "F"], msgspec.Meta(description="Of temperatures that come without a unit, as the devices are set.")
]
_SHOWN: Final[dict[str, Any]] = {
    "prefix": "k3vq7m2a",
    "username": "k3vq7m2a",
    "shellyGen1Prefix": "k3vq7m2a/",
    "shellyPrefix": "shellies/k3vq7m2a/",
    "tasmotaFullTopic": "%prefix%/k3vq7m2a/%topic%/",
    "temperatureUnit": "C",
    "issuedAt": "2026-02-18T10:00:00Z",
    "revokedAt": None,
}


class ChangedBroker(msgspec.Struct, rename="camel", forbid_unknown_fields=True):
    """What its devices are set to."""

    temperature_unit: TemperatureUnit


class SiteBroker(msgspec.Struct, rename="camel", kw_only=True):
    """What the site's devices are set to, so that their topics name the site; each adds a name of its own."""

    prefix: str
    username: str
    shelly_gen1_prefix: str
    """The custom MQTT prefix of Shelly's first generation begins so; the device's name follows."""
    shelly_prefix: str
    """The same of later generations."""
    tasmota_full_topic: str
    temperature_unit: TemperatureUnit
    issued_at: datetime
    revoked_at: datetime | None


class IssuedBroker(SiteBroker, rename="camel", kw_only=True):
    """The same with the password, which is shown this once."""

    password: str


class BrokerOperations:
    """`/api/organisations/{orgId}/sites/{siteId}/mqtt`."""

    def __init__(self, ring: KeyRing) -> None:
        self._handovers = Handovers(ring)

    @operation(
        SITES, "GET", PATH, READS, missing={"siteId": SITE_NOT_FOUND}, problems=[SITE_BROKER_NOT_FOUND],
        example=Example(answer=_SHOWN),
    )  # fmt: skip
    async def get_site_mqtt(self, call: Call[OfSite, Nothing, Nothing]) -> SiteBroker:
        """Get how a site's devices come in over MQTT"""
        return SiteBroker(**_shown(await site_brokers.get(call.connection, call.path.site_id)))

    @operation(
        SITES, "POST", f"{PATH}/password", CHANGES, missing=SITE_NOT_FOUND, repeatable=True,
        example=Example(answer=_SHOWN | {"password": "9dQ2…"}),
    )  # fmt: skip
    async def issue_site_mqtt_password(self, call: Call[OfSite, Nothing, Nothing]) -> IssuedBroker:
        """Issue a site's MQTT password

        It is shown this once; one from before ends. The prefix, which is the user name, stays the site's own.
        """
        site = call.path.site_id
        password = await site_brokers.issue(call.connection, self._handovers, call.organisation, site)
        return IssuedBroker(**_shown(await site_brokers.get(call.connection, site)), password=password)

    @operation(
        SITES, "PATCH", PATH, CHANGES, missing={"siteId": SITE_NOT_FOUND}, problems=[SITE_BROKER_NOT_FOUND],
        example=Example({"temperatureUnit": "F"}, _SHOWN | {"temperatureUnit": "F"}),
    )  # fmt: skip
    async def update_site_mqtt(self, call: Call[OfSite, Nothing, ChangedBroker]) -> SiteBroker:
        """Say in what a site's devices measure temperatures"""
        site = call.path.site_id
        await site_brokers.change(call.connection, site, call.body.temperature_unit)
        return SiteBroker(**_shown(await site_brokers.get(call.connection, site)))

    @operation(
        SITES, "DELETE", f"{PATH}/password", CHANGES, status=204, missing={"siteId": SITE_NOT_FOUND},
        problems=[SITE_BROKER_NOT_FOUND],
    )  # fmt: skip
    async def revoke_site_mqtt_password(self, call: Call[OfSite, Nothing, Nothing]) -> None:
        """Revoke a site's MQTT password

        Nobody publishes for the site until another is issued.
        """
        await site_brokers.revoke(call.connection, call.path.site_id)


def _shown(row: Any) -> dict[str, Any]:
    prefix = row["prefix"]
    return {
        "prefix": prefix,
        "username": prefix,
        "shelly_gen1_prefix": f"{prefix}/",
        "shelly_prefix": f"shellies/{prefix}/",
        "tasmota_full_topic": f"%prefix%/{prefix}/%topic%/",
        "temperature_unit": row["temperature_unit"],
        "issued_at": row["issued_at"],
        "revoked_at": row["revoked_at"],
    }

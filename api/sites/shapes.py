"""What the Sites face takes and gives, and how it is made from the registry's rows."""

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Final, Literal, Self
from uuid import UUID

import msgspec

from api.http.lists import LIMIT_MAX, CursorText, Limit
from api.http.spelt import STORABLE
from api.registry.sites import UTC, Location, NewSite, check_coordinates
from api.registry.texts import EdgeId, HardwareId, HostName, Name, PostalAddress, Slug, Version, Zone

Status = Literal["provisioning", "online", "offline"]
Latitude = Annotated[float, msgspec.Meta(ge=-90, le=90, description="Degrees north, WGS 84.")]
Longitude = Annotated[float, msgspec.Meta(ge=-180, le=180, description="Degrees east, WGS 84.")]
ProcessCount = Annotated[int, msgspec.Meta(ge=0, le=100_000)]
_NAMES: Final = ["latitude", "longitude"]
_KNOWN: Final = {"properties": {name: {"type": "number"} for name in _NAMES}}
_NONE: Final = {"properties": {name: {"type": "null"} for name in _NAMES}}
#: A place that is no object at all is none; of a union msgspec describes only what is said of the whole.
_BOTH: Final = {"allOf": [{"anyOf": [_KNOWN | {"required": _NAMES}, _NONE]}]}
_BOTH_OR_LEFT: Final = {"allOf": [{"anyOf": [_KNOWN, _NONE | {"required": _NAMES}]}]}


# ---------------------------------------------------------------- what is asked for


class OfOrganisation(msgspec.Struct, rename="camel"):
    """Whose sites."""

    org_id: UUID


class OfSite(msgspec.Struct, rename="camel"):
    """Which site."""

    org_id: UUID
    site_id: UUID


class OfEdge(msgspec.Struct, rename="camel"):
    """Which edge device."""

    org_id: UUID
    site_id: UUID
    edge_id: Annotated[str, msgspec.Meta(extra_json_schema=STORABLE)]


class SitesPage(msgspec.Struct):
    """How much of the list."""

    limit: Limit = LIMIT_MAX
    cursor: CursorText | None = None


class SiteLocationGiven(msgspec.Struct, forbid_unknown_fields=True):
    """A place, as far as it is told."""

    latitude: Latitude | msgspec.UnsetType | None = msgspec.UNSET
    longitude: Longitude | msgspec.UnsetType | None = msgspec.UNSET
    address: PostalAddress | msgspec.UnsetType | None = msgspec.UNSET

    @property
    def given(self) -> dict[str, Any]:
        return {
            field: _plain(getattr(self, field))
            for field in self.__struct_fields__
            if getattr(self, field) is not msgspec.UNSET
        }


class NewSiteLocation(SiteLocationGiven, forbid_unknown_fields=True):
    """Where a site is: both coordinates or neither. What is null is not known."""

    def __post_init__(self) -> None:
        latitude, longitude = ((None if one is msgspec.UNSET else one) for one in (self.latitude, self.longitude))
        check_coordinates(latitude, longitude)


class SiteLocationChange(SiteLocationGiven, forbid_unknown_fields=True):
    """What changes of where a site is: what is left out stays, what is null is not known."""

    def __post_init__(self) -> None:
        if self.latitude is not msgspec.UNSET and self.longitude is not msgspec.UNSET:
            check_coordinates(self.latitude, self.longitude)


class SiteToCreate(msgspec.Struct, forbid_unknown_fields=True):
    """A new site. Without a slug it gets one made from its name; without a time zone, UTC."""

    name: Name
    slug: Slug | None = None
    timezone: Zone | msgspec.UnsetType = msgspec.UNSET
    location: Annotated[NewSiteLocation | None, msgspec.Meta(extra_json_schema=_BOTH)] = None

    @property
    def new(self) -> NewSite:
        return NewSite(
            self.name.value,
            None if self.slug is None else self.slug.value,
            UTC if self.timezone is msgspec.UNSET else self.timezone.value,
            Location() if self.location is None else Location(**self.location.given),
        )


class SiteToUpdate(msgspec.Struct, forbid_unknown_fields=True):
    """What changes of a site; what is left out stays, in the location as well. A location of null is none."""

    name: Name | msgspec.UnsetType = msgspec.UNSET
    timezone: Zone | msgspec.UnsetType = msgspec.UNSET
    location: Annotated[
        SiteLocationChange | msgspec.UnsetType | None, msgspec.Meta(extra_json_schema=_BOTH_OR_LEFT)
    ] = msgspec.UNSET

    @property
    def changes(self) -> dict[str, Any]:
        given = {"name": self.name, "timezone": self.timezone}
        changes = {field: _plain(value) for field, value in given.items() if value is not msgspec.UNSET}
        if self.location is None:
            return changes | Location()._asdict()
        return changes if self.location is msgspec.UNSET else changes | self.location.given


class ServerToRegister(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    """A site's server, as it knows itself."""

    hardware_id: HardwareId
    version: Version
    hostname: HostName


class EdgeToRegister(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    """An edge device, as it knows itself."""

    edge_id: EdgeId
    hardware_id: HardwareId
    version: Version


class Heartbeat(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    """What a server or edge device runs now; without a number of processes, as many as before."""

    version: Version
    process_count: ProcessCount | None = None


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Name | Zone | PostalAddress) else value


# ---------------------------------------------------------------- what is answered


class SiteLocation(msgspec.Struct):
    """Where a site is."""

    latitude: float | None
    longitude: float | None
    address: str | None

    @classmethod
    def of(cls, row: Any) -> "Self | None":
        location = cls(row["latitude"], row["longitude"], row["address"])
        return None if location == cls(None, None, None) else location


class CreatedSite(msgspec.Struct, rename="camel"):
    """A site as it was made."""

    id: UUID
    name: str
    slug: str
    url: str
    timezone: str
    location: SiteLocation | None
    org_id: UUID
    status: Status
    created_at: datetime

    @classmethod
    def of(cls, row: Any, domain: str) -> Self:
        return cls(**_common(row, domain))


class ListedSite(msgspec.Struct, rename="camel"):
    """A site in the list."""

    id: UUID
    name: str
    slug: str
    url: str
    status: Status
    device_count: int
    """Devices of any kind that stand there."""
    process_count: int
    """As its server told last."""

    @classmethod
    def of(cls, row: Any, domain: str) -> Self:
        return cls(
            row["site_id"], row["name"], row["slug"], _url(row, domain), row["status"], row["device_count"],
            row["process_count"],
        )  # fmt: skip


class ListedSites(msgspec.Struct, rename="camel"):
    """A page of sites, in the order in which they were made."""

    data: list[ListedSite]
    next_cursor: str | msgspec.UnsetType = msgspec.UNSET
    """Where there are more."""


class Provisioning(msgspec.Struct, rename="camel"):
    """How far a site has come: it awaits its server, then that server's first heartbeat."""

    status: Literal["awaiting_server", "awaiting_heartbeat", "complete"]
    server_registered_at: datetime | None
    last_heard_at: datetime | None

    @classmethod
    def of(cls, server: Any) -> Self:
        if server is None:
            return cls("awaiting_server", None, None)
        heard_at = server["heard_at"]
        return cls("awaiting_heartbeat" if heard_at is None else "complete", server["registered_at"], heard_at)


class SiteServer(msgspec.Struct, rename="camel"):
    """A site's server."""

    hardware_id: str
    hostname: str
    version: str
    process_count: int
    registered_at: datetime
    last_heard_at: datetime | None

    @classmethod
    def of(cls, row: Any) -> Self:
        return cls(
            row["hardware_id"], row["hostname"], row["version"], row["process_count"], row["registered_at"],
            row["heard_at"],
        )  # fmt: skip


class EdgeDevice(msgspec.Struct, rename="camel"):
    """An edge device of a site."""

    edge_id: str
    hardware_id: str
    version: str
    status: Status
    process_count: int
    registered_at: datetime
    last_heard_at: datetime | None

    @classmethod
    def of(cls, row: Any) -> Self:
        return cls(
            row["edge_id"], row["hardware_id"], row["version"], row["status"], row["process_count"],
            row["registered_at"], row["heard_at"],
        )  # fmt: skip


class FullSite(CreatedSite, kw_only=True, rename="camel"):
    """Everything that is known of a site."""

    updated_at: datetime
    device_count: int
    process_count: int
    provisioning: Provisioning
    server: SiteServer | None
    edge_devices: list[EdgeDevice]

    @classmethod
    def whole(cls, row: Any, domain: str, server: Any, edges: Sequence[Any]) -> Self:
        return cls(
            **_common(row, domain),
            updated_at=row["updated_at"],
            device_count=row["device_count"],
            process_count=row["process_count"],
            provisioning=Provisioning.of(server),
            server=None if server is None else SiteServer.of(server),
            edge_devices=[EdgeDevice.of(edge) for edge in edges],
        )


class ErasedSite(msgspec.Struct):
    """A site that is being erased."""

    id: UUID
    status: Literal["deleting"] = "deleting"


class ServerConfig(msgspec.Struct, rename="camel"):
    """What a site's server needs to begin."""

    org_id: UUID
    site_id: UUID
    clustering_mode: str = "AdoNet"


class RegisteredServer(msgspec.Struct, rename="camel"):
    """The server's token, shown once."""

    site_token: str
    config: ServerConfig


class EdgeConfig(msgspec.Struct, rename="camel"):
    """How an edge device works: how often it looks, and how long it keeps what it cannot send."""

    poll_interval_ms: int = 100
    buffer_retention_days: int = 7


class RegisteredEdge(msgspec.Struct, rename="camel"):
    """The edge device's token, shown once, and whom it sends to."""

    edge_token: str
    site_server_url: str
    config: EdgeConfig


def _url(row: Any, domain: str) -> str:
    return f"{row['host']}.{domain}"


def _common(row: Any, domain: str) -> dict[str, Any]:
    return {
        "id": row["site_id"],
        "name": row["name"],
        "slug": row["slug"],
        "url": _url(row, domain),
        "timezone": row["timezone"],
        "location": SiteLocation.of(row),
        "org_id": row["organisation_id"],
        "status": row["status"],
        "created_at": row["created_at"],
    }

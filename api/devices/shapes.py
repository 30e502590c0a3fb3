"""What the Devices face takes and gives: its spelling of ids, its fields. Left out: what is done (`operations`)."""

from datetime import datetime
from typing import Annotated, Any, Final

import msgspec
from msgspec import UNSET, UnsetType

from api.http.lists import CursorText, Limit
from api.http.parameters import Name as Part
from api.http.problems import invalid
from api.http.spelt import Moment, Never, PrefixedId
from api.registry.devices import Filter
from api.registry.texts import LocalId, Name, Notes
from schemas import models
from schemas.models import Model, ingest_url_kind

_MODEL_CHARACTERS_MAX: Final = 64


class DeviceId(PrefixedId, prefix="dev_"):
    """A device."""


class SiteId(PrefixedId, prefix="site_"):
    """A site."""


class AccountId(PrefixedId, prefix="acc_"):
    """An organisation, as this face calls it."""


class FixedSite(Never, why="cannot be changed here: POST …/move moves a device"):
    """Where a device stands."""


class FixedModel(Never, why="cannot be changed: delete the device and create it anew"):
    """What a device is."""


class OneDevice(msgspec.Struct):
    """Which device."""

    id: DeviceId


class Listed(msgspec.Struct, kw_only=True):
    """Which devices: of a site, or of the whole account."""

    site_id: SiteId | None = None
    account_id: AccountId | None = None
    online: bool | None = None
    model: Annotated[Part, msgspec.Meta(description="A part of the model's name.")] | None = None
    limit: Limit = 50
    cursor: CursorText | None = None

    def __post_init__(self) -> None:
        if self.site_id is None and self.account_id is None:
            raise invalid("site_id", "is required, unless account_id says whose devices")

    @property
    def filter(self) -> Filter:
        return Filter(None if self.site_id is None else self.site_id.value, self.online, self.model)


class Create(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A device to be."""

    site_id: SiteId | None = None
    """Where it stands; a device may stand nowhere."""
    local_id: LocalId
    name: Name
    model: Annotated[
        str,
        msgspec.Meta(min_length=1, max_length=_MODEL_CHARACTERS_MAX, extra_json_schema={"enum": [*models.MODELS]}),
    ]
    notes: Notes | None = None


class Change(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What of a device is to be another; what is absent stays."""

    name: Name | UnsetType = UNSET
    local_id: LocalId | UnsetType = UNSET
    notes: Notes | UnsetType = UNSET
    site_id: FixedSite | UnsetType = UNSET
    model: FixedModel | UnsetType = UNSET

    @property
    def values(self) -> dict[str, str | None]:
        fields = {"name": self.name, "local_id": self.local_id, "notes": self.notes}
        return {name: text.value for name, text in fields.items() if not isinstance(text, UnsetType)}


class Move(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Where a device is to stand, and from when."""

    to_site_id: SiteId | None
    """None: nowhere."""
    effective_at: Moment | None = None
    """In the past, or in the future; None: now. What was to follow is replaced."""


class Device(msgspec.Struct, kw_only=True):
    """A device, as lists have it."""

    id: str
    site_id: str | None
    local_id: str
    name: str
    model: str | None
    fw_version: str | None
    ingest_url_kind: str
    last_seen_at: datetime | None
    online: bool


class WholeDevice(Device, kw_only=True):
    """A device."""

    online_changed_at: datetime | None
    """Since when `online` is what it is; null for a device that was never heard."""
    notes: str
    created_at: datetime
    updated_at: datetime


class Devices(msgspec.Struct):
    """A page of devices, in the order in which they were created."""

    data: list[Device]
    next_cursor: str | None
    has_more: bool


class Issued(msgspec.Struct, kw_only=True):
    """A device's new token, which is shown this once."""

    id: str
    local_id: str
    ingest_token: str
    ingest_url: str
    issued_at: datetime


class Moved(msgspec.Struct, kw_only=True):
    """A move as it was entered, and where the device stands now."""

    id: str
    site_id: str | None
    to_site_id: str | None
    effective_at: datetime


class Asked(msgspec.Struct):
    """The device was told; whether it heard, it shows."""

    id: str
    status: str


class CatalogueModel(msgspec.Struct):
    """A model of the catalogue, and how a device of it sends."""

    model: str
    vendor: str
    name: str
    ingest_url_kind: str
    supports_identify: bool


class Models(msgspec.Struct):
    """All models of the catalogue."""

    data: list[CatalogueModel]
    next_cursor: str | None
    has_more: bool


def shown(row: Any) -> Device:
    """A row as lists have it."""
    return Device(**_fields(row))


def shown_whole(row: Any) -> WholeDevice:
    more = ("online_changed_at", "notes", "created_at", "updated_at")
    return WholeDevice(**_fields(row), **{name: row[name] for name in more})


def _fields(row: Any) -> dict[str, Any]:
    return {
        "id": str(DeviceId(row["device_id"])),
        "site_id": site_text(row["site_id"]),
        "local_id": row["local_id"],
        "name": row["name"],
        "model": row["model"],
        "fw_version": row["fw_version"],
        "ingest_url_kind": ingest_url_kind(row["model"]),
        "last_seen_at": row["last_seen_at"],
        "online": row["online"],
    }


def site_text(site: Any) -> str | None:
    return None if site is None else str(SiteId(site))


def shown_model(model: Model) -> CatalogueModel:
    return CatalogueModel(model.name, model.vendor, model.title, model.ingest_url_kind, model.identifies)


def ingest_url(base: str, model: str | None, token: str) -> str:
    """Where a device of this model sends to; of those that send by GET, the token is a part of it."""
    by_get = ingest_url_kind(model) == models.SHELLY_GET
    return f"{base}/v1/ingest/shelly/{token}" if by_get else f"{base}/v1/ingest"

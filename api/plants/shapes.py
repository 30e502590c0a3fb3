"""What the Plants face takes and gives, and how it is made from the registry's rows."""

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Final, Literal, Self
from uuid import UUID

import msgspec
from msgspec import UNSET, UnsetType

from api.http.problems import invalid
from api.http.spelt import STORABLE
from api.registry.texts import CommandTarget, Notes, PlantName, PlantText, SerialNumber
from schemas.plants import AuthMethod, Lifecycle

Type = Literal["SENSOR", "ACTUATOR", "GATEWAY", "CONTROLLER"]
Status = Literal["ONLINE", "OFFLINE"]
_METADATA_BYTES_MAX: Final = 10_000
_PAYLOAD_BYTES_MAX: Final = 8_000
_Page = Annotated[int, msgspec.Meta(ge=1, le=1_000_000_000, description="Page number (1-indexed).")]
_PerPage = Annotated[int, msgspec.Meta(ge=1, le=100, description="Items per page.")]
_Latitude = Annotated[float, msgspec.Meta(ge=-90, le=90, description="Degrees north, WGS 84.")]
_Longitude = Annotated[float, msgspec.Meta(ge=-180, le=180, description="Degrees east, WGS 84.")]
_Amount = Annotated[float, msgspec.Meta(ge=0, le=1e12)]
_CommandName = Annotated[str, msgspec.Meta(min_length=1, max_length=255, extra_json_schema=STORABLE)]


def _check_size(name: str, value: Any, most: int) -> None:
    if len(msgspec.json.encode(value)) > most:
        raise invalid(name, f"must have up to {most} bytes of JSON")


# ---------------------------------------------------------------- what is asked for


class OnePlant(msgspec.Struct):
    """Which plant."""

    id: UUID


class Paged(msgspec.Struct, kw_only=True):
    """Which page of a list."""

    page: _Page = 1
    limit: _PerPage = 20

    @property
    def offset(self) -> int:
        return (self.page - 1) * self.limit


class Listed(Paged, kw_only=True, rename="camel"):
    """Which plants."""

    auth_method: AuthMethod | None = None


class PlantToCreate(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """A plant to be."""

    name: PlantName
    serial_number: SerialNumber
    type: Type
    auth_method: AuthMethod = AuthMethod.MTLS
    metadata: dict[str, Any] = {}

    def __post_init__(self) -> None:
        _check_size("metadata", self.metadata, _METADATA_BYTES_MAX)


class PlantToUpdate(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """What of a plant is to be another; what is absent stays, null is none.

    From `description` on, beyond what its document names: otherwise nobody could say it.
    """

    name: PlantName | UnsetType = UNSET
    serial_number: SerialNumber | UnsetType = UNSET
    type: Type | UnsetType = UNSET
    auth_method: AuthMethod | UnsetType = UNSET
    metadata: dict[str, Any] | UnsetType = UNSET
    external_plant_id: PlantText | UnsetType | None = UNSET
    organization_id: UUID | UnsetType = UNSET
    """Super-admins alone."""
    template_id: UUID | UnsetType | None = UNSET
    description: Notes | UnsetType | None = UNSET
    tag: PlantText | UnsetType | None = UNSET
    latitude: _Latitude | UnsetType | None = UNSET
    longitude: _Longitude | UnsetType | None = UNSET
    capacity_kwh: _Amount | UnsetType | None = UNSET
    fve_peak_power_kwp: _Amount | UnsetType | None = UNSET
    plant_with_load: bool | UnsetType | None = UNSET
    config_enabled: bool | UnsetType | None = UNSET

    def __post_init__(self) -> None:
        if self.metadata is not UNSET:
            _check_size("metadata", self.metadata, _METADATA_BYTES_MAX)

    @property
    def values(self) -> dict[str, Any]:
        """By the registry's names, without whose it is to be."""
        given = {name: getattr(self, name) for name in self.__struct_fields__ if name != "organization_id"}
        values = {name: _plain(value) for name, value in given.items() if value is not UNSET}
        if "external_plant_id" in values:
            values["external_id"] = values.pop("external_plant_id")
        return values


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, PlantName | PlantText | SerialNumber | Notes) else value


class CommandToSend(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What a plant, or a device behind it, is to do."""

    command: _CommandName
    payload: dict[str, Any] = {}
    target: (
        Annotated[CommandTarget, msgspec.Meta(description="A device behind the plant, by its externalId.")] | None
    ) = None

    def __post_init__(self) -> None:
        _check_size("payload", self.payload, _PAYLOAD_BYTES_MAX)


# ---------------------------------------------------------------- what is answered


class Meta(msgspec.Struct, rename="camel"):
    """Where in a list a page is."""

    limit: int
    page: int
    total: int
    total_pages: int

    @classmethod
    def of(cls, query: Paged, total: int) -> Self:
        return cls(query.limit, query.page, total, -(-total // query.limit))


class PlantTemplate(msgspec.Struct, rename="camel"):
    """How what a plant sends is read."""

    actions: list[dict[str, Any]]
    created_at: datetime
    id: UUID
    is_system: bool
    level: Literal["PLANT", "DEVICE"]
    name: str
    signals: list[dict[str, Any]]
    type: str
    updated_at: datetime
    version: int

    @classmethod
    def of(cls, row: Any) -> Self | None:
        if row["template_id"] is None:
            return None
        return cls(
            _json(row["actions"]), row["template_created_at"], _uuid(row["template_id"]), row["is_system"],
            row["level"], row["template_name"], _json(row["signals"]), row["template_type"],
            row["template_updated_at"], row["template_version"],
        )  # fmt: skip


class Plant(msgspec.Struct, kw_only=True, rename="camel"):
    """A plant, as lists have it."""

    activated_at: datetime | None
    auth_failure_count: int
    auth_method: AuthMethod
    certificate_expires_at: datetime | None
    certificate_fingerprint: str | None
    certificate_serial_number: str | None
    created_at: datetime
    id: str
    last_auth_failure_at: datetime | None
    last_seen_at: datetime | None
    lifecycle_status: Lifecycle
    metadata: dict[str, Any]
    name: str
    organization_id: UUID
    secret_rotated_at: datetime | None
    serial_number: str
    status: Status
    template: PlantTemplate | None
    template_id: UUID | None
    type: Type
    updated_at: datetime

    @classmethod
    def of(cls, row: Any) -> "Plant":
        return cls(**_common(row))


class Alert(msgspec.Struct, kw_only=True, rename="camel"):
    """What a plant alarmed of."""

    acknowledged_at: datetime | None
    acknowledged_by: str | None
    created_at: datetime
    id: str
    message: str
    plant_id: str
    resolved_at: datetime | None
    severity: Literal["INFO", "WARNING", "CRITICAL"]
    status: Literal["ACTIVE", "ACKNOWLEDGED", "RESOLVED"]
    type: str
    updated_at: datetime

    @classmethod
    def of(cls, row: Any) -> Self:
        return cls(
            acknowledged_at=row["acknowledged_at"], acknowledged_by=row["acknowledged_by"],
            created_at=row["created_at"], id=str(row["alert_id"]), message=row["message"],
            plant_id=str(row["device_id"]), resolved_at=row["resolved_at"], severity=row["severity"],
            status=row["status"], type=row["type"], updated_at=row["updated_at"],
        )  # fmt: skip


class PlantGroup(msgspec.Struct, kw_only=True, rename="camel"):
    """A group of devices that the plant is in."""

    created_at: datetime
    description: str
    id: UUID
    name: str
    organization_id: UUID
    updated_at: datetime

    @classmethod
    def of(cls, row: Any) -> Self:
        return cls(
            created_at=row["created_at"], description=row["description"], id=_uuid(row["group_id"]),
            name=row["name"], organization_id=_uuid(row["organisation_id"]), updated_at=row["updated_at"],
        )  # fmt: skip


class WholePlant(Plant, kw_only=True, rename="camel"):
    """Everything that is known of a plant."""

    alerts: list[Alert]
    """The newest hundred."""
    capacity_kwh: float | None
    config_enabled: bool | None
    description: str | None
    esi_state: str | None
    external_plant_id: str | None
    fve_peak_power_kwp: float | None
    latitude: float | None
    longitude: float | None
    plant_groups: list[PlantGroup]
    plant_with_load: bool | None
    tag: str | None

    @classmethod
    def whole(cls, row: Any, alerts: Sequence[Any], groups: Sequence[Any]) -> "WholePlant":
        return cls(
            **_common(row),
            alerts=[Alert.of(alert) for alert in alerts],
            plant_groups=[PlantGroup.of(group) for group in groups],
            capacity_kwh=row["capacity_kwh"],
            config_enabled=row["config_enabled"],
            description=row["description"],
            esi_state=row["esi_state"],
            external_plant_id=row["external_id"],
            fve_peak_power_kwp=row["fve_peak_power_kwp"],
            latitude=row["latitude"],
            longitude=row["longitude"],
            plant_with_load=row["plant_with_load"],
            tag=row["tag"],
        )


class Plants(msgspec.Struct):
    """A page of plants, in the order in which they were created."""

    data: list[Plant]
    meta: Meta


class AtRisk(msgspec.Struct, kw_only=True, rename="camel"):
    """A plant whose certificate has ended, or ends soon."""

    auth_method: AuthMethod
    certificate_expires_at: datetime
    id: UUID
    lifecycle_status: Lifecycle
    name: str
    serial_number: str

    @classmethod
    def of(cls, row: Any) -> Self:
        return cls(
            auth_method=row["auth_method"], certificate_expires_at=row["certificate_expires_at"],
            id=_uuid(row["device_id"]), lifecycle_status=row["lifecycle"], name=row["name"],
            serial_number=row["serial_number"],
        )  # fmt: skip


class CertificateStats(msgspec.Struct, kw_only=True, rename="camel"):
    """How the certificates of all plants are: each counts once, and those that expire soon not as active."""

    active: int
    at_risk_plants: list[AtRisk]
    """The hundred whose certificates end first, or have ended."""
    expired: int
    expiring_soon: int
    next_renewal_at: datetime | None
    """When the next one is due to be renewed, or was."""
    revoked: int


class Said(msgspec.Struct):
    """What was done, for a person."""

    message: str


class Energy(msgspec.Struct, kw_only=True, rename="camel"):
    """What the plant's counters rose today, in kWh; null without any production: a share of nothing."""

    date: str
    exported: float
    imported: float
    produced: float
    self_consumption_pct: float | None


class MqttToken(msgspec.Struct, rename="camel"):
    """For the broker, instead of a password; the one before is good no longer."""

    expires_at: datetime
    token: str


class RotatedSecret(msgspec.Struct, rename="camel"):
    """The new key of signatures, and for how long the old one is good too."""

    grace_period_minutes: int
    hmac_secret: str


class Command(msgspec.Struct, kw_only=True, rename="camel"):
    """A command, and what became of it: PENDING, SENT, ACKNOWLEDGED, SUCCESS, FAILED or TIMEOUT."""

    acked_at: datetime | None
    cmd_id: str
    command: str
    created_at: datetime
    id: str
    payload: dict[str, Any]
    plant_id: str
    response: dict[str, Any] | None
    response_status: str
    sent_at: datetime | None

    @classmethod
    def of(cls, row: Any) -> Self:
        return cls(
            acked_at=row["acked_at"], cmd_id=str(row["command_id"]), command=row["command"],
            created_at=row["created_at"], id=str(row["command_id"]), payload=_json(row["payload"]),
            plant_id=str(row["device_id"]), response=None if row["response"] is None else _json(row["response"]),
            response_status=row["state"], sent_at=row["sent_at"],
        )  # fmt: skip


class Commands(msgspec.Struct):
    """A page of a plant's commands, the newest first."""

    data: list[Command]
    meta: Meta


def _common(row: Any) -> dict[str, Any]:
    template = PlantTemplate.of(row)
    return {
        "activated_at": row["activated_at"],
        "auth_failure_count": row["auth_failures"],
        "auth_method": row["auth_method"],
        "certificate_expires_at": row["certificate_expires_at"],
        "certificate_fingerprint": row["certificate_fingerprint"],
        "certificate_serial_number": row["certificate_serial_number"],
        "created_at": row["created_at"],
        "id": str(row["device_id"]),
        "last_auth_failure_at": row["last_auth_failure_at"],
        "last_seen_at": row["last_seen_at"],
        "lifecycle_status": row["lifecycle"],
        "metadata": _json(row["metadata"]),
        "name": row["name"],
        "organization_id": _uuid(row["organisation_id"]),
        "secret_rotated_at": row["secret_rotated_at"],
        "serial_number": row["serial_number"],
        "status": "ONLINE" if row["online"] else "OFFLINE",
        "template": template,
        "template_id": None if template is None else template.id,
        "type": row["type"],
        "updated_at": row["updated_at"],
    }


def _json(text: str) -> Any:
    """As the database wrote it."""
    return msgspec.Raw(text.encode())


def _uuid(value: Any) -> UUID:
    """The driver has a kind of its own."""
    return UUID(int=value.int)

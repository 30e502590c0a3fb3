"""Plants: devices with a serial number, a lifecycle and a template; made, found, changed, removed.

Whoever changes one holds its device's row first and then its own, so that of two steps at once one is judged by what
the other left. Left out: what is secret of a plant (`api.registry.provisioning`), and its commands.
"""

import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple
from uuid import UUID

import asyncpg
import msgspec

from api.http.problems import Detail, Problem
from api.problems import PLANT_EXISTS, PLANT_NOT_FOUND, PLANT_REFUSED
from api.registry import audit, devices
from api.registry.devices import IS_HEARD, NewDevice
from api.registry.versions import check_version
from runtime.ids import uuid7
from schemas.plants import AuthMethod, Lifecycle

#: Of the catalogue: it is given nothing that any other device of it is not.
MODEL: Final = "generic_mqtt"
#: Newest first: an answer tells of so many.
ALERTS_MAX: Final = 100
_ALERT_TYPE_CHARACTERS_MAX: Final = 64
_ALERT_CHARACTERS_MAX: Final = 1_000

_COLUMNS: Final = f"""
p.device_id, p.organisation_id, p.serial_number, p.type, p.auth_method, p.lifecycle, p.activated_at,
p.metadata::text AS metadata, p.secret_rotated_at, p.certificate_fingerprint, p.certificate_serial_number,
p.certificate_expires_at, p.auth_failures, p.last_auth_failure_at,
d.name, d.created_at, d.updated_at, d.version, d.last_seen_at, coalesce({IS_HEARD}, false) AS online,
t.template_id, t.is_system, t.name AS template_name, t.level, t.type AS template_type, t.signals::text AS signals,
t.actions::text AS actions, t.version AS template_version, t.created_at AS template_created_at,
t.updated_at AS template_updated_at"""
_MORE: Final = """,
p.external_id, p.description, p.tag, p.latitude, p.longitude, p.capacity_kwh, p.fve_peak_power_kwp, p.plant_with_load,
p.config_enabled, p.esi_state"""
_FROM: Final = """
FROM plants p JOIN devices d ON d.device_id = p.device_id
LEFT JOIN known_templates t ON t.template_id = coalesce(p.template_id, p.system_template_id)"""
_ONE: Final = f"SELECT {_COLUMNS}{_MORE}{_FROM} WHERE p.device_id = $1 AND p.deleted_at IS NULL"
_PAGE: Final = f"""
SELECT {_COLUMNS}{_FROM}
WHERE p.organisation_id = $1 AND p.deleted_at IS NULL AND ($2::text IS NULL OR p.auth_method = $2)
ORDER BY p.device_id LIMIT $3 OFFSET $4
"""
_NUMBER: Final = """
SELECT count(*) FROM plants WHERE organisation_id = $1 AND deleted_at IS NULL
  AND ($2::text IS NULL OR auth_method = $2)
"""
_IS_THERE: Final = "SELECT EXISTS (SELECT FROM plants WHERE device_id = $1 AND deleted_at IS NULL)"
_HOLD: Final = """
SELECT p.device_id, p.organisation_id, p.serial_number, p.auth_method, p.lifecycle, p.secret, p.template_id, d.name,
       d.version
FROM devices d JOIN plants p ON p.device_id = d.device_id
WHERE d.device_id = $1 AND d.status <> 'deleted' AND p.deleted_at IS NULL FOR NO KEY UPDATE OF d, p
"""
_INSERT: Final = """
INSERT INTO plants (device_id, organisation_id, serial_number, type, auth_method, metadata)
VALUES ($1, $2, $3, $4, $5, $6::text::jsonb)
"""
_RENAME: Final = "UPDATE devices SET name = $2 WHERE device_id = $1"
_SET_STATUS: Final = "UPDATE devices SET status = $2 WHERE device_id = $1"
_TOUCH: Final = "UPDATE devices SET version = version + 1, updated_at = now() WHERE device_id = $1"
_SET_LIFECYCLE: Final = "UPDATE plants SET lifecycle = $2 WHERE device_id = $1"
#: What a change may name, and how it is written.
_CHANGEABLE: Final[Mapping[str, str]] = {
    "serial_number": "$", "type": "$", "auth_method": "$", "metadata": "$::text::jsonb", "external_id": "$",
    "template_id": "$", "system_template_id": "$", "description": "$", "tag": "$", "latitude": "$", "longitude": "$",
    "capacity_kwh": "$", "fve_peak_power_kwp": "$", "plant_with_load": "$", "config_enabled": "$",
}  # fmt: skip
_HAND_OVER: Final = "SELECT hand_over_device($1, $2)"
_ACT_FOR: Final = "SELECT set_config('sluice.organisation', $1, true)"
_IN_THE_WAY: Final = {
    "forbidden": "a super-admin alone may do this",
    "template": "the plant's template stays with its organisation: send templateId, null or one of the system's",
    "erasing": "a site where the plant stood is being erased: try again when that is done",
    "retention": "the plant's organisation has let readings go that this one would keep: let both keep them as long",
}
_TEMPLATE: Final = "SELECT is_system, level FROM known_templates WHERE template_id = $1"
_ALERTS: Final = """
SELECT alert_id, device_id, type, severity, status, message, created_at, updated_at, acknowledged_at, acknowledged_by,
       resolved_at
FROM plant_alerts WHERE device_id = $1 ORDER BY created_at DESC, alert_id DESC LIMIT $2
"""
_GROUPS: Final = """
SELECT g.group_id, g.organisation_id, g.name, g.description, g.created_at, g.updated_at
FROM device_group_members m JOIN device_groups g USING (group_id) WHERE m.device_id = $1 ORDER BY g.group_id
"""
_OPEN_ALERT: Final = "SELECT open_plant_alert($1, $2, $3, $4, $5)"
_CERTIFICATES: Final = """
SELECT count(*) FILTER (WHERE state = 'active' AND certificate_expires_at > now() + $1) AS active,
       count(*) FILTER (WHERE state = 'expired') AS expired,
       count(*) FILTER (WHERE state = 'revoked') AS revoked,
       count(*) FILTER (WHERE state = 'active' AND certificate_expires_at <= now() + $1) AS expiring_soon,
       min(certificate_expires_at) FILTER (WHERE state = 'active') - $1 AS next_renewal_at
FROM (SELECT certificate_expires_at,
             CASE WHEN certificate_revoked_at IS NOT NULL THEN 'revoked'
                  WHEN certificate_expires_at <= now() THEN 'expired' ELSE 'active' END AS state
      FROM plants WHERE organisation_id = $2 AND certificate_fingerprint IS NOT NULL AND deleted_at IS NULL) c
"""
_AT_RISK: Final = """
SELECT p.device_id, d.name, p.serial_number, p.auth_method, p.lifecycle, p.certificate_expires_at
FROM plants p JOIN devices d USING (device_id)
WHERE p.organisation_id = $2 AND p.certificate_fingerprint IS NOT NULL AND p.deleted_at IS NULL
  AND p.certificate_revoked_at IS NULL AND p.certificate_expires_at <= now() + $1
ORDER BY p.certificate_expires_at, p.device_id LIMIT $3
"""


class NewPlant(NamedTuple):
    """What a plant is made of."""

    name: str
    serial_number: str
    type: str
    auth_method: AuthMethod = AuthMethod.MTLS
    metadata: Mapping[str, Any] = {}


# ---------------------------------------------------------------- making and changing


async def create(connection: Any, organisation: UUID, new: NewPlant) -> UUID:
    """A plant that stands nowhere and knows nobody yet. Raises the problem of a serial number that is taken."""
    local_id = f"plant-{secrets.token_hex(6)}"
    plant = await devices.create(connection, organisation, None, NewDevice(new.name, local_id, MODEL))
    metadata = msgspec.json.encode(new.metadata).decode()
    try:
        await connection.execute(_INSERT, plant, organisation, new.serial_number, new.type, new.auth_method, metadata)
    except asyncpg.UniqueViolationError:
        raise Problem(PLANT_EXISTS) from None
    told = {"serial_number": new.serial_number, "type": new.type, "auth_method": new.auth_method}
    await audit.record(connection, "plant.created", plant, **told)
    return plant


async def hold(connection: Any, plant: UUID, expected: Sequence[str] | None = None) -> Any:
    """Its row, until the end of the transaction. Raises the problems of one that is not there or was changed."""
    row = await connection.fetchrow(_HOLD, plant)
    if row is None:
        raise Problem(PLANT_NOT_FOUND)
    check_version(row["version"], expected)
    return row


async def touch(connection: Any, plant: UUID) -> None:
    """It is another version from here on."""
    await connection.execute(_TOUCH, plant)


async def change(connection: Any, plant: UUID, expected: Sequence[str] | None, values: Mapping[str, Any]) -> None:
    """Of a plant's `name`, `template_id` and columns; what is not named stays, None is none.

    Raises the problems of a plant or template that is not there, of a template of another level, of a serial number
    that is taken, and of another way to log in for a plant that was provisioned.
    """
    held = await hold(connection, plant, expected)
    if not values:
        return
    if values.get("auth_method", held["auth_method"]) != held["auth_method"]:
        require(held, "have another authMethod", Lifecycle.PENDING)
    columns = {name: value for name, value in values.items() if name not in ("name", "template_id")}
    if "template_id" in values:
        columns |= await _template(connection, values["template_id"])
    if "name" in values:
        await connection.execute(_RENAME, plant, values["name"])
    await _set(connection, plant, columns)
    await touch(connection, plant)
    told = {name: value for name, value in values.items() if name != "metadata"}
    await audit.record(connection, "plant.changed", plant, **told, fields=sorted(values))


async def _template(connection: Any, template: UUID | None) -> dict[str, UUID | None]:
    if template is None:
        return {"template_id": None, "system_template_id": None}
    row = await connection.fetchrow(_TEMPLATE, template)
    if row is None:
        raise Problem(PLANT_NOT_FOUND, "there is no such template")
    if row["level"] != "PLANT":
        raise _refused("templateId", f"is of the level {row['level']}, and a plant takes one of the level PLANT")
    own, other = ("system_template_id", "template_id") if row["is_system"] else ("template_id", "system_template_id")
    return {own: template, other: None}


async def _set(connection: Any, plant: UUID, columns: Mapping[str, Any]) -> None:
    if not columns:
        return
    parts = [
        f"{name} = {_CHANGEABLE[name].replace('$', f'${number}')}" for number, name in enumerate(columns, start=2)
    ]
    values = [msgspec.json.encode(value).decode() if name == "metadata" else value for name, value in columns.items()]
    try:
        sql = f"UPDATE plants SET {', '.join(parts)} WHERE device_id = $1"  # noqa: S608
        await connection.execute(sql, plant, *values)
    except asyncpg.UniqueViolationError:
        raise _refused("serialNumber", "is another plant's") from None


async def hand_over(connection: Any, plant: UUID, organisation: UUID) -> None:
    """Give it to another organisation, for which the transaction acts from then on; its readings go along.

    The sites of its former one are held by the caller (`sites.hold`), before any device is. Groups and sites stay
    behind. Raises the problems of a plant or organisation that is not there, of a template of the organisation's own,
    of a serial number that is taken there, of a site under erasure where it stood, and of readings that the other
    would keep and that are gone already.
    """
    held = await hold(connection, plant)
    former = UUID(int=held["organisation_id"].int)
    if organisation == former:
        return
    try:
        found: str = await connection.fetchval(_HAND_OVER, plant, organisation)
    except asyncpg.UniqueViolationError:
        raise _refused("serialNumber", "is another plant's of that organisation") from None
    if found == "unknown":
        raise Problem(PLANT_NOT_FOUND, "there is no such organisation")
    if found != "moved":
        raise _refused("organizationId", _IN_THE_WAY[found])
    await audit.record(connection, "plant.handed_over", plant, to_organisation=organisation)
    await connection.execute(_ACT_FOR, str(organisation))
    await audit.record(connection, "plant.taken_over", plant, from_organisation=former)


def _refused(field: str, message: str) -> Problem:
    return Problem(PLANT_REFUSED, f"{field}: {message}", details=[Detail(field, message)])


async def remove(connection: Any, plant: UUID, expected: Sequence[str] | None) -> None:
    """Its serial number is free, and all that is secret of it gone; what it measured stays."""
    held = await hold(connection, plant, expected)
    await devices.remove(connection, plant, None)
    await audit.record(connection, "plant.deleted", plant, serial_number=held["serial_number"])


# ---------------------------------------------------------------- lifecycle


def require(held: Any, what: str, *states: Lifecycle) -> None:
    """Raises the problem of a plant that is in none of these states."""
    if held["lifecycle"] not in states:
        wanted = " or ".join(states)
        raise Problem(PLANT_REFUSED, f"the plant is {held['lifecycle']}: to {what} it has to be {wanted}")


async def set_lifecycle(connection: Any, plant: UUID, lifecycle: Lifecycle) -> None:
    """What it sends is taken while it is ACTIVE, or was never given anything to send with."""
    await connection.execute(_SET_LIFECYCLE, plant, lifecycle)
    taken = lifecycle in (Lifecycle.PENDING, Lifecycle.ACTIVE)
    await connection.execute(_SET_STATUS, plant, "active" if taken else "suspended")
    await touch(connection, plant)


# ---------------------------------------------------------------- looking


async def get(connection: Any, plant: UUID) -> Any:
    """All of it but alerts and groups. Raises the problem of a plant that is not there."""
    row = await connection.fetchrow(_ONE, plant)
    if row is None:
        raise Problem(PLANT_NOT_FOUND)
    return row


async def require_one(connection: Any, plant: UUID) -> None:
    """Raises the problem of a plant that is not there."""
    if not await connection.fetchval(_IS_THERE, plant):
        raise Problem(PLANT_NOT_FOUND)


async def find(
    connection: Any, organisation: UUID, method: AuthMethod | None, offset: int, limit: int
) -> tuple[list[Any], int]:
    """Up to `limit` plants behind so many, in the order in which they were made, and how many there are in all."""
    total: int = await connection.fetchval(_NUMBER, organisation, method)
    rows: list[Any] = []
    if offset < total:
        rows = await connection.fetch(_PAGE, organisation, method, limit, offset)
    return rows, total


async def alerts(connection: Any, plant: UUID) -> list[Any]:
    """The newest ones, whatever became of them."""
    rows: list[Any] = await connection.fetch(_ALERTS, plant, ALERTS_MAX)
    return rows


async def groups(connection: Any, plant: UUID) -> list[Any]:
    """The groups of devices that it is in."""
    rows: list[Any] = await connection.fetch(_GROUPS, plant)
    return rows


async def open_alert(connection: Any, plant: UUID, kind: str, severity: str, message: str) -> UUID | None:
    """Of what a plant alarmed: the alert's id, the same one while the same alarm is open; None without such a plant.

    For a transaction of `sluice_worker`.
    """
    found: UUID | None = await connection.fetchval(
        _OPEN_ALERT, uuid7(), plant, kind[:_ALERT_TYPE_CHARACTERS_MAX], severity, message[:_ALERT_CHARACTERS_MAX]
    )
    return found


class CertificateHealth(NamedTuple):
    """How many certificates are in which state, and the plants whose certificate has ended or ends soon."""

    counts: Any
    at_risk: list[Any]


async def certificate_health(connection: Any, organisation: UUID, soon: Any, most: int) -> CertificateHealth:
    """`soon`: how long before its end a certificate is due to be renewed."""
    counts = await connection.fetchrow(_CERTIFICATES, soon, organisation)
    return CertificateHealth(counts, list(await connection.fetch(_AT_RISK, soon, organisation, most)))

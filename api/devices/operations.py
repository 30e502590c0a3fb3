"""The Devices face, operation by operation. Left out: what a device is and may (`api.registry.devices`)."""

from typing import Any, Final
from uuid import UUID

from api.access.scopes import DEVICES_READ, DEVICES_WRITE
from api.devices.downlink import Downlink
from api.devices.shapes import (
    Asked,
    Change,
    Create,
    DeviceId,
    Devices,
    Issued,
    Listed,
    Models,
    Move,
    Moved,
    OneDevice,
    WholeDevice,
    ingest_url,
    shown,
    shown_model,
    shown_whole,
    site_text,
)
from api.faces import DEVICES
from api.http.lists import Cursors, cut
from api.http.operations import Call, Example, Nothing, Reply, Role, needs, operation
from api.http.problems import INVALID, STALE, Problem
from api.problems import (
    ACCOUNT_NOT_FOUND,
    DEVICE_NOT_FOUND,
    IDENTIFY_UNSUPPORTED,
    LOCAL_ID_TAKEN,
    MOVE_LIMIT,
    SITE_NOT_FOUND,
    UNKNOWN_MODEL,
)
from api.registry import devices
from api.registry.credentials import Credentials
from api.registry.devices import NewDevice
from runtime.secrets import KeyRing, Seal, TokenHasher
from schemas.models import MODELS

PATH: Final = "/v1/devices"
_ONE: Final = f"{PATH}/{{id}}"
_READS: Final = needs(Role.VIEWER, DEVICES_READ)
_CHANGES: Final = needs(Role.MEMBER, DEVICES_WRITE)

#: The document shortens ids; these begin as its own do.
_SITE, _OTHER_SITE = "site_4f3c7e6a7b8c4d9e8f1a2b3c4d5e6f70", "site_4f8b7e6a7b8c4d9e8f1a2b3c4d5e6f70"
_LISTED: Final = {
    "id": "dev_b1d27e6a7b8c4d9e8f1a2b3c4d5e6f70",
    "site_id": _SITE,
    "local_id": "fridge01",
    "name": "Walk-in fridge",
    "model": "shelly-h-t-gen3",
    "fw_version": "1.2.4",
    "ingest_url_kind": "shelly_get",
    "last_seen_at": "2026-05-17T08:22:00Z",
    "online": True,
}
_NEW: Final = {"site_id": _SITE, "local_id": "fridge02", "name": "Reach-in fridge", "model": "diy_esp32"}
_ISSUED: Final = {
    "id": "dev_b1d37e6a7b8c4d9e8f1a2b3c4d5e6f70",
    "local_id": "fridge02",
    "ingest_token": "ds_live_4f3c1a2b…",
    "ingest_url": "https://api.opensense.murzin.digital/v1/ingest",
    "issued_at": "2026-05-17T08:30:00Z",
}


class DeviceOperations:
    """`/v1/devices`."""

    def __init__(self, ring: KeyRing, hasher: TokenHasher, public_url: str, downlink: Downlink) -> None:
        self._cursors: Cursors[UUID] = Cursors(Seal(ring, "devices cursor"), UUID)
        self._hasher = hasher
        self._public_url = public_url.rstrip("/")
        self._downlink = downlink

    @operation(
        DEVICES, "GET", PATH, _READS, problems=[SITE_NOT_FOUND, ACCOUNT_NOT_FOUND, INVALID],
        example=Example(answer={"data": [_LISTED], "next_cursor": None, "has_more": False}),
    )  # fmt: skip
    async def list_devices(self, call: Call[Nothing, Listed, Nothing]) -> Devices:
        """List devices

        Of a site, or of a whole account; in the order in which they were created.
        """
        query, organisation = call.query, call.organisation
        if query.account_id is not None and query.account_id.value != organisation:
            raise Problem(ACCOUNT_NOT_FOUND)
        mark = (str(organisation), query.filter)
        after = self._cursors.take(mark, query.cursor)
        rows = await devices.find(call.connection, organisation, query.filter, after, query.limit + 1)
        page, more = cut(rows, query.limit)
        end = self._cursors.give(mark, UUID(int=page[-1]["device_id"].int)) if more else None
        return Devices([shown(row) for row in page], end, more)

    @operation(
        DEVICES, "POST", PATH, _CHANGES, status=201, repeatable=True,
        problems=[SITE_NOT_FOUND, LOCAL_ID_TAKEN, UNKNOWN_MODEL], example=Example(_NEW, _ISSUED),
    )  # fmt: skip
    async def create_device(self, call: Call[Nothing, Nothing, Create]) -> Reply[Issued]:
        """Create a device

        The answer has its ingest token, which is shown this once.
        """
        body, organisation = call.body, call.organisation
        new = NewDevice(
            body.name.value, body.local_id.value, body.model, "" if body.notes is None else body.notes.value
        )
        site = None if body.site_id is None else body.site_id.value
        device = await devices.create(call.connection, organisation, site, new)
        token = await Credentials(call.connection, self._hasher).add_device_token(organisation, device)
        row = await devices.get(call.connection, device)
        issued = self._issued(row, token)
        return Reply(issued, version=str(row["version"]), headers={"Location": f"{PATH}/{issued.id}"})

    @operation(DEVICES, "GET", _ONE, _READS, missing=DEVICE_NOT_FOUND)
    async def get_device(self, call: Call[OneDevice, Nothing, Nothing]) -> Reply[WholeDevice]:
        """Get a device"""
        return await _found(call, call.path.id.value)

    @operation(
        DEVICES, "PATCH", _ONE, _CHANGES, missing=DEVICE_NOT_FOUND, problems=[LOCAL_ID_TAKEN, STALE],
        example=Example({"name": "Walk-in fridge (front)"}),
    )  # fmt: skip
    async def update_device(self, call: Call[OneDevice, Nothing, Change]) -> Reply[WholeDevice]:
        """Update a device

        Its name, local_id and notes. A device goes to another site by being moved; one of another model is another.
        """
        device = call.path.id.value
        await devices.change(call.connection, device, call.versions, call.body.values)
        return await _found(call, device)

    @operation(DEVICES, "DELETE", _ONE, _CHANGES, status=204, missing=DEVICE_NOT_FOUND, problems=[STALE])
    async def delete_device(self, call: Call[OneDevice, Nothing, Nothing]) -> None:
        """Delete a device

        Its token ends at once. What it measured stays for the retention period, and goes on being found by its id.
        """
        await devices.remove(call.connection, call.path.id.value, call.versions)

    @operation(
        DEVICES, "POST", f"{_ONE}/move", _CHANGES, missing=DEVICE_NOT_FOUND,
        problems=[SITE_NOT_FOUND, LOCAL_ID_TAKEN, MOVE_LIMIT, STALE],
        example=Example({"to_site_id": _OTHER_SITE, "effective_at": "2026-05-17T08:30:00Z"}),
    )  # fmt: skip
    async def move_device(self, call: Call[OneDevice, Nothing, Move]) -> Moved:
        """Move a device to another site

        From `effective_at` on, in the past or the future, now by default; it replaces moves that were to follow.
        What the device measures belongs to the site at which it stood then.
        """
        device, body = call.path.id.value, call.body
        site = None if body.to_site_id is None else body.to_site_id.value
        at = None if body.effective_at is None else body.effective_at.value
        begun = await devices.move(call.connection, device, call.versions, site, at)
        row = await devices.get(call.connection, device)
        return Moved(
            id=str(call.path.id), site_id=site_text(row["site_id"]), to_site_id=site_text(site), effective_at=begun
        )

    @operation(
        DEVICES, "POST", f"{_ONE}/rotate-token", _CHANGES, missing=DEVICE_NOT_FOUND, repeatable=True,
        example=Example(answer=_ISSUED),
    )  # fmt: skip
    async def rotate_token(self, call: Call[OneDevice, Nothing, Nothing]) -> Issued:
        """Rotate a device's ingest token

        The answer has the new one, which is shown this once; the old one ends at once.
        """
        device = call.path.id.value
        credentials = Credentials(call.connection, self._hasher)
        token = await devices.rotate_token(call.connection, credentials, call.organisation, device)
        return self._issued(await devices.get(call.connection, device), token)

    @operation(
        DEVICES, "POST", f"{_ONE}/identify", _CHANGES, status=202, missing=DEVICE_NOT_FOUND,
        problems=[IDENTIFY_UNSUPPORTED],
    )  # fmt: skip
    async def identify_device(self, call: Call[OneDevice, Nothing, Nothing]) -> Asked:
        """Have a device make itself seen

        Best effort, for 30 s; many devices cannot be told.
        """
        row = await devices.get(call.connection, call.path.id.value)
        if not await self._downlink.identify(call.connection, call.organisation, call.path.id.value, row["model"]):
            raise Problem(IDENTIFY_UNSUPPORTED)
        return Asked(str(call.path.id), "sent")

    @operation(DEVICES, "GET", "/v1/models", _READS)
    async def list_models(self, call: Call[Nothing, Nothing, Nothing]) -> Models:
        """List the models that a device can be of"""
        return Models([shown_model(model) for model in MODELS.values()], None, False)

    def _issued(self, row: Any, token: str) -> Issued:
        return Issued(
            id=str(DeviceId(row["device_id"])),
            local_id=row["local_id"],
            ingest_token=token,
            ingest_url=ingest_url(self._public_url, row["model"], token),
            issued_at=row["moment"],
        )


async def _found(call: Call[Any, Any, Any], device: UUID) -> Reply[WholeDevice]:
    row = await devices.get(call.connection, device)
    return Reply(shown_whole(row), version=str(row["version"]))

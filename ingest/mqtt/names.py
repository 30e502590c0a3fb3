"""Devices that a topic calls as their site does: a prefix stands for the site, a name for the device.

A name that no device of the site has goes to the site's tray, where it has an id from the first message on: its
readings go one way then, whether they are held there or are the device's that it becomes. Left out: what is held
(`intake`), and how a tray is emptied (the registry).
"""

from typing import Final, NamedTuple
from uuid import UUID

from ingest.credentials import Credentials, Grant, SiteDevice, UnknownTokenError
from ingest.mqtt.topics import Kind, Target
from ingest.registry import Connections, ask
from runtime.ids import uuid7
from schemas.device_ids import device_id_of

_NOTE: Final = "SELECT note_unassigned($1, $2, $3, $4, $5, $6) AS unassigned_id"
_TIMEOUT_S: Final = 3.0
_TRAYS_MAX: Final = 20_000


class TrayFullError(Exception):
    """The site's tray has as many names as it may."""


class Bound(NamedTuple):
    """A target whose device is known, and the grant that it is judged by."""

    target: Target
    grant: Grant


class _InTray(NamedTuple):
    found: SiteDevice
    """That there is none: believed as long as this is."""
    unassigned: bytes


class Names:
    """Of one process."""

    def __init__(self, credentials: Credentials, pool: Connections, names_max: int) -> None:
        """`names_max`: in a site's tray."""
        self._credentials = credentials
        self._pool = pool
        self._names_max = names_max
        self._trays: dict[tuple[bytes, str], _InTray] = {}

    def cached(self, target: Target) -> Bound | None:
        """What `target` means, when it can be believed without asking."""
        site = self._credentials.cached(target.prefix)
        if site is None:
            return None
        found = self._credentials.cached_site_device(site, target.name)
        if found is None:
            return None
        if found.device is not None:
            grant = self._credentials.cached(found.device)
            return None if grant is None else _bound(target, site, found.device, grant)
        tray = self._trays.get((site.site or b"", target.name))
        if tray is None or tray.found is not found or target.kind is not Kind.READINGS:
            return None
        return _bound(target, site, tray.unassigned, site)

    async def find(self, target: Target) -> Bound:
        """Asks the database when it must.

        Raises `UnknownTokenError` for a prefix that is no site's, or a device that has just gone, `TrayFullError` for
        another name than the site's tray has room for, and `UnavailableError`.
        """
        site = await self._credentials.find([target.prefix])
        found = await self._credentials.site_device(site, target.name)
        if found.device is not None:
            return _bound(target, site, found.device, await self._credentials.find([found.device]))
        # Nothing is held of what a device says of itself, and no device can be called like the id of another.
        if target.kind is not Kind.READINGS or device_id_of(target.name) is not None:
            raise UnknownTokenError(asked=True)
        unassigned = await self._note(site, target)
        if len(self._trays) >= _TRAYS_MAX:
            self._trays.clear()
        self._trays[site.site or b"", target.name] = _InTray(found, unassigned)
        return _bound(target, site, unassigned, site)

    async def _note(self, site: Grant, target: Target) -> bytes:
        """The id that the name has in the tray; it is heard now."""
        ids = uuid7(), UUID(bytes=site.organisation), UUID(bytes=site.site)
        rows = await ask(
            self._pool, _NOTE, *ids, target.name, target.format.name, self._names_max, timeout_s=_TIMEOUT_S
        )
        unassigned: UUID | None = rows[0]["unassigned_id"]
        if unassigned is None:
            raise TrayFullError
        return unassigned.bytes


def _bound(target: Target, site: Grant, device: bytes, grant: Grant) -> Bound:
    bound = target._replace(
        organisation=site.organisation,
        device=device,
        zone=site.zone,
        temperature_unit=site.temperature_unit,
        is_unassigned=grant is site,
    )
    return Bound(bound, grant)

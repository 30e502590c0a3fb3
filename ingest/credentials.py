"""Who sends: tokens to grants, from a bounded cache that feels every change within a second.

An entry is believed while the database's epoch of changes is followed; a change names the token or device it
touches. While the database is away, what is known goes on being honoured. Left out: what a grant allows
(`ingest.http`), and how credentials are made (the registry).
"""

import asyncio
import logging
from collections.abc import Callable, Hashable, Iterable
from contextlib import suppress
from typing import Any, Final, Protocol, TypeVar
from uuid import UUID

import msgspec

from ingest.metrics import IngestMetrics
from ingest.plants import TEMPLATES, Plant, Plants
from ingest.registry import Connections, ask
from ingest.settings import IngestSettings
from runtime.clock import Clock
from runtime.errors import SluiceError, UnavailableError
from schemas.device_ids import device_id_of

_log = logging.getLogger("sluice.credentials")

_POLL_S: Final = 0.25
_TRUST_S: Final = 1.0
#: A database that hangs is known to be away before trust in what was read from it ends.
_POLL_TIMEOUT_S: Final = 0.7
_LOOKUP_TIMEOUT_S: Final = 3.0
_BATCH_MAX: Final = 500
_PENDING_MAX: Final = 20_000
_CHANGES_MAX: Final = 10_000
_UNKNOWN_TTL_S: Final = 60.0
_SILENCE_S: Final = 10.0
_CHANNEL: Final = "sluice_credentials"

_NEVER: Final = float("inf")

KNOWN: Final = ("known",)

_T = TypeVar("_T", bound=Hashable)


class Grant(msgspec.Struct, frozen=True, gc=False):
    """What a token stands for. Ids are 16 bytes; only a device's token has a `device`, only a gateway's a `site`."""

    kind: str
    organisation: bytes
    device: bytes | None
    site: bytes | None
    local_id: str
    suspended: bool
    retention_days: int
    expires_s: float
    """Unix seconds after which it is void."""
    token_hash: bytes
    """What it was looked up by: a token's hash, or the device's id."""
    epoch: int
    read_s: float
    """Monotonic seconds of the look-up."""
    limits: tuple[int | None, ...] | None = None
    """Overrides, its own and then its organisation's: requests and readings a minute, bytes a day; None: default."""
    plant: Plant | None = None
    """What is known of the plant that the device is; None for any other, and where nobody asks."""
    zone: str = "UTC"
    """Of a site that was found by its prefix at the broker: its time zone."""
    temperature_unit: str = "°C"
    """The same: of what its devices send without a unit."""


def names_device(grant: Grant, name: object) -> bool:
    """Whether what a body says of its device is the grant's own: nothing, its local id, or its id."""
    if name is None or name == grant.local_id:
        return True
    found = device_id_of(name) if type(name) is str else None
    return found is not None and found.bytes == grant.device


class SiteDevice(msgspec.Struct, frozen=True, gc=False):
    """A device as a gateway of its site knows it; `device` is None for a name that no device there has."""

    device: bytes | None
    suspended: bool
    epoch: int
    read_s: float
    """Monotonic seconds of the look-up."""
    ends_s: float
    """Monotonic seconds at which it moves away, if that is known already."""


class Listener(Protocol):
    """A session of its own that calls back for every notification on a channel."""

    async def listen(self, channel: str, callback: Callable[..., None]) -> None:
        """Returns when the session has ended. Raises `UnavailableError` when there cannot be one."""
        ...


class UnknownTokenError(Exception):
    """The token is none of ours, was revoked, or has expired."""

    def __init__(self, *, asked: bool) -> None:
        super().__init__()
        self.asked = asked
        """Whether the database had to be asked; it was known already, if not."""


_GRANTS: Final = """
    SELECT c.token_hash, c.kind, c.organisation_id, c.device_id, c.site_id, d.local_id, d.status,
           o.raw_retention_days, extract(epoch FROM c.expires_at)::float8 AS expires_s,
           (SELECT epoch FROM credential_epoch) AS epoch,
           CASE WHEN coalesce(own.subject_id, whole.subject_id) IS NOT NULL THEN
               ARRAY[own.requests_per_minute, own.readings_per_minute, own.bytes_per_day,
                     whole.requests_per_minute, whole.readings_per_minute, whole.bytes_per_day] END AS limits
    FROM credentials c
    JOIN organisations o ON o.organisation_id = c.organisation_id
    LEFT JOIN devices d ON d.device_id = c.device_id
    LEFT JOIN limit_overrides own ON own.subject_id = coalesce(c.device_id, c.site_id)
    LEFT JOIN limit_overrides whole ON whole.subject_id = c.organisation_id
    WHERE c.token_hash = ANY ($1) AND c.revoked_at IS NULL AND d.status IS DISTINCT FROM 'deleted'
"""

# The same of devices by their ids, for whom another has let in: a broker.
_DEVICES: Final = """
    SELECT uuid_send(d.device_id) AS token_hash, 'device' AS kind, d.organisation_id, d.device_id, NULL AS site_id,
           d.local_id, d.status, o.raw_retention_days, NULL AS expires_s,
           (SELECT epoch FROM credential_epoch) AS epoch,
           CASE WHEN coalesce(own.subject_id, whole.subject_id) IS NOT NULL THEN
               ARRAY[own.requests_per_minute, own.readings_per_minute, own.bytes_per_day,
                     whole.requests_per_minute, whole.readings_per_minute, whole.bytes_per_day] END AS limits,
           p.auth_method, p.secret, p.former_secret,
           (extract(epoch FROM p.former_secret_until) * 1e6)::float8 AS former_until_us,
           coalesce(p.template_id, p.system_template_id) AS plant_template
    FROM devices d
    JOIN organisations o ON o.organisation_id = d.organisation_id
    LEFT JOIN plants p ON p.device_id = d.device_id AND p.deleted_at IS NULL
    LEFT JOIN limit_overrides own ON own.subject_id = d.device_id
    LEFT JOIN limit_overrides whole ON whole.subject_id = d.organisation_id
    WHERE d.device_id = ANY ($1::uuid[]) AND d.status <> 'deleted'
"""
_DEVICE_ID_BYTES: Final = 16

# And of sites by their prefixes at the broker, which lets in who has the site's password.
_SITES: Final = """
    SELECT convert_to(b.prefix, 'UTF8') AS token_hash, 'gateway' AS kind, b.organisation_id, NULL AS device_id,
           b.site_id, NULL AS local_id, NULL AS status, o.raw_retention_days, NULL AS expires_s,
           (SELECT epoch FROM credential_epoch) AS epoch,
           CASE WHEN coalesce(own.subject_id, whole.subject_id) IS NOT NULL THEN
               ARRAY[own.requests_per_minute, own.readings_per_minute, own.bytes_per_day,
                     whole.requests_per_minute, whole.readings_per_minute, whole.bytes_per_day] END AS limits,
           s.timezone AS zone, '°' || b.temperature_unit AS temperature_unit
    FROM site_brokers b
    JOIN sites s ON s.site_id = b.site_id
    JOIN organisations o ON o.organisation_id = b.organisation_id
    LEFT JOIN limit_overrides own ON own.subject_id = b.site_id
    LEFT JOIN limit_overrides whole ON whole.subject_id = b.organisation_id
    WHERE b.prefix = ANY ($1::text[]) AND b.revoked_at IS NULL AND s.erasing_since IS NULL
"""
_PREFIX_BYTES: Final = 8

# Where each device stands now, and when that ends; by the name it has at the site, or by its id. No local id is spelt
# like an id any more; one from before gives way to the device whose id it is.
_SITE_DEVICE: Final = """
    SELECT d.device_id, d.status, (SELECT epoch FROM credential_epoch) AS epoch,
           (SELECT extract(epoch FROM min(n.valid_from) - now())::float8 FROM device_sites n
            WHERE n.device_id = d.device_id AND n.valid_from > now()) AS ends_in_s
    FROM device_sites s JOIN devices d ON d.device_id = s.device_id
    WHERE s.site_id = $1 AND (d.local_id = $2 OR d.device_id = $3) AND d.status <> 'deleted'
      AND s.valid_from = (SELECT max(h.valid_from) FROM device_sites h
                          WHERE h.device_id = s.device_id AND h.valid_from <= now())
    ORDER BY d.device_id = $3 DESC NULLS LAST, d.device_id LIMIT 1
"""


class Credentials:
    """The cache of one process. `start` begins to follow changes, `stop` ends it."""

    def __init__(
        self,
        pool: Connections,
        listener: Listener,
        settings: IngestSettings,
        clock: Clock,
        metrics: IngestMetrics,
        plants: Plants | None = None,
    ) -> None:
        """`plants`: for whoever takes plants' messages, what is read of them with their devices."""
        self._pool = pool
        self._plants = plants
        self._listener = listener
        self._settings = settings
        self._clock = clock
        self._lookups = metrics.credential_lookups
        self._known: dict[bytes, Grant] = {}
        self._unknown: dict[bytes, float] = {}
        self._site_devices: dict[tuple[bytes, str], SiteDevice] = {}
        self._common: dict[Hashable, Any] = {}
        self._read_s = float("-inf")
        self._changed: dict[bytes, int] = {}
        self._generation = 0
        self._epoch = -1
        self._trusted_until_s = 0.0
        self._followed_s = 0.0
        self._silent_until_s = 0.0
        self._away = False
        self._pending: dict[bytes, tuple[list[bytes], asyncio.Future[Grant | None]]] = {}
        self._wanted = asyncio.Event()
        self._moved = asyncio.Event()
        self.tasks: list[asyncio.Task[None]] = []
        """None of them ends by itself."""

    async def start(self) -> None:
        """Begin to follow. Does not wait for the database."""
        self._moved.set()  # nothing is kept before the first epoch has been read: at once
        self._followed_s = self._clock.monotonic()
        self.tasks = [
            asyncio.create_task(self._follow(), name="credentials follow"),
            asyncio.create_task(self._listen(), name="credentials listen"),
            asyncio.create_task(self._look_up_forever(), name="credentials look-up"),
        ]

    async def stop(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        for _, future in self._pending.values():
            if not future.done():
                future.set_exception(UnavailableError("the process is stopping"))

    @property
    def trouble(self) -> str | None:
        """Why credentials cannot be looked up right now; None when they can."""
        return "the database cannot be asked about credentials" if self._away else None

    @property
    def age_s(self) -> float:
        """Since changes were last read."""
        return self._clock.monotonic() - self._followed_s

    # ------------------------------------------------------------ use

    def cached(self, digest: bytes) -> Grant | None:
        """The grant, when it can be believed without asking."""
        grant = self._known.get(digest)
        if grant is None:
            return None
        now = self._clock.monotonic()
        if now >= self._trusted_until_s and not (
            self._away and now - self._followed_s < self._settings.credential_grace_s
        ):
            return None
        if self._changed and self._outdated(grant):
            return None
        if now - grant.read_s > self._settings.credential_refresh_s and not self._away:
            return None
        return None if self._expired(grant) else grant

    async def find(self, digests: list[bytes]) -> Grant:
        """The grant of a token by its digests, newest key first; asks the database when it must.

        The id of a device, 16 bytes, or the prefix of a site, 8, takes the place of digests where something else than
        a token tells who sends.
        Raises `UnknownTokenError`, and `UnavailableError` when that cannot be told.
        """
        grant = self.cached(digests[0])
        if grant is not None:
            self._lookups.add(KNOWN)
            return grant
        unknown_until_s = min(self._unknown.get(digests[0], 0.0), self._trusted_until_s)
        if self._clock.monotonic() < unknown_until_s and not self._away:
            self._lookups.add(("known_as_unknown",))
            raise UnknownTokenError(asked=False)
        self._lookups.add(("asked",))
        found = await self._ask(digests)
        if found is None or self._expired(found):
            raise UnknownTokenError(asked=True)
        return found

    def _expired(self, grant: Grant) -> bool:
        return grant.expires_s < _NEVER and self._clock.now_us() >= grant.expires_s * 1e6

    def _outdated(self, entry: Grant | SiteDevice) -> bool:
        changed = self._changed
        if entry.device is not None and changed.get(entry.device, -1) > entry.epoch:
            return True
        return isinstance(entry, Grant) and (
            changed.get(entry.token_hash, -1) > entry.epoch or changed.get(entry.organisation, -1) > entry.epoch
        )

    async def _ask(self, digests: list[bytes]) -> Grant | None:
        waiting = self._pending.get(digests[0])
        if waiting is None:
            if len(self._pending) >= _PENDING_MAX:
                raise UnavailableError("too many unknown credentials are being looked up")
            waiting = self._pending[digests[0]] = (digests, asyncio.get_running_loop().create_future())
            self._wanted.set()
        return await asyncio.shield(waiting[1])

    def cached_site_device(self, grant: Grant, name: str) -> SiteDevice | None:
        """The same, when it can be believed without asking."""
        known = self._site_devices.get((grant.site or b"", name))
        if known is not None and (self._fresh(known) or (self._away and self._honoured(known))):
            return known
        return None

    async def site_device(self, grant: Grant, name: str) -> SiteDevice:
        """The device that a gateway's site knows as `name` (its local id, or its id). Raises `UnavailableError`."""
        key = (grant.site or b"", name)
        known = self.cached_site_device(grant, name)
        if known is not None:
            return known
        known = self._site_devices.get(key)
        generation = self._generation
        try:
            found = await self._read_site_device(grant, name)
        except UnavailableError:
            if known is not None and self._honoured(known):
                return known
            raise
        if generation == self._generation:
            _make_room(self._site_devices, self._settings.credential_cache_entries_max)
            self._site_devices[key] = found
        return found

    def _fresh(self, entry: SiteDevice) -> bool:
        now = self._clock.monotonic()
        ttl = self._settings.credential_refresh_s
        if entry.device is None:
            ttl = 0.0 if self._away else min(ttl, _UNKNOWN_TTL_S)
        believed = now < self._trusted_until_s and now < entry.ends_s and now - entry.read_s < ttl
        return believed and not (self._changed and self._outdated(entry))

    def _honoured(self, entry: SiteDevice) -> bool:
        """Whether it still counts while nobody can be asked: only a device that was there does."""
        now = self._clock.monotonic()
        within = now - self._followed_s < self._settings.credential_grace_s and now < entry.ends_s
        return within and entry.device is not None and not self._outdated(entry)

    async def _read_site_device(self, grant: Grant, name: str) -> SiteDevice:
        site = UUID(bytes=grant.site or bytes(16))
        rows = await self._fetch(_SITE_DEVICE, site, name, device_id_of(name))
        now = self._clock.monotonic()
        if not rows:
            return SiteDevice(None, False, self._epoch, self._read_now_s(), _NEVER)
        row = rows[0]
        ends = now + row["ends_in_s"] if row["ends_in_s"] is not None else _NEVER
        suspended = row["status"] == "suspended"
        return SiteDevice(row["device_id"].bytes, suspended, self._same(row["epoch"]), self._read_now_s(), ends)

    # ------------------------------------------------------------ look-ups, many at a time

    async def _look_up_forever(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            while self._pending:
                await self._look_up(list(self._pending)[:_BATCH_MAX])

    async def _look_up(self, keys: list[bytes]) -> None:
        generation = self._generation
        waiting = {key: self._pending[key] for key in keys}
        try:
            rows, plants = await self._read([digest for digests, _ in waiting.values() for digest in digests])
        except UnavailableError as error:
            for key in keys:
                self._fail(key, error)
            return
        found = {row["token_hash"]: row for row in rows}
        for key in keys:
            digests, future = self._pending.pop(key)
            row = next((found[digest] for digest in digests if digest in found), None)
            grant = None if row is None else self._grant(row, plants.get(row["token_hash"]))
            if grant is not None and self._expired(grant):
                grant = None
            # What changed while we asked may not be in the answer: good for this use, not for later ones.
            if generation == self._generation:
                self._remember(key, grant)
            if not future.done():
                future.set_result(grant)

    async def _read(self, keys: list[bytes]) -> tuple[list[Any], dict[bytes, Plant]]:
        """The rows of grants by digest, device or prefix, and the plants among the devices.

        Raises `UnavailableError`.
        """
        devices = [UUID(bytes=key) for key in keys if len(key) == _DEVICE_ID_BYTES]
        prefixes = [key.decode() for key in keys if len(key) == _PREFIX_BYTES]
        digests = [key for key in keys if len(key) not in (_DEVICE_ID_BYTES, _PREFIX_BYTES)]
        found = await self._fetch(_DEVICES, devices) if devices else []
        plants = await self._read_plants([row for row in found if row["auth_method"] is not None])
        asked = ((_SITES, prefixes), (_GRANTS, digests))
        return found + [row for query, wanted in asked if wanted for row in await self._fetch(query, wanted)], plants

    async def _read_plants(self, rows: list[Any]) -> dict[bytes, Plant]:
        if self._plants is None or not rows:
            return {}
        wanted = {row["plant_template"] for row in rows} - {None}
        templates = await self._fetch(TEMPLATES, [*wanted], [*{row["organisation_id"] for row in rows}])
        make = self._plants.reader(templates)
        return {row["token_hash"]: make(row) for row in rows}

    def _fail(self, key: bytes, error: UnavailableError) -> None:
        _, future = self._pending.pop(key)
        known = self._known.get(key)
        if future.done():
            return
        since = self._clock.monotonic() - self._followed_s
        if known is not None and since < self._settings.credential_grace_s and not self._outdated(known):
            future.set_result(known)
        else:
            future.set_exception(error)
            future.exception()  # a caller that went away leaves nobody to take it

    def _grant(self, row: Any, plant: Plant | None) -> Grant:
        return Grant(
            self._same(row["kind"]),
            self._same(row["organisation_id"].bytes),
            row["device_id"].bytes if row["device_id"] else None,
            row["site_id"].bytes if row["site_id"] else None,
            row["local_id"] or "",
            row["status"] == "suspended",
            self._same(row["raw_retention_days"]),
            row["expires_s"] if row["expires_s"] is not None else _NEVER,
            row["token_hash"],
            self._same(row["epoch"]),
            self._read_now_s(),
            None if row["limits"] is None else self._same(tuple(row["limits"])),
            plant,
            self._same(row.get("zone", "UTC")),
            self._same(row.get("temperature_unit", "°C")),
        )

    def _same(self, value: _T) -> _T:
        """One object for all that are equal: entries are many, and have much in common."""
        found: _T | None = self._common.get(value)
        if found is None:
            _make_room(self._common, self._settings.credential_cache_entries_max)
            found = self._common[value] = value
        return found

    def _read_now_s(self) -> float:
        """For what has been read now: monotonic seconds, one object for a quarter of a second."""
        now = self._clock.monotonic()
        if now - self._read_s > _POLL_S:
            self._read_s = now
        return self._read_s

    def _remember(self, key: bytes, grant: Grant | None) -> None:
        self._known.pop(key, None)
        if grant is None:
            _make_room(self._unknown, self._settings.credential_unknown_entries_max)
            self._unknown[key] = self._clock.monotonic() + _UNKNOWN_TTL_S
            return
        # The digest is the stored hash but for tokens under an older key: one object serves for both.
        _make_room(self._known, self._settings.credential_cache_entries_max)
        self._known[grant.token_hash if grant.token_hash == key else key] = grant

    async def _fetch(self, query: str, *arguments: Any) -> list[Any]:
        try:
            return await ask(self._pool, query, *arguments, timeout_s=_LOOKUP_TIMEOUT_S)
        except UnavailableError:
            raise
        except Exception as error:
            # Whatever the database refuses, those who wait get an answer, and what follows changes goes on.
            now = self._clock.monotonic()
            if now >= self._silent_until_s:
                self._silent_until_s = now + _SILENCE_S
                _log.exception("the registry refuses a query: its schema or our rights are not what they should be")
            raise UnavailableError("the registry refuses to be asked") from error

    # ------------------------------------------------------------ following changes

    async def _listen(self) -> None:
        while True:
            with suppress(SluiceError):
                await self._listener.listen(_CHANNEL, self._on_notify)
            # Polling goes on meanwhile: a notification only makes a change felt sooner.
            await asyncio.sleep(1.0)

    def _on_notify(self, *_: object) -> None:
        """Something changed: what is being looked up right now may be outdated, and the change is read at once."""
        self._generation += 1
        self._moved.set()

    async def _follow(self) -> None:
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._moved.wait(), _POLL_S)
            self._moved.clear()
            began = self._clock.monotonic()
            try:
                async with asyncio.timeout(_POLL_TIMEOUT_S):
                    await self._poll()
            except (UnavailableError, TimeoutError) as error:
                if not self._away:
                    _log.warning(
                        "the database cannot be reached: known credentials are honoured, unknown ones get 503",
                        extra={"cause": repr(error.__cause__), "grace_s": self._settings.credential_grace_s},
                    )
                self._away = True
                continue
            if self._away:
                _log.info("the database is back: credentials are looked up again")
            self._away = False
            self._followed_s = began
            self._trusted_until_s = began + _TRUST_S

    async def _poll(self) -> None:
        rows = await self._fetch("SELECT epoch FROM credential_epoch")
        epoch = rows[0]["epoch"]
        if epoch == self._epoch:
            return
        if self._epoch < 0:
            self._forget_everything(epoch)
            return
        changes = await self._fetch(
            "SELECT epoch, token_hash, device_id, organisation_id FROM credential_changes"
            " WHERE epoch > $1 ORDER BY epoch LIMIT $2",
            self._epoch,
            _CHANGES_MAX + 1,
        )
        whole = bool(changes) and changes[0]["epoch"] == self._epoch + 1 and epoch > self._epoch
        if not whole or len(changes) > _CHANGES_MAX or len(self._changed) > _CHANGES_MAX:
            self._forget_everything(epoch)
        else:
            self._apply(changes)

    def _apply(self, changes: Iterable[Any]) -> None:
        self._generation += 1
        for change in changes:
            self._epoch = change["epoch"]
            self._unknown.clear()
            if change["token_hash"] is not None:
                self._changed[change["token_hash"]] = self._epoch
            if change["organisation_id"] is not None:
                self._changed[change["organisation_id"].bytes] = self._epoch
            if change["device_id"] is not None:
                self._changed[change["device_id"].bytes] = self._epoch
                # A name may stand for another device now, or for one where none was.
                self._site_devices.clear()

    def _forget_everything(self, epoch: int) -> None:
        self._generation += 1
        self._epoch = epoch
        for cache in (self._known, self._unknown, self._site_devices, self._changed, self._common):
            cache.clear()


def _make_room(cache: dict[Any, Any], entries_max: int) -> None:
    """Drop what was read longest ago: entries in use are read again from time to time, and stand at the end."""
    if len(cache) >= entries_max:
        del cache[next(iter(cache))]

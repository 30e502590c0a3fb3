"""How much a device, a gateway, an organisation or an unknown caller may send, and what was used of it.

A limit counts in windows: a minute, which begins at another second for every subject, so that those refused do not
all come back at once; or a day of UTC. Its counts are shared by the processes of the machine and outlive them. Left
out: how a refusal is worded for a protocol, and where counts are kept (`ingest.limits_table`).
"""

from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol
from zlib import crc32

from ingest.limits_table import COUNT_MAX, COUNTERS, MINUTE_US, Table, open_table
from runtime.clock import Clock
from runtime.settings import setting

_DAY_US: Final = 24 * 60 * MINUTE_US
#: What processes may take ahead of a limit, all of them together; and a process that is alone, since nobody misses it
#: (but of a day's limit, where a killed process would lose it for too long).
_AHEAD_SHARE: Final = 256
_AHEAD_SHARE_ALONE: Final = 16
_OVERRIDES: Final = 3


@dataclass(frozen=True, kw_only=True)
class LimitSettings:
    """What may be sent unless an override of the device, the site or the organisation says otherwise; 0: no limit."""

    limit_device_requests_per_minute: int = setting(
        60, unit="requests", least=0, most=COUNT_MAX, why="Of one device: a request a second, for ever."
    )
    limit_device_readings_per_minute: int = setting(
        30_000, unit="readings", least=0, most=COUNT_MAX,
        why="Of one device: 500 a second, or a backlog of a day in 1-second steps within three minutes.",
    )  # fmt: skip
    limit_device_bytes_per_day: int = setting(
        500_000_000, unit="bytes", least=0, most=COUNT_MAX,
        why="Bodies of one device, unpacked, per day of UTC: over a hundred readings a second all day.",
    )  # fmt: skip
    limit_gateway_requests_per_minute: int = setting(
        600, unit="requests", least=0, most=COUNT_MAX, why="Of a site's gateways: as ten devices, for they batch."
    )
    limit_gateway_readings_per_minute: int = setting(
        300_000, unit="readings", least=0, most=COUNT_MAX, why="Of a site's gateways: as ten devices."
    )
    limit_gateway_bytes_per_day: int = setting(
        5_000_000_000, unit="bytes", least=0, most=COUNT_MAX, why="Bodies of a site's gateways: as ten devices."
    )
    limit_organisation_requests_per_minute: int = setting(
        60_000, unit="requests", least=0, most=COUNT_MAX,
        why="Of all devices, gateways and keys of an organisation: stops a fleet run wild, not a large one.",
    )  # fmt: skip
    limit_organisation_readings_per_minute: int = setting(
        6_000_000, unit="readings", least=0, most=COUNT_MAX, why="Of an organisation: about what one machine lands."
    )
    limit_organisation_bytes_per_day: int = setting(
        100_000_000_000, unit="bytes", least=0, most=COUNT_MAX, why="Bodies of an organisation: 200 busy devices."
    )
    limit_unknown_requests_per_minute: int = setting(
        300, unit="requests", least=0, most=COUNT_MAX,
        why="Without a good token, per address (IPv6: per /64): a site of devices with revoked tokens is told so.",
    )  # fmt: skip
    limit_subjects_max: int = setting(
        131_072, unit="subjects", least=16, most=1 << 26,
        why="Devices, sites and organisations counted on a machine: twice as many as send on one day; 44 bytes each.",
    )  # fmt: skip
    limit_addresses_max: int = setting(
        32_768, unit="addresses", least=16, most=1 << 26,
        why="Addresses of unknown callers counted: apart from the others, so that an attack displaces none of them.",
    )  # fmt: skip


class Kind(NamedTuple):
    """What a limit counts, and over how long."""

    name: str
    counter: int
    window_us: int
    words: str
    """For people: 60 `requests a minute`."""

    @property
    def window_s(self) -> int:
        return self.window_us // 1_000_000


REQUESTS: Final = Kind("requests_per_minute", 0, MINUTE_US, "requests a minute")
READINGS: Final = Kind("readings_per_minute", 1, MINUTE_US, "readings a minute")
BYTES: Final = Kind("bytes_per_day", 2, _DAY_US, "bytes a day")
KINDS: Final = (REQUESTS, READINGS, BYTES)

Values = tuple[int, int, int]
Overrides = tuple[int | None, ...]


class Cost(NamedTuple):
    """What is used of limits, in the order of `KINDS`."""

    requests: int
    readings: int
    bytes: int


class Sender(Protocol):
    """Whose limits hold; a `Grant` is one. Ids are 16 bytes."""

    @property
    def kind(self) -> str: ...

    @property
    def organisation(self) -> bytes: ...

    @property
    def device(self) -> bytes | None: ...

    @property
    def site(self) -> bytes | None: ...

    @property
    def limits(self) -> Overrides | None:
        """Its own overrides, then those of its organisation."""
        ...


class LimitExceededError(Exception):
    """More than a limit allows: nothing was done, and nothing was counted."""

    def __init__(self, kind: Kind, scope: str, value: int, used: int, resets_in_s: int, wanted: int) -> None:
        self.kind = kind
        self.scope = scope
        self.value = value
        self.used = used
        self.resets_in_s = resets_in_s
        if wanted > value:
            what = f"{wanted} {kind.words.partition(' ')[0]} in one request are more than the {scope}'s whole limit"
            super().__init__(f"{what} of {value} {kind.words}: split it")
        else:
            super().__init__(
                f"the {scope}'s limit of {value} {kind.words} does not allow {wanted} more: "
                f"{used} used, resets in {resets_in_s} s"
            )

    def because(self, reason: str) -> "LimitExceededError":
        """The same, with why it was not paced either."""
        self.args = (f"{self}; {reason}",)
        return self


class Meter:
    """One limit of one subject.

    What is used is published before it is compared, so that processes which count at once may refuse too early, by
    one request each, and never allow too much. Some of a larger limit is taken ahead (`spare`), which spares the
    common case that.
    """

    __slots__ = (
        "_ahead", "_ahead_alone", "_begins_us", "_key", "_kind", "_phase_us", "_row", "_scope", "_slot", "_table",
        "_value", "_window", "ends_us", "spare",
    )  # fmt: skip

    def __init__(self, table: Table, key: bytes, scope: str, kind: Kind, value: int) -> None:
        self._table = table
        self._key = key
        self._scope = scope
        self._kind = kind
        self._value = value
        self._ahead = value // _AHEAD_SHARE
        self._ahead_alone = value // _AHEAD_SHARE_ALONE if kind.window_us == MINUTE_US else self._ahead
        self._phase_us = crc32(key) % MINUTE_US if kind.window_us == MINUTE_US else 0
        self._begins_us = self.ends_us = 0
        self._row = self._slot = self._window = 0
        self.spare = 0
        """Counted, but not used yet; whoever took from the meter, and then did nothing, adds it here."""

    def take(self, amount: int, now_us: int) -> bool:
        """Whether so much more is allowed; then it is counted."""
        if amount <= self.spare and now_us < self.ends_us:
            self.spare -= amount
            return True
        table = self._table
        if not self._begins_us <= now_us < self.ends_us or not table.holds(self._row, self._key):
            self._turn(now_us)
        least = amount - self.spare
        count = table.own(self._slot, self._window)
        ahead = self._ahead_alone if table.columns == 1 else self._ahead // table.columns
        for more in (ahead, least) if ahead > least else (least,):
            if table.put(self._slot, self._window, count + more) <= self._value:
                self.spare += more - amount
                return True
        table.put(self._slot, self._window, count)
        return False

    def used(self, now_us: int) -> int:
        """By all processes, with what the others have taken ahead."""
        table = self._table
        if not self._begins_us <= now_us < self.ends_us or not table.holds(self._row, self._key):
            self._turn(now_us)
        return table.put(self._slot, self._window, table.own(self._slot, self._window)) - self.spare

    def is_full(self, now_us: int) -> bool:
        return self.used(now_us) >= self._value

    def left(self, share: float, now_us: int) -> int:
        """How much more keeps use within a share of the limit: of a minute's, of what has passed of the minute."""
        used = self.used(now_us)
        if self._kind.window_us == MINUTE_US:
            share *= (now_us - self._begins_us) / MINUTE_US
        return max(0, ceil(self._value * share) - used)

    def seconds_for(self, amount: int, share: float, now_us: int) -> float:
        """How long so much will take at a share of the limit, which all processes use alike; 0 if left today."""
        permitted = self._value * share
        if self._kind.window_us == MINUTE_US:
            return amount / permitted * self._kind.window_s * self._table.processes()
        beyond = amount - self.left(share, now_us)
        return 0.0 if beyond <= 0 else (self.ends_us - now_us) / 1e6 + beyond // permitted * self._kind.window_s

    def exceeded(self, wanted: int, now_us: int) -> LimitExceededError:
        used = self.used(now_us)
        resets_in_s = max(1, -((now_us - self.ends_us) // 1_000_000))
        return LimitExceededError(self._kind, self._scope, self._value, used, resets_in_s, wanted)

    def _turn(self, now_us: int) -> None:
        """To another window, or a row that is the subject's."""
        kind = self._kind
        window = (now_us + self._phase_us) // kind.window_us
        self._begins_us = window * kind.window_us - self._phase_us
        self.ends_us = self._begins_us + kind.window_us
        self._window = window
        self._row = self._table.find(self._key)
        self._slot = self._row * COUNTERS + kind.counter
        self.spare = 0


class _Account:
    """The meters that one sender's requests run through."""

    __slots__ = ("bytes", "overrides", "readings", "requests")

    def __init__(self, overrides: Overrides | None, meters: list[Meter | None]) -> None:
        self.overrides = overrides
        #: Each its own first, then its organisation's.
        self.requests, self.readings, self.bytes = (
            tuple(meter for meter in meters[kind.counter :: len(KINDS)] if meter is not None) for kind in KINDS
        )


class Limits:
    """The limits of one process's callers."""

    def __init__(self, settings: LimitSettings, clock: Clock, directory: Path) -> None:
        self._clock = clock
        self._subjects = open_table(settings.limit_subjects_max, clock, directory / "subjects")
        self._addresses = open_table(settings.limit_addresses_max, clock, directory / "addresses")
        self._subjects_max = settings.limit_subjects_max
        self._addresses_max = settings.limit_addresses_max
        self._unknown_max = settings.limit_unknown_requests_per_minute
        self._defaults = defaults(settings)
        self._accounts: dict[bytes, _Account] = {}
        self._organisations: dict[bytes, tuple[Values, list[Meter | None]]] = {}
        self._strangers: dict[bytes, Meter] = {}

    def close(self) -> None:
        self._subjects.close()
        self._addresses.close()

    # ------------------------------------------------------------ those we know

    def request(self, grant: Sender, now_us: int) -> None:
        """Count a request. Raises `LimitExceededError`."""
        for meter in (meters := self._account(grant).requests):
            if meter.spare and now_us < meter.ends_us:  # what `take` does first, without the call
                meter.spare -= 1
            elif not meter.take(1, now_us):
                raise _refused(meters, meter, 1, now_us)

    def volume(self, grant: Sender, readings: int, size: int) -> None:
        """Count a request's readings and bytes: both, or none. Raises `LimitExceededError`."""
        account = self._account(grant)
        now_us = self._clock.now_us()
        for meter in account.readings:
            if readings <= meter.spare and now_us < meter.ends_us:
                meter.spare -= readings
            elif not meter.take(readings, now_us):
                raise _refused(account.readings, meter, readings, now_us)
        for meter in account.bytes:
            if size <= meter.spare and now_us < meter.ends_us:
                meter.spare -= size
            elif not meter.take(size, now_us):
                for counted in account.readings:
                    counted.spare += readings
                raise _refused(account.bytes, meter, size, now_us)

    def pay(self, sender: Sender, owed: Cost, share: float) -> Cost:
        """Count as much of what is owed as a share of the limits has left by now; what is still owed then."""
        account, now_us = self._account(sender), self._clock.now_us()
        return Cost(
            owed.requests - _taken(account.requests, owed.requests, share, now_us),
            owed.readings - _taken(account.readings, owed.readings, share, now_us),
            owed.bytes - _taken(account.bytes, owed.bytes, share, now_us),
        )

    def seconds_for(self, sender: Sender, cost: Cost, share: float) -> float:
        """How long it will take until so much is permitted at a share of the limits, if nobody else uses them."""
        account, now_us = self._account(sender), self._clock.now_us()
        kinds = (account.requests, account.readings, account.bytes)
        return max(
            (
                meter.seconds_for(amount, share, now_us)
                for meters, amount in zip(kinds, cost, strict=True)
                for meter in meters
            ),
            default=0.0,
        )

    def _account(self, grant: Sender) -> _Account:
        key = grant.device or grant.site or grant.organisation
        account = self._accounts.get(key)
        if account is None or account.overrides is not grant.limits:
            account = self._open(key, account, grant)
        return account

    def _open(self, key: bytes, present: _Account | None, grant: Sender) -> _Account:
        if present is not None and present.overrides == grant.limits:
            present.overrides = grant.limits
            return present
        overrides: Overrides = grant.limits or (None,) * (2 * _OVERRIDES)
        meters = self._organisation(grant.organisation, overrides[_OVERRIDES:])
        if grant.kind != "api_key":
            values = _values(overrides[:_OVERRIDES], self._defaults[grant.kind])
            meters = self._meters(key, grant.kind, values) + meters
        account = _Account(grant.limits, meters)
        _make_room(self._accounts, self._subjects_max)
        self._accounts[key] = account
        return account

    def _organisation(self, key: bytes, overrides: Overrides) -> list[Meter | None]:
        values = _values(overrides, self._defaults["organisation"])
        present = self._organisations.get(key)
        if present is not None and present[0] == values:
            return present[1]
        meters = self._meters(key, "organisation", values)
        _make_room(self._organisations, self._subjects_max)
        self._organisations[key] = (values, meters)
        return meters

    def _meters(self, key: bytes, scope: str, values: Values) -> list[Meter | None]:
        return [
            Meter(self._subjects, key, scope, kind, value) if value else None
            for kind, value in zip(KINDS, values, strict=True)
        ]

    # ------------------------------------------------------------ those we do not

    def check_stranger(self, address: bytes) -> None:
        """Before somebody is looked up: raises `LimitExceededError` where too many from there were not known."""
        if self._unknown_max and (meter := self._strangers.get(address)) is not None:
            now_us = self._clock.now_us()
            if meter.is_full(now_us):
                raise meter.exceeded(1, now_us)

    def count_stranger(self, address: bytes) -> None:
        """A request from there had no good token. Raises `LimitExceededError`."""
        if not self._unknown_max:
            return
        meter = self._strangers.get(address)
        if meter is None:
            _make_room(self._strangers, self._addresses_max)
            meter = Meter(self._addresses, address, "address", REQUESTS, self._unknown_max)
            self._strangers[address] = meter
        now_us = self._clock.now_us()
        if not meter.take(1, now_us):
            raise meter.exceeded(1, now_us)


def defaults(settings: LimitSettings) -> dict[str, Values]:
    """What applies without an override, by kind of credential, and to an organisation."""
    return {
        "device": (
            settings.limit_device_requests_per_minute,
            settings.limit_device_readings_per_minute,
            settings.limit_device_bytes_per_day,
        ),
        "gateway": (
            settings.limit_gateway_requests_per_minute,
            settings.limit_gateway_readings_per_minute,
            settings.limit_gateway_bytes_per_day,
        ),
        "organisation": (
            settings.limit_organisation_requests_per_minute,
            settings.limit_organisation_readings_per_minute,
            settings.limit_organisation_bytes_per_day,
        ),
    }


def _values(overrides: Overrides, otherwise: Values) -> Values:
    requests, readings, size = (
        default if own is None else own for own, default in zip(overrides, otherwise, strict=True)
    )
    return requests, readings, size


def _taken(meters: tuple[Meter, ...], wanted: int, share: float, now_us: int) -> int:
    """How much was counted, with all of them or none."""
    amount = wanted and min([wanted, *(meter.left(share, now_us) for meter in meters)])
    if amount:
        for meter in meters:
            if not meter.take(amount, now_us):  # another process was first
                _refused(meters, meter, amount, now_us)
                return 0
    return amount


def _refused(meters: tuple[Meter, ...], refusing: Meter, amount: int, now_us: int) -> LimitExceededError:
    """What those before it counted is given back."""
    for meter in meters:
        if meter is refusing:
            break
        meter.spare += amount
    return refusing.exceeded(amount, now_us)


def _make_room(cache: dict[bytes, Any], entries_max: int) -> None:
    """Forget what was opened first: it is opened again when it is needed, and its counts are not kept here."""
    if len(cache) >= entries_max:
        del cache[next(iter(cache))]

"""How much a device, a gateway, an organisation or an unknown caller may send, and what was used of it.

A limit counts in windows: a minute, which begins at another second for every subject, so that those refused do not
all come back at once; or a day of UTC. Its counts are shared by the processes of the machine and outlive them. Left
out: how a refusal is worded for a protocol, and where counts are kept (`ingest.limits_table`).
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Final, NamedTuple, Protocol
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
#: What overrides come to is remembered for so many that differ; most senders have none, or those of a tariff.
_ALLOWANCES_MAX: Final = 10_000


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
        why="Devices, sites and organisations counted: twice as many as send a day; 44 bytes each, 52 a process.",
    )  # fmt: skip
    limit_addresses_max: int = setting(
        32_768, unit="addresses", least=16, most=1 << 26,
        why="Addresses of unknown callers counted: apart from the others, so that an attack displaces none of them.",
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Kind:
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


class Allowance:
    """What a subject may use. One object serves all that may use the same."""

    __slots__ = ("rows", "scope", "values")

    def __init__(self, scope: str, values: Values) -> None:
        self.scope = scope
        self.values = values
        """In the order of `KINDS`; 0: no limit."""
        self.rows: dict[bytes, int] = {}
        """Where each of the subjects stands that this process has counted lately."""


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
        self.is_beyond = wanted > value
        """Whether no wait would help."""
        if self.is_beyond:
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


#: Of a sender itself and of its organisation; None where nothing is limited.
Allowances = tuple[Allowance | None, Allowance | None]
_NOTHING_ALLOWED: Final = Allowance("", (0, 0, 0))
_NO_OVERRIDES: Final[Overrides] = (None,) * (2 * _OVERRIDES)


class Meters:
    """The limits of all subjects of a table, and what this process has taken ahead of them.

    What is used is published before it is compared, so that processes which count at once may refuse too early, by
    one request each, and never allow too much. Some of a larger limit is taken ahead (`spare`), which spares the
    common case that. All of it stands in plain numbers by the table's rows: objects would take ten times the room.
    """

    def __init__(self, table: Table) -> None:
        rows = table.rows
        self.table = table
        self.requests, self.readings, self.bytes = self.spare = tuple(array("Q", bytes(8 * rows)) for _ in KINDS)
        """By row: counted, but not used yet; whoever took some, and then did nothing, adds it here."""
        self.ends_us = array("Q", bytes(8 * rows))
        """By row: until when that may be used, for it was counted in a window that ends then."""
        self._phases_us = array("I", bytes(4 * rows))
        self._keys = [b""] * rows
        self._allowances = [_NOTHING_ALLOWED] * rows

    def row(self, key: bytes, allowance: Allowance, now_us: int) -> int:
        """Where a subject stands; what is spare there may be used now."""
        row = allowance.rows.get(key)
        return self.settle(key, allowance, now_us) if row is None or now_us >= self.ends_us[row] else row

    def take(self, row: int, kind: Kind, amount: int, now_us: int) -> bool:
        """Whether so much more is allowed; then it is counted."""
        if now_us >= self.ends_us[row] or not self.table.holds(row, self._keys[row]):
            row = self._find_again(row, now_us)
        number = kind.counter
        spares = self.spare[number]
        spare = spares[row]
        if amount <= spare:
            spares[row] = spare - amount
            return True
        value = self._allowances[row].values[number]
        if not value:
            spares[row] = COUNT_MAX  # enough not to be asked about again for long
            return True
        table, slot, window = self.table, row * COUNTERS + number, self._window(row, kind, now_us)
        least = amount - spare
        count = table.own(slot, window)
        ahead = value // (_AHEAD_SHARE_ALONE if table.columns == 1 and kind is not BYTES else _AHEAD_SHARE)
        ahead //= table.columns
        if ahead > least and table.put(slot, window, count + ahead) <= value:
            spares[row] = spare + ahead - amount
            return True
        if table.put(slot, window, count + least) <= value:
            spares[row] = 0
            return True
        table.put(slot, window, count)
        return False

    def refused(self, rows: Sequence[int], refusing: int, kind: Kind, amount: int, now_us: int) -> LimitExceededError:
        """One of the rows does not allow it: what those before it counted is given back."""
        self.give_back(rows[: rows.index(refusing)], kind, amount)
        return self.exceeded(refusing, kind, amount, now_us)

    def give_back(self, rows: Sequence[int], kind: Kind, amount: int) -> None:
        """It was counted, and then not used."""
        for row in rows:
            self.spare[kind.counter][row] += amount

    def used(self, row: int, kind: Kind, now_us: int) -> int:
        """By all processes, with what the others have taken ahead."""
        if now_us >= self.ends_us[row] or not self.table.holds(row, self._keys[row]):
            row = self._find_again(row, now_us)
        table, slot, window = self.table, row * COUNTERS + kind.counter, self._window(row, kind, now_us)
        return table.put(slot, window, table.own(slot, window)) - self.spare[kind.counter][row]

    def is_full(self, row: int, kind: Kind, now_us: int) -> bool:
        return self.used(row, kind, now_us) >= self._allowances[row].values[kind.counter]

    def left(self, row: int, kind: Kind, share: float, now_us: int) -> int | None:
        """How much more keeps use within a share of the limit: of a minute's, of what has passed of the minute.

        None without a limit.
        """
        value = self._allowances[row].values[kind.counter]
        if not value:
            return None
        if kind.window_us == MINUTE_US:
            share *= self._passed_us(row, kind, now_us) / MINUTE_US
        return max(0, ceil(value * share) - self.used(row, kind, now_us))

    def seconds_for(self, row: int, kind: Kind, amount: int, share: float, now_us: int) -> float:
        """How long so much will take at a share of the limit, which all processes use alike; 0 if left today."""
        left = self.left(row, kind, share, now_us)
        if left is None:
            return 0.0
        permitted = self._allowances[row].values[kind.counter] * share
        if kind.window_us == MINUTE_US:
            return amount / permitted * kind.window_s * self.table.processes()
        beyond = amount - left
        return 0.0 if beyond <= 0 else self._left_us(row, kind, now_us) / 1e6 + beyond // permitted * kind.window_s

    def exceeded(self, row: int, kind: Kind, wanted: int, now_us: int) -> LimitExceededError:
        allowance = self._allowances[row]
        resets_in_s = max(1, -(-self._left_us(row, kind, now_us) // 1_000_000))
        used = self.used(row, kind, now_us)
        return LimitExceededError(kind, allowance.scope, allowance.values[kind.counter], used, resets_in_s, wanted)

    # ------------------------------------------------------------ windows, and whose a row is

    def _window(self, row: int, kind: Kind, now_us: int) -> int:
        return now_us // _DAY_US if kind is BYTES else (now_us + self._phases_us[row]) // MINUTE_US

    def _passed_us(self, row: int, kind: Kind, now_us: int) -> int:
        return now_us % _DAY_US if kind is BYTES else (now_us + self._phases_us[row]) % MINUTE_US

    def _left_us(self, row: int, kind: Kind, now_us: int) -> int:
        return kind.window_us - self._passed_us(row, kind, now_us)

    def _find_again(self, row: int, now_us: int) -> int:
        """Where the row's subject stands by now."""
        return self.settle(self._keys[row], self._allowances[row], now_us)

    def settle(self, key: bytes, allowance: Allowance, now_us: int) -> int:
        """Where a subject stands, in another minute, under another allowance, or in another row than before."""
        row, is_new = self.table.find(key, now_us)
        if is_new or self._keys[row] != key:
            self._claim(row, key)
        elif now_us >= self.ends_us[row]:
            self.requests[row] = self.readings[row] = 0
            if self.ends_us[row] <= now_us - now_us % _DAY_US:
                self.bytes[row] = 0
        if allowance is not self._allowances[row]:
            self._change(row, allowance, now_us)
        elsewhere = allowance.rows.get(key, row)
        if elsewhere != row:  # another process gave that one away
            self._clear(elsewhere)
        allowance.rows[key] = row
        minute_ends_us = now_us + MINUTE_US - (now_us + self._phases_us[row]) % MINUTE_US
        self.ends_us[row] = min(minute_ends_us, now_us + _DAY_US - now_us % _DAY_US)
        return row

    def _claim(self, row: int, key: bytes) -> None:
        """The row is the subject's from now on, which has nothing there yet."""
        former = self._allowances[row].rows
        if former.get(self._keys[row]) == row:
            del former[self._keys[row]]
        self._keys[row] = key
        self._phases_us[row] = crc32(key) % MINUTE_US
        self._allowances[row] = _NOTHING_ALLOWED

    def _change(self, row: int, allowance: Allowance, now_us: int) -> None:
        """What is spare was taken under another allowance: it is as good as never counted."""
        former = self._allowances[row]
        for kind, value in zip(KINDS, former.values, strict=True):
            if value and (spare := self.spare[kind.counter][row]):
                slot, window = row * COUNTERS + kind.counter, self._window(row, kind, now_us)
                self.table.put(slot, window, max(0, self.table.own(slot, window) - spare))
        former.rows.pop(self._keys[row], None)
        self._clear(row)
        self._allowances[row] = allowance

    def _clear(self, row: int) -> None:
        self.ends_us[row] = self.requests[row] = self.readings[row] = self.bytes[row] = 0


class Limits:
    """The limits of one process's callers."""

    def __init__(self, settings: LimitSettings, clock: Clock, directory: Path) -> None:
        self._clock = clock
        self._subjects = Meters(open_table(settings.limit_subjects_max, clock, directory / "subjects"))
        self._addresses = Meters(open_table(settings.limit_addresses_max, clock, directory / "addresses"))
        unknown_max = settings.limit_unknown_requests_per_minute
        self._unknown = Allowance("address", (unknown_max, 0, 0)) if unknown_max else None
        self._defaults = defaults(settings)
        self._allowances: dict[tuple[str, Values], Allowance] = {}
        self._resolved: dict[str, dict[Overrides | None, Allowances]] = {
            kind: {} for kind in ("device", "gateway", "api_key")
        }
        #: Whose request was counted last, and in which rows: its volume nearly always comes next.
        self._latest: Sender | None = None
        self._latest_rows: Sequence[int] = ()

    def close(self) -> None:
        self._subjects.table.close()
        self._addresses.table.close()

    # ------------------------------------------------------------ those we know

    def request(self, sender: Sender, now_us: int) -> None:
        """Count a request. Raises `LimitExceededError`."""
        rows = self._latest_rows = self._rows(sender, now_us)
        self._latest = sender
        subjects = self._subjects
        spare = subjects.requests
        for row in rows:
            if left := spare[row]:
                spare[row] = left - 1
            elif not subjects.take(row, REQUESTS, 1, now_us):
                raise subjects.refused(rows, row, REQUESTS, 1, now_us)

    def volume(self, sender: Sender, readings: int, size: int) -> None:
        """Count a request's readings and bytes: both, or none. Raises `LimitExceededError`."""
        rows = self._latest_rows if sender is self._latest else self._rows(sender, self._clock.now_us())
        self._latest = None
        subjects = self._subjects
        spare = subjects.readings
        for row in rows:
            if readings <= (left := spare[row]):
                spare[row] = left - readings
            elif not subjects.take(row, READINGS, readings, now_us := self._clock.now_us()):
                raise subjects.refused(rows, row, READINGS, readings, now_us)
        spare = subjects.bytes
        for row in rows:
            if size <= (left := spare[row]):
                spare[row] = left - size
            elif not subjects.take(row, BYTES, size, now_us := self._clock.now_us()):
                subjects.give_back(rows, READINGS, readings)
                raise subjects.refused(rows, row, BYTES, size, now_us)

    def pay(self, sender: Sender, owed: Cost, share: float) -> Cost:
        """Count as much of what is owed as a share of the limits has left by now; what is still owed then."""
        now_us = self._clock.now_us()
        rows = self._rows(sender, now_us)
        return Cost(*(self._pay(rows, kind, amount, share, now_us) for kind, amount in zip(KINDS, owed, strict=True)))

    def _pay(self, rows: Sequence[int], kind: Kind, owed: int, share: float, now_us: int) -> int:
        """Of one kind. What is permitted is counted in all of the rows or in none."""
        subjects = self._subjects
        left = [left for row in rows if (left := subjects.left(row, kind, share, now_us)) is not None] if owed else []
        amount = min([owed, *left])
        for row in rows if amount else ():
            if not subjects.take(row, kind, amount, now_us):  # another process was first
                subjects.refused(rows, row, kind, amount, now_us)
                return owed
        return owed - amount

    def seconds_for(self, sender: Sender, cost: Cost, share: float) -> float:
        """How long it will take until so much is permitted at a share of the limits, if nobody else uses them."""
        now_us = self._clock.now_us()
        rows = self._rows(sender, now_us)
        return max(
            (
                self._subjects.seconds_for(row, kind, amount, share, now_us)
                for kind, amount in zip(KINDS, cost, strict=True)
                for row in rows
            ),
            default=0.0,
        )

    def _rows(self, sender: Sender, now_us: int) -> Sequence[int]:
        """Where its own use is counted, and its organisation's."""
        self._latest = None  # whom it displaces has other rows than were known
        subjects, organisation = self._subjects, sender.organisation
        allowances = self._resolved[sender.kind].get(sender.limits)
        own, whole = self._resolve(sender) if allowances is None else allowances
        if own is None:
            return () if whole is None else (subjects.row(organisation, whole, now_us),)
        key, ends_us = sender.device or sender.site or b"", subjects.ends_us
        # As `Meters.row`, without the calls.
        mine = own.rows.get(key)
        if mine is None or now_us >= ends_us[mine]:
            mine = subjects.settle(key, own, now_us)
        if whole is None:
            return (mine,)
        theirs = whole.rows.get(organisation)
        if theirs is None or now_us >= ends_us[theirs]:
            theirs = subjects.settle(organisation, whole, now_us)
            if theirs == mine:  # in a table that is too small one may displace the other
                return (theirs,)
        return mine, theirs

    def _resolve(self, sender: Sender) -> Allowances:
        """What it may use by its overrides; remembered."""
        kind, overrides = sender.kind, sender.limits or _NO_OVERRIDES
        if max(len(self._allowances), len(self._resolved[kind])) >= _ALLOWANCES_MAX:
            self._allowances.clear()
            for resolved in self._resolved.values():
                resolved.clear()
        whole = self._allowance("organisation", overrides[_OVERRIDES:])
        own = self._allowance(kind, overrides[:_OVERRIDES]) if kind != "api_key" else None
        self._resolved[kind][sender.limits] = own, whole
        return own, whole

    def _allowance(self, scope: str, overrides: Overrides) -> Allowance | None:
        """One object for equal ones: an organisation has one, whoever sends. None without any limit."""
        values = _values(overrides, self._defaults[scope])
        return self._allowances.setdefault((scope, values), Allowance(scope, values)) if any(values) else None

    # ------------------------------------------------------------ those we do not

    def check_stranger(self, address: bytes) -> None:
        """Before somebody is looked up: raises `LimitExceededError` where too many from there were not known."""
        if self._unknown is not None and address in self._unknown.rows:
            now_us = self._clock.now_us()
            row = self._addresses.row(address, self._unknown, now_us)
            if self._addresses.is_full(row, REQUESTS, now_us):
                raise self._addresses.exceeded(row, REQUESTS, 1, now_us)

    def count_stranger(self, address: bytes) -> None:
        """A request from there had no good token. Raises `LimitExceededError`."""
        if self._unknown is None:
            return
        now_us = self._clock.now_us()
        row = self._addresses.row(address, self._unknown, now_us)
        if not self._addresses.take(row, REQUESTS, 1, now_us):
            raise self._addresses.exceeded(row, REQUESTS, 1, now_us)


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

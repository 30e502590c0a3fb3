"""What plants send and what they are sent: snapshots, commands and their answers, whether they are there.

The one place that knows these shapes on the plants' side. Left out: sending them (`bench.simulator.device`).
"""

import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Final, Literal, NamedTuple
from uuid import UUID

import orjson

from schemas.plants import topic
from schemas.signing import NotCanonicalError, command_parts, is_signed, signature, snapshot_parts

NONCE_BYTES: Final = 8
TYPES: Final = ("METER", "INVERTER", "BATTERY")
ACKNOWLEDGED, SUCCESS, FAILED = "ACKNOWLEDGED", "SUCCESS", "FAILED"
OFFLINE: Final = orjson.dumps({"status": "offline"})
ONLINE: Final = orjson.dumps({"status": "online"})

_DAY_S: Final = 86_400
_WATT_HOURS_A_KILO: Final = 1_000
_PEAK_W: Final = 5_000.0


@dataclass(frozen=True)
class Identity:
    """Who a plant is, and how it proves it."""

    plant: UUID
    organisation: UUID
    secret: bytes
    """Of its signatures."""

    def topic(self, kind: str) -> str:
        return topic(self.plant, kind)


class Outgoing(NamedTuple):
    """A message as it is sent, each time with the same bytes."""

    topic: str
    payload: bytes


class Command(NamedTuple):
    """What a plant is to do."""

    command: str
    """Its id."""
    action: str
    payload: Any


class BadCommandError(ValueError):
    """What came is no command, or is signed by somebody else."""


Form = Literal["snapshot", "readings"]


class Measuring:
    """The devices behind one plant: their values follow the time of day, their counters only rise."""

    def __init__(self, devices: int, random: Random) -> None:
        self._names = [f"{TYPES[number % len(TYPES)]}-{number // len(TYPES) + 1}" for number in range(devices)]
        self._random = random
        self._counted_s: float | None = None
        self._kwh = [random.uniform(0, 50_000) for _ in range(devices)]

    def at(self, now_s: float) -> list[dict[str, Any]]:
        """By device, as a snapshot has them. `now_s`: Unix seconds, never before those of the last call."""
        passed_s = 0.0 if self._counted_s is None else now_s - self._counted_s
        self._counted_s = now_s
        return [self._device(number, name, now_s, passed_s) for number, name in enumerate(self._names)]

    def _device(self, number: int, name: str, now_s: float, passed_s: float) -> dict[str, Any]:
        kind = TYPES[number % len(TYPES)]
        sun = max(0.0, math.sin((now_s % _DAY_S / _DAY_S - 0.25) * 2 * math.pi))
        power = round(_PEAK_W * (0.1 + 0.9 * sun) * self._random.uniform(0.9, 1.1), 1)
        self._kwh[number] += power * passed_s / 3_600 / _WATT_HOURS_A_KILO
        kwh = round(self._kwh[number], 6)
        values: Mapping[str, float] = {
            "METER": {"power": power, "imported": kwh, "exported": round(kwh / 3, 6)},
            "INVERTER": {"power": power, "produced": kwh},
            "BATTERY": {"power": round(power - _PEAK_W / 2, 1), "soc": round(10 + 80 * sun, 1)},
        }[kind]
        return {"externalId": name, "type": kind, "values": values}


def snapshot(who: Identity, devices: Sequence[Mapping[str, Any]], now_ms: int) -> Outgoing:
    """What all devices of a plant measure now, signed."""
    nonce = secrets.token_hex(NONCE_BYTES)
    signed = signature(who.secret, *snapshot_parts(str(who.plant), now_ms, nonce, now_ms, devices))
    envelope = {"ts": now_ms, "n": nonce, "sig": signed, "timestamp": now_ms, "devices": devices}
    return Outgoing(who.topic("telemetry"), orjson.dumps(envelope))


def readings(who: Identity, devices: Sequence[Mapping[str, Any]], now_ms: int) -> Outgoing:
    """The same powers as any device sends them, where a plant's envelope is not what is measured."""
    measured = [
        {"type": "power", "label": one["externalId"], "value": one["values"]["power"], "ts": now_ms}
        for one in devices
    ]
    return Outgoing(f"v1/readings/{who.organisation}/{who.plant}", orjson.dumps({"measurements": measured}))


def understand(who: Identity, payload: bytes) -> Command:
    """Raises `BadCommandError`."""
    try:
        said = orjson.loads(payload)
        command, ts, action, given = said["cmdId"], said["ts"], said["action"], said.get("payload", {})
        whom = said.get("target") or str(who.plant)  # a device behind the plant, or the plant itself
        parts = command_parts(whom, str(command), ts, str(action), given)
        is_ours = is_signed(who.secret, str(said["sig"]), *parts)
    except (ValueError, KeyError, TypeError, AttributeError, NotCanonicalError) as error:
        raise BadCommandError("no command") from error
    if not is_ours:
        raise BadCommandError("the signature is not right")
    return Command(str(command), str(action), given)


def answers(who: Identity, command: Command) -> Iterator[Outgoing]:
    """Heard, then done."""
    where = who.topic("ack")
    yield Outgoing(where, orjson.dumps({"cmdId": command.command, "status": ACKNOWLEDGED}))
    done = {"action": command.action, "payload": command.payload}
    yield Outgoing(where, orjson.dumps({"cmdId": command.command, "status": SUCCESS, "response": done}))

"""The topics that are taken: each is a small declaration, and each family of them has a session of its own.

A family's filters share no topic with another's, and once it was released a pattern never moves to another family:
two sessions would have its messages, and none could tell. Left out: what a message holds (`ingest.formats`).
"""

import re
from collections.abc import Callable
from enum import StrEnum
from typing import Final, NamedTuple
from uuid import UUID

from ingest.admit import Sent
from ingest.formats import measurements_json, shelly_gen1, shelly_rpc, tasmota
from ingest.formats.shape import Submission


class Kind(StrEnum):
    """What a message of a topic is about."""

    READINGS = "readings"
    SNAPSHOT = "snapshot"
    """Readings too, in a plant's envelope (`ingest.mqtt.snapshots`)."""
    WILL = "will"
    """Whether a device is connected: its last will, or what it says itself."""
    INFO = "info"
    """What a device says of itself."""
    CONFIG = "config"
    """How it is set up."""
    HEALTH = "health"
    """How it is."""
    ANSWER = "answer"
    """To a command."""
    ALARM = "alarm"


#: Whose messages are readings; others are what devices say of themselves.
WITH_READINGS: Final = frozenset({Kind.READINGS, Kind.SNAPSHOT})
#: What is as true when it is told again to who subscribes.
RETAINED: Final = frozenset({Kind.INFO, Kind.CONFIG, Kind.HEALTH})


class Voice(StrEnum):
    """Whether a device says the same twice, on two topics."""

    ONLY = "only"
    FIRST = "first"
    """With its time."""
    ECHO = "echo"
    """Once more, without: of a device that says it first, nothing of this is taken."""


class Format(NamedTuple):
    """What the payloads of a topic are."""

    name: str
    decode: "Callable[[bytes, Target], list[Submission]]"
    """Raises `BodyError`."""
    sent: Callable[[bytes], Sent] | None = None
    """Finds a measurement as it was sent, where that is one text."""


def _decode_json(payload: bytes, _: "Target") -> list[Submission]:
    return measurements_json.decode(payload)


JSON: Final = Format("json", _decode_json, measurements_json.Sent)
GEN1: Final = Format("shelly_gen1", shelly_gen1.decode)
RPC: Final = Format("shelly_rpc", shelly_rpc.decode_notification)
RPC_STATUS: Final = Format("shelly_rpc", shelly_rpc.decode_status)
TASMOTA_SENSOR: Final = Format("tasmota", tasmota.decode_sensor)
TASMOTA_STATE: Final = Format("tasmota", tasmota.decode_state)


class Topic(NamedTuple):
    """A pattern: `{organisation}` and `{device}` (or `{plant}`) stand for ids, everything else for itself.

    `{prefix}/{name}` stand for a site and for what it knows a device by, `{word}` for what a format is told.
    """

    pattern: str
    kind: Kind = Kind.READINGS
    format: Format = JSON
    voice: Voice = Voice.ONLY

    @property
    def filter(self) -> str:
        return re.sub(r"\{\w+\}", "+", self.pattern)


class Family(NamedTuple):
    """Topics that are taken by one session, so that what a device sends to them stays in order."""

    name: str
    topics: tuple[Topic, ...]


class Target(NamedTuple):
    """What a topic says."""

    kind: Kind
    organisation: bytes | None
    """16 bytes; None where only the registry knows."""
    device: bytes
    """16 bytes; until its site has been asked for it, what stands for a name (`prefix`)."""
    format: Format = JSON
    voice: Voice = Voice.ONLY
    prefix: bytes = b""
    """Of a site, where the topic names the device as the site knows it; empty where it has the device's id."""
    name: str = ""
    words: tuple[str, ...] = ()
    """Behind the device."""
    zone: str = "UTC"
    temperature_unit: str = "°C"
    is_unassigned: bool = False
    """No device of the site has the name yet: `device` is what it has in the tray."""


READINGS: Final = Family("readings", (Topic("v1/readings/{organisation}/{device}"),))
_SHELLY: Final = "shellies/{prefix}/{name}"
OPENSENSE: Final = Family(
    "opensense",
    (
        Topic("opensense/{organisation}/{device}"),
        Topic("opensense/{organisation}/{device}/lwt", Kind.WILL),
    ),
)
#: What the database has to have before it is acknowledged: while that is away, these wait and readings do not.
PLANT_EVENTS: Final = Family(
    "plant-events",
    (
        Topic("cpi/{plant}/ack", Kind.ANSWER),
        Topic("cpi/{plant}/alarm", Kind.ALARM),
        Topic("cpi/{plant}/status", Kind.WILL),
        Topic("cpi/{plant}/info", Kind.INFO),
        Topic("cpi/{plant}/config", Kind.CONFIG),
        Topic("v1/gateways/{organisation}/{device}/health", Kind.HEALTH),
        Topic("v1/gateways/{organisation}/{device}/status", Kind.WILL),
        Topic("v1/gateways/{organisation}/{device}/config/reported", Kind.CONFIG),
        Topic("v1/gateways/{organisation}/{device}/commands/response", Kind.ANSWER),
        Topic("opensense/{organisation}/{device}/info", Kind.INFO),
        Topic(f"{_SHELLY}/announce", Kind.INFO),
        Topic(f"{_SHELLY}/info", Kind.INFO),
    ),
)
PLANTS: Final = Family("plants", (Topic("cpi/{plant}/telemetry", Kind.SNAPSHOT),))
_GEN1: Final = (
    "sensor/{word}", "relay/{word}", "relay/{word}/power", "relay/{word}/energy", "light/{word}/power",
    "light/{word}/energy", "roller/{word}/power", "roller/{word}/energy", "emeter/{word}/power",
    "emeter/{word}/reactive_power", "emeter/{word}/voltage", "emeter/{word}/current", "emeter/{word}/pf",
    "emeter/{word}/total", "emeter/{word}/total_returned", "ext_temperature/{word}", "ext_humidity/{word}",
    "adc/{word}", "temperature", "voltage",
)  # fmt: skip
#: Both generations: what is before `events` or `sensor` is set by whoever owns the device.
SHELLY: Final = Family(
    "shelly",
    (
        Topic(f"{_SHELLY}/events/rpc", format=RPC, voice=Voice.FIRST),
        Topic(f"{_SHELLY}/status/{{word}}", format=RPC_STATUS, voice=Voice.ECHO),
        Topic(f"{_SHELLY}/online", Kind.WILL),
        *(Topic(f"{_SHELLY}/{what}", format=GEN1) for what in _GEN1),
    ),
)
_TASMOTA: Final = "tele/{prefix}/{name}"
TASMOTA: Final = Family(
    "tasmota",
    (
        Topic(f"{_TASMOTA}/SENSOR", format=TASMOTA_SENSOR),
        Topic(f"{_TASMOTA}/STATE", format=TASMOTA_STATE),
        Topic(f"{_TASMOTA}/LWT", Kind.WILL),
    ),
)
FAMILIES: Final = (READINGS, OPENSENSE, PLANTS, SHELLY, TASMOTA, PLANT_EVENTS)

#: As the API spells ids: a UUID with or without hyphens, behind a prefix or not.
_PREFIXES: Final = {"organisation": "(?:acc_)?", "device": "(?:dev_)?", "plant": ""}
_HEX: Final = "[0-9a-fA-F]"
_UUID: Final = f"{_HEX}{{32}}|{_HEX}{{8}}(?:-{_HEX}{{4}}){{3}}-{_HEX}{{12}}"
#: As sites are given theirs (`api.registry.site_brokers`): neither as long as a device's id nor as a token's hash.
_PREFIX: Final = "[a-z2-7]{8}"
#: As a device's local id is spelt.
_NAME: Final = "[A-Za-z0-9][A-Za-z0-9._:-]{0,63}"
_LEVELS: Final = {
    "organisation": _UUID, "device": _UUID, "plant": _UUID, "prefix": _PREFIX, "name": _NAME,
    "word": "[ -.0-~]{1,64}",
}  # fmt: skip


class _Pattern(NamedTuple):
    expression: "re.Pattern[bytes]"
    topic: Topic


class Router:
    """Reads the topics of one family; remembers those it has read, up to a bound."""

    def __init__(self, family: Family, cache_max: int) -> None:
        self._patterns = [_Pattern(re.compile(_expression(topic.pattern).encode()), topic) for topic in family.topics]
        self._cache_max = cache_max
        self.known: dict[bytes, Target] = {}

    def find(self, topic: bytes) -> Target | None:
        """None for a topic that is none of the family's."""
        for expression, declared in self._patterns:
            found = expression.fullmatch(topic)
            if found is not None:
                target = _target(declared, found.groupdict(), topic)
                if len(self.known) >= self._cache_max:
                    self.known.clear()
                self.known[topic] = target
                return target
        return None


def _target(topic: Topic, levels: dict[str, bytes], whole: bytes) -> Target:
    kind, said, voice = topic.kind, topic.format, topic.voice
    if "prefix" not in levels:
        ids = {name: UUID(raw.decode()).bytes for name, raw in levels.items()}
        return Target(kind, ids.get("organisation"), ids["plant" if "plant" in ids else "device"], said, voice)
    prefix, name = levels["prefix"], levels["name"]
    words = tuple(whole.decode().split("/")[3:])
    return Target(kind, None, prefix + b"/" + name, said, voice, prefix, name.decode(), words)


def _expression(pattern: str) -> str:
    parts = re.split(r"\{(\w+)\}", pattern)
    text = re.escape(parts[0])
    for name, literal in zip(parts[1::2], parts[2::2], strict=True):
        text += f"{_PREFIXES.get(name, '')}(?P<{name}>{_LEVELS[name]}){re.escape(literal)}"
    return text

"""The topics that are taken: each is a small declaration, and each family of them has a session of its own.

A family's filters share no topic with another's, and once it was released a pattern never moves to another family:
two sessions would have its messages, and none could tell. Left out: what a message holds (`ingest.formats`).
"""

import re
from enum import StrEnum
from typing import Final, NamedTuple
from uuid import UUID


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


class Topic(NamedTuple):
    """A pattern: `{organisation}` and `{device}` (or `{plant}`) stand for ids, everything else for itself."""

    pattern: str
    kind: Kind = Kind.READINGS

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
    """16 bytes."""


READINGS: Final = Family("readings", (Topic("v1/readings/{organisation}/{device}"),))
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
    ),
)
PLANTS: Final = Family("plants", (Topic("cpi/{plant}/telemetry", Kind.SNAPSHOT),))
FAMILIES: Final = (READINGS, OPENSENSE, PLANTS, PLANT_EVENTS)

#: As the API spells ids: a UUID with or without hyphens, behind a prefix or not.
_PREFIXES: Final = {"organisation": "(?:acc_)?", "device": "(?:dev_)?", "plant": ""}
_HEX: Final = "[0-9a-fA-F]"
_UUID: Final = f"{_HEX}{{32}}|{_HEX}{{8}}(?:-{_HEX}{{4}}){{3}}-{_HEX}{{12}}"


class Router:
    """Reads the topics of one family; remembers those it has read, up to a bound."""

    def __init__(self, family: Family, cache_max: int) -> None:
        self._patterns = [(re.compile(_expression(topic.pattern).encode()), topic.kind) for topic in family.topics]
        self._cache_max = cache_max
        self.known: dict[bytes, Target] = {}

    def find(self, topic: bytes) -> Target | None:
        """None for a topic that is none of the family's."""
        for pattern, kind in self._patterns:
            found = pattern.fullmatch(topic)
            if found is not None:
                ids = {name: UUID(raw.decode()).bytes for name, raw in found.groupdict().items()}
                target = Target(kind, ids.get("organisation"), ids["plant" if "plant" in ids else "device"])
                if len(self.known) >= self._cache_max:
                    self.known.clear()
                self.known[topic] = target
                return target
        return None


def _expression(pattern: str) -> str:
    parts = re.split(r"\{(\w+)\}", pattern)
    text = re.escape(parts[0])
    for name, literal in zip(parts[1::2], parts[2::2], strict=True):
        text += f"{_PREFIXES[name]}(?P<{name}>{_UUID}){re.escape(literal)}"
    return text

"""The few requests that aiokafka has only in versions without topic ids: metadata, produce, fetch, create.

A topic id names one topic for ever: a record sent to an id cannot end up in a topic made anew under the same name.
Left out: connections, and requests that aiokafka has in a version that serves.
"""

# mypy: disallow-subclassing-any=False

import base64
import struct
from io import SEEK_CUR, BytesIO
from typing import Any, Final

from aiokafka.protocol.abstract import AbstractType
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.types import (
    Boolean,
    CompactArray,
    CompactBytes,
    CompactString,
    Int8,
    Int16,
    Int32,
    Int64,
    Schema,
    TaggedFields,
    UnsignedVarInt32,
)

NO_TOPIC_ID: Final = bytes(16)
NO_TAGS: Final[dict[int, bytes]] = {}
ACKS_ALL: Final = -1
CONSUMER: Final = -1  # as opposed to the id of a replica that follows
NO_SESSION: Final = (0, -1)
UNKNOWN_EPOCH: Final = -1
NEWEST: Final = -1
OLDEST: Final = -2


def spell_topic_id(topic_id: bytes) -> str:
    """As Kafka's own tools print it."""
    return base64.urlsafe_b64encode(topic_id).decode("ascii").rstrip("=")


class TopicId(AbstractType[bytes]):
    @classmethod
    def encode(cls, value: bytes) -> bytes:
        return value

    @classmethod
    def decode(cls, data: BytesIO) -> bytes:
        return data.read(16)


TEXT: Final = CompactString("utf-8")
TAGS: Final = ("tags", TaggedFields)


class MetadataResponse(Response):
    API_KEY = 3
    API_VERSION = 12
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        ("brokers", CompactArray(("node_id", Int32), ("host", TEXT), ("port", Int32), ("rack", TEXT), TAGS)),
        ("cluster_id", TEXT),
        ("controller_id", Int32),
        (
            "topics",
            CompactArray(
                ("error_code", Int16),
                ("name", TEXT),
                ("topic_id", TopicId),
                ("is_internal", Boolean),
                (
                    "partitions",
                    CompactArray(
                        ("error_code", Int16),
                        ("partition", Int32),
                        ("leader", Int32),
                        ("leader_epoch", Int32),
                        ("replicas", CompactArray(Int32)),
                        ("in_sync", CompactArray(Int32)),
                        ("offline", CompactArray(Int32)),
                        TAGS,
                    ),
                ),
                ("authorized_operations", Int32),
                TAGS,
            ),
        ),
        TAGS,
    )


class MetadataStruct(RequestStruct):
    API_KEY = 3
    API_VERSION = 12
    FLEXIBLE_VERSION = True
    RESPONSE_TYPE = MetadataResponse
    SCHEMA = Schema(
        ("topics", CompactArray(("topic_id", TopicId), ("name", TEXT), TAGS)),
        ("create_missing", Boolean),
        ("with_authorized_operations", Boolean),
        TAGS,
    )


class MetadataRequest(Request[MetadataStruct]):
    """Brokers, and one topic by name. Never makes the topic."""

    API_KEY = 3

    def __init__(self, topic: str) -> None:
        self._topic = topic

    def build(self, request_struct_class: type[MetadataStruct]) -> MetadataStruct:
        return request_struct_class([(NO_TOPIC_ID, self._topic, NO_TAGS)], False, False, NO_TAGS)


PARTITION: Final = struct.Struct(">i")
TAGLESS: Final = b"\x00"
#: The fields of `Written`, and how its last three look where there are no errors of records, no message and no tags.
WRITTEN: Final = struct.Struct(">ihqqqBBB")
NOTHING_MORE: Final = b"\x01\x00\x00"


class Batches(AbstractType[Any]):
    """The batches of a produce request, (partition, records) each, in one go: field by field takes three times it."""

    @classmethod
    def encode(cls, value: list[tuple[int, bytearray]]) -> bytes:
        pieces: list[bytes | bytearray] = [UnsignedVarInt32.encode(len(value) + 1)]
        for partition, records in value:
            pieces += (PARTITION.pack(partition), UnsignedVarInt32.encode(len(records) + 1), records, TAGLESS)
        return b"".join(pieces)


class Written(AbstractType[Any]):
    """What became of each batch: in one piece where it was written, field by field where there is more to tell."""

    FIELDS = Schema(
        ("partition", Int32),
        ("error_code", Int16),
        ("base_offset", Int64),
        ("log_append_time", Int64),
        ("log_start_offset", Int64),
        ("record_errors", CompactArray(("index", Int32), ("message", TEXT), TAGS)),
        ("error_message", TEXT),
        TAGS,
    )

    @classmethod
    def decode(cls, data: BytesIO) -> list[Any]:
        found: list[Any] = []
        for _ in range(UnsignedVarInt32.decode(data) - 1):
            piece = data.read(WRITTEN.size)
            if piece.endswith(NOTHING_MORE):
                *fields, _, _, _ = WRITTEN.unpack(piece)
                found.append((*fields, (), None, NO_TAGS))
            else:
                data.seek(-len(piece), SEEK_CUR)
                found.append(cls.FIELDS.decode(data))
        return found


def _produce_response(topic: tuple[str, Any]) -> Schema:
    return Schema(
        ("topics", CompactArray(topic, ("partitions", Written), TAGS)),
        ("throttle_time_ms", Int32),
        TAGS,
    )


def _produce_request(topic: tuple[str, Any]) -> Schema:
    return Schema(
        ("transactional_id", TEXT),
        ("acks", Int16),
        ("timeout_ms", Int32),
        ("topics", CompactArray(topic, ("partitions", Batches), TAGS)),
        TAGS,
    )


class ProduceResponseByName(Response):
    API_KEY = 0
    API_VERSION = 9
    SCHEMA = _produce_response(("name", TEXT))


class ProduceByName(RequestStruct):
    """For brokers before 4.1."""

    API_KEY = 0
    API_VERSION = 9
    FLEXIBLE_VERSION = True
    RESPONSE_TYPE = ProduceResponseByName
    SCHEMA = _produce_request(("name", TEXT))


class ProduceResponseById(Response):
    API_KEY = 0
    API_VERSION = 13
    SCHEMA = _produce_response(("topic_id", TopicId))


class ProduceById(RequestStruct):
    API_KEY = 0
    API_VERSION = 13
    FLEXIBLE_VERSION = True
    RESPONSE_TYPE = ProduceResponseById
    SCHEMA = _produce_request(("topic_id", TopicId))


class ProduceRequest(Request[ProduceByName | ProduceById]):
    """Batches for some partitions of one topic, to be acknowledged by every replica in sync."""

    API_KEY = 0

    def __init__(self, topic: str, topic_id: bytes, timeout_ms: int, batches: list[tuple[int, bytearray]]) -> None:
        self._topic = topic
        self._topic_id = topic_id
        self._timeout_ms = timeout_ms
        self._batches = batches

    def build(self, request_struct_class: type[ProduceByName | ProduceById]) -> ProduceByName | ProduceById:
        topic: bytes | str = self._topic_id if request_struct_class is ProduceById else self._topic
        return request_struct_class(None, ACKS_ALL, self._timeout_ms, [(topic, self._batches, NO_TAGS)], NO_TAGS)


class FetchResponse(Response):
    API_KEY = 1
    API_VERSION = 13
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        ("error_code", Int16),
        ("session_id", Int32),
        (
            "topics",
            CompactArray(
                ("topic_id", TopicId),
                (
                    "partitions",
                    CompactArray(
                        ("partition", Int32),
                        ("error_code", Int16),
                        ("high_watermark", Int64),
                        ("last_stable_offset", Int64),
                        ("log_start_offset", Int64),
                        ("aborted", CompactArray(("producer_id", Int64), ("first_offset", Int64), TAGS)),
                        ("preferred_replica", Int32),
                        ("records", CompactBytes),
                        TAGS,
                    ),
                ),
                TAGS,
            ),
        ),
        TAGS,
    )


class FetchStruct(RequestStruct):
    API_KEY = 1
    API_VERSION = 13
    FLEXIBLE_VERSION = True
    RESPONSE_TYPE = FetchResponse
    SCHEMA = Schema(
        ("replica_id", Int32),
        ("wait_ms_max", Int32),
        ("bytes_min", Int32),
        ("bytes_max", Int32),
        ("isolation_level", Int8),
        ("session_id", Int32),
        ("session_epoch", Int32),
        (
            "topics",
            CompactArray(
                ("topic_id", TopicId),
                (
                    "partitions",
                    CompactArray(
                        ("partition", Int32),
                        ("leader_epoch", Int32),
                        ("offset", Int64),
                        ("last_fetched_epoch", Int32),
                        ("log_start_offset", Int64),
                        ("bytes_max", Int32),
                        TAGS,
                    ),
                ),
                TAGS,
            ),
        ),
        ("forgotten", CompactArray(("topic_id", TopicId), ("partitions", CompactArray(Int32)), TAGS)),
        ("rack", TEXT),
        TAGS,
    )


class FetchRequest(Request[FetchStruct]):
    """What stands at these positions, answered as soon as there is anything."""

    API_KEY = 1

    def __init__(
        self,
        topic_id: bytes,
        positions: list[tuple[int, int]],
        *,
        wait_ms: int,
        bytes_max: int,
    ) -> None:
        self._topic_id = topic_id
        self._positions = positions
        self._wait_ms = wait_ms
        self._bytes_max = bytes_max

    def build(self, request_struct_class: type[FetchStruct]) -> FetchStruct:
        partitions = [
            (partition, UNKNOWN_EPOCH, position, UNKNOWN_EPOCH, -1, self._bytes_max, NO_TAGS)
            for partition, position in self._positions
        ]
        topics = [(self._topic_id, partitions, NO_TAGS)]
        return request_struct_class(
            CONSUMER, self._wait_ms, 1, self._bytes_max, 0, *NO_SESSION, topics, [], "", NO_TAGS
        )


class CreateTopicResponse(Response):
    API_KEY = 19
    API_VERSION = 7
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "topics",
            CompactArray(
                ("name", TEXT),
                ("topic_id", TopicId),
                ("error_code", Int16),
                ("error_message", TEXT),
                ("partitions", Int32),
                ("replication", Int16),
                (
                    "configs",
                    CompactArray(
                        ("name", TEXT),
                        ("value", TEXT),
                        ("read_only", Boolean),
                        ("source", Int8),
                        ("is_sensitive", Boolean),
                        TAGS,
                    ),
                ),
                TAGS,
            ),
        ),
        TAGS,
    )


class CreateTopicStruct(RequestStruct):
    API_KEY = 19
    API_VERSION = 7
    FLEXIBLE_VERSION = True
    RESPONSE_TYPE = CreateTopicResponse
    SCHEMA = Schema(
        (
            "topics",
            CompactArray(
                ("name", TEXT),
                ("partitions", Int32),
                ("replication", Int16),
                ("assignments", CompactArray(("partition", Int32), ("brokers", CompactArray(Int32)), TAGS)),
                ("configs", CompactArray(("name", TEXT), ("value", TEXT), TAGS)),
                TAGS,
            ),
        ),
        ("timeout_ms", Int32),
        ("validate_only", Boolean),
        TAGS,
    )


class CreateTopicRequest(Request[CreateTopicStruct]):
    """One topic; a replication of -1 takes the brokers' default."""

    API_KEY = 19

    def __init__(
        self, topic: str, partitions: int, replication: int, configs: dict[str, str], timeout_ms: int
    ) -> None:
        self._topic = topic
        self._partitions = partitions
        self._replication = replication
        self._configs = configs
        self._timeout_ms = timeout_ms

    def build(self, request_struct_class: type[CreateTopicStruct]) -> CreateTopicStruct:
        configs = [(name, value, NO_TAGS) for name, value in self._configs.items()]
        no_assignments: list[Any] = []
        topics = [(self._topic, self._partitions, self._replication, no_assignments, configs, NO_TAGS)]
        return request_struct_class(topics, self._timeout_ms, False, NO_TAGS)

"""Connections to the brokers of one topic, and what the brokers say about it.

Of aiokafka this uses the connections (framing, TLS, SASL, versions) and the record batches, not its producer and
consumer, which hide what the log's contract needs: whether a batch may have been written, and to which topic.
Left out: records (`kafka_writer`, `kafka_reader`).
"""

import asyncio
import logging
import random
import ssl
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

from aiokafka.conn import AIOKafkaConnection, create_conn
from aiokafka.errors import (
    IllegalSaslStateError,
    KafkaError,
    SaslAuthenticationFailed,
    UnsupportedSaslMechanismError,
    for_code,
)
from aiokafka.protocol.api import Request
from aiokafka.protocol.coordination import FindCoordinatorRequest
from aiokafka.protocol.offset import OffsetRequest
from aiokafka.protocol.transaction import InitProducerIdRequest

from runtime.errors import ConfigurationError, UnavailableError
from runtime.log.kafka_address import Address
from runtime.log.kafka_wire import (
    CONSUMER,
    NEWEST,
    OLDEST,
    CreateTopicStruct,
    FetchStruct,
    MetadataRequest,
    MetadataStruct,
    ProduceByName,
    spell_topic_id,
)
from runtime.log.port import NEW_GENERATION, Bounds, LogMisfitError

NO_ERROR: Final = 0
UNKNOWN_TOPIC: Final = 3
NO_LEADER: Final = -1
NAMES: Final = {74: "FencedLeaderEpoch", 75: "UnknownLeaderEpoch", 78: "OffsetNotAvailable", 100: "UnknownTopicId"}
CONTROL: Final = -1  # the connection for questions that any broker answers, beside those by node
GROUP: Final = 0
RETRY_S: Final = 0.05
TRANSACTION_TIMEOUT_MS: Final = 2**31 - 1  # a transaction is never begun

logging.getLogger("aiokafka").setLevel(logging.WARNING)  # it tells of every connection

REQUESTS_NEEDED: Final = (ProduceByName, FetchStruct, MetadataStruct, CreateTopicStruct)

# What aiokafka lets through when a broker cannot be reached, does not answer, or hangs up.
LINK_ERRORS: Final = (OSError, KafkaError, EOFError)


_LOGIN_ERRORS: Final = (SaslAuthenticationFailed, UnsupportedSaslMechanismError, IllegalSaslStateError)


class LoginRefusedError(UnavailableError):
    """A broker does not take the user, password or mechanism that SLUICE_LOG_URL gives."""


class _NotLetInError(KafkaError):  # type: ignore[misc]
    """The same, for whoever speaks to one broker."""


class TopicMissingError(UnavailableError):
    """No broker knows the topic; one that has just started may say so of any."""


class Topic(NamedTuple):
    """What the brokers say of the topic; `leaders[partition]` is a node, or NO_LEADER."""

    topic_id: bytes
    leaders: tuple[int, ...]
    replication: int


class Cluster:
    """One event loop's connections, at most one a broker and one more for questions; made when first needed."""

    def __init__(
        self, address: Address, *, name: str, identity: str | None, client_id: str, timeout_s: float
    ) -> None:
        self.name = name
        self.topic: Topic | None = None
        self._address = address
        self._identity = identity
        self._client_id = client_id
        self.timeout_s = timeout_s
        self._brokers: dict[int, tuple[str, int]] = {}
        self._connections: dict[int, AIOKafkaConnection] = {}
        self._locks: dict[int, asyncio.Lock] = {}

    async def refresh(self) -> Topic:
        """Ask again for the brokers and the topic's leaders.

        Raises `UnavailableError` when nobody answers (a `TopicMissingError` when they know no such topic), and
        `LogMisfitError` when the name belongs to another topic by now.
        """
        response = await self.ask(MetadataRequest(self.name))
        self._brokers = {node: (host, port) for node, host, port, *_ in response.brokers} or self._brokers
        error, _, topic_id, _, partitions, *_ = response.topics[0]
        if error == UNKNOWN_TOPIC:
            raise TopicMissingError(f"Kafka knows no topic {self.name}")
        if error != NO_ERROR:
            raise UnavailableError(f"topic {self.name}: {describe(error)}")
        found = spell_topic_id(topic_id)
        if self._identity not in (None, found):
            raise LogMisfitError(
                f"topic {self.name} has the id {found}, the database knows the log as {self._identity}: "
                f"it was made anew under the same name. {NEW_GENERATION.capitalize()}"
            )
        leaders = dict.fromkeys(range(len(partitions)), NO_LEADER)
        leaders.update({partition: leader for _, partition, leader, *_ in partitions})
        replication = min((len(replicas) for _, _, _, _, replicas, *_ in partitions), default=0)
        self.topic = Topic(topic_id, tuple(leaders.values()), replication)
        return self.topic

    async def ask(self, request: Request[Any]) -> Any:
        """The answer of any broker. Raises `UnavailableError`."""
        try:
            return await self.send(CONTROL, request)
        except _NotLetInError as error:
            raise LoginRefusedError(explain(error)) from error
        except LINK_ERRORS as error:
            raise UnavailableError(f"Kafka cannot be reached: {explain(error)}") from error

    async def send(self, node: int, request: Request[Any]) -> Any:
        """The answer of this broker. Raises one of `LINK_ERRORS`; the connection is then closed."""
        connection = await self.connection(node)
        try:
            return await connection.send(request)
        except LINK_ERRORS:
            self.drop(node, connection)
            raise

    async def connection(self, node: int) -> AIOKafkaConnection:
        """An open connection. Raises one of `LINK_ERRORS`."""
        connection = self._connections.get(node)
        if connection is not None and connection.connected():
            return connection
        async with self._locks.setdefault(node, asyncio.Lock()):
            connection = self._connections.get(node)
            if connection is None or not connection.connected():
                if connection is not None:
                    self.drop(node, connection)
                connection = self._connections[node] = await self._connect(node)
            return connection

    async def _connect(self, node: int) -> AIOKafkaConnection:
        error: Exception = KafkaError(f"no broker {node} is known")
        for host, port in self._addresses(node):
            try:
                connection = await create_conn(
                    host,
                    port,
                    client_id=self._client_id,
                    request_timeout_ms=round(self.timeout_s * 1000),
                    **self._address.access,
                )
            except _LOGIN_ERRORS as problem:
                error = _NotLetInError(f"SLUICE_LOG_URL: the login is refused by {host}:{port}: {explain(problem)}")
            except ssl.SSLCertVerificationError as problem:
                error = KafkaError(
                    f"SLUICE_LOG_URL: the certificate of {host}:{port} is not trusted: {problem.verify_message} "
                    "(cafile= names the authority that signed it; it has to name the host)"
                )
            except LINK_ERRORS as problem:
                error = KafkaError(f"{host}:{port}: {explain(problem)}")
            else:
                _check_versions(connection)
                return connection
        raise error

    def _addresses(self, node: int) -> list[tuple[str, int]]:
        if node != CONTROL:
            return [self._brokers[node]] if node in self._brokers else []
        hosts = list({*self._brokers.values(), *self._address.hosts})
        random.shuffle(hosts)
        return hosts

    def drop(self, node: int, connection: AIOKafkaConnection) -> None:
        """Close a connection without waiting; what it has not sent yet is not sent any more."""
        if self._connections.get(node) is connection:
            del self._connections[node]
        _abort(connection)

    def ask_another(self) -> None:
        """Put the next question to another broker: this one may not have heard the news."""
        if (connection := self._connections.get(CONTROL)) is not None:
            self.drop(CONTROL, connection)

    async def close(self) -> None:
        closing = [_abort(connection) for connection in self._connections.values()]
        self._connections.clear()
        if closing:
            await asyncio.wait(closing, timeout=self.timeout_s)

    async def producer_id(self) -> int:
        """A new one, with epoch 0. Raises `UnavailableError`."""
        response = await self.ask(InitProducerIdRequest(None, TRANSACTION_TIMEOUT_MS))
        if response.error_code != NO_ERROR:
            raise UnavailableError(f"Kafka gives no producer id: {describe(response.error_code)}")
        producer_id: int = response.producer_id
        return producer_id

    async def bounds(self, partitions: Iterable[int] | None = None, *, wait_s: float = 0.0) -> dict[int, Bounds]:
        """Of these partitions, or all; asks again for `wait_s`, as a leader that is new takes a moment to answer.

        Raises `UnavailableError`; `LogMisfitError` for a topic made anew.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait_s
        while True:
            try:
                return await self._bounds(partitions)
            except UnavailableError:
                if loop.time() >= deadline:
                    raise
            await asyncio.sleep(RETRY_S)

    async def positions_at(self, time_ms: int) -> dict[int, int]:
        """The position of each partition's first record written at or after a time. Raises `UnavailableError`."""
        found = await self._offsets(None, time_ms, NEWEST)
        return {partition: end if found[time_ms][partition] < 0 else found[time_ms][partition]
                for partition, end in found[NEWEST].items()}  # fmt: skip

    async def _bounds(self, partitions: Iterable[int] | None) -> dict[int, Bounds]:
        found = await self._offsets(partitions, OLDEST, NEWEST)
        return {partition: Bounds(start, found[NEWEST][partition]) for partition, start in found[OLDEST].items()}

    async def _offsets(self, partitions: Iterable[int] | None, *edges: int) -> dict[int, dict[int, int]]:
        """By edge (a time in ms, OLDEST or NEWEST) and partition."""
        topic = await self.refresh()
        wanted = range(len(topic.leaders)) if partitions is None else partitions
        by_leader: dict[int, list[int]] = {}
        for partition in wanted:
            by_leader.setdefault(topic.leaders[partition], []).append(partition)
        if NO_LEADER in by_leader:
            raise UnavailableError(f"partition {by_leader[NO_LEADER][0]} of {self.name} has no leader")
        try:
            answers = await asyncio.gather(
                *(self._edges(node, group, edge) for node, group in by_leader.items() for edge in edges)
            )
        except LINK_ERRORS as error:
            raise UnavailableError(f"Kafka cannot tell the bounds of {self.name}: {explain(error)}") from error
        found: dict[int, dict[int, int]] = {edge: {} for edge in edges}
        for edge, offsets in answers:
            found[edge].update(offsets)
        return found

    async def _edges(self, node: int, partitions: list[int], edge: int) -> tuple[int, dict[int, int]]:
        request = OffsetRequest(CONSUMER, 0, [(self.name, [(partition, edge) for partition in partitions])])
        response = await self.send(node, request)
        offsets = {}
        for _, answers in response.topics:
            for partition, error, _, offset in answers:
                if error != NO_ERROR:
                    raise UnavailableError(f"partition {partition} of {self.name}: {describe(error)}")
                offsets[partition] = offset
        return edge, offsets

    async def coordinator(self, group: str) -> int:
        """The node that keeps this group's offsets. Raises `UnavailableError`."""
        response = await self.ask(FindCoordinatorRequest(group, GROUP))
        if response.error_code != NO_ERROR:
            raise UnavailableError(f"no coordinator for {group}: {describe(response.error_code)}")
        node: int = response.coordinator_id
        self._brokers.setdefault(node, (response.host, response.port))
        return node


def _check_versions(connection: AIOKafkaConnection) -> None:
    for request in REQUESTS_NEEDED:
        least, most = connection._versions.get(request.API_KEY, (0, -1))
        if not least <= request.API_VERSION <= most:
            _abort(connection)
            raise ConfigurationError(
                f"SLUICE_LOG_URL: the broker at {connection.host}:{connection.port} is no Kafka 3.1 or later "
                f"({request.__name__} is needed in version {request.API_VERSION}, it has {least} to {most})"
            )


def _abort(connection: AIOKafkaConnection) -> "asyncio.Future[None]":
    """Close at once. `close` alone would first try to send what is buffered, for ever if the peer is silent."""
    writer = connection._writer
    closed: asyncio.Future[None] = connection.close()
    if writer is not None:
        writer.transport.abort()
    return closed


def describe(code: int) -> str:
    """A broker's error code in words."""
    return f"{NAMES.get(code) or for_code(code).__name__} ({code})"


def explain(error: BaseException) -> str:
    """In words; aiokafka's errors would begin with their own name."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return str(error.args[0] if isinstance(error, KafkaError) and error.args else error) or type(error).__name__

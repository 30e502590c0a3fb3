"""The log on one Kafka topic: creating it, opening it, and watching that it stays the same one.

Left out: how records travel (`kafka_writer`, `kafka_reader`).
"""

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Final
from uuid import UUID

from aiokafka.protocol.commit import OffsetCommitRequest

from runtime.errors import ConfigurationError, UnavailableError
from runtime.log.kafka_address import Address
from runtime.log.kafka_cluster import LINK_ERRORS, NO_ERROR, Cluster, TopicMissingError, describe, explain
from runtime.log.kafka_reader import KafkaReader
from runtime.log.kafka_wire import CreateTopicRequest, spell_topic_id
from runtime.log.kafka_writer import KafkaWriter
from runtime.log.port import NEW_GENERATION, Bounds, Expected, LogMisfitError
from runtime.log.settings import LogSettings
from runtime.log.waiting import Landed, Trouble

GROUP: Final = "sluice-landing"
NO_GENERATION: Final = -1
LANDED_EVERY_S: Final = 1.0
WATCH_S: Final = 5.0
WATCH_TROUBLED_S: Final = 0.5
MISSING_WAIT_S: Final = 1.0
LEADERS_WAIT_S: Final = 10.0
POLL_S: Final = 0.1
FETCH_TIMEOUT_S: Final = 5.0
HOUR_MS: Final = 3_600_000
TOPIC_EXISTS: Final = 36
BATCH_BYTES_MAX: Final = 8_388_608  # above the most that SLUICE_LOG_BATCH_BYTES_MAX allows

_log = logging.getLogger("sluice.log")


async def create_kafka_log(settings: LogSettings, address: Address, name: str, partitions: int) -> str:
    """Make the topic and wait until it can be written; its id. Raises as `engines.create_log`."""
    cluster = _cluster(settings, address, name, None, "sluice-create")
    try:
        request = CreateTopicRequest(
            name, partitions, settings.log_replication or -1, _configs(settings), settings.log_append_timeout_ms
        )
        _, topic_id, error, message, *_ = (await cluster.ask(request)).topics[0]
        if error == TOPIC_EXISTS:
            raise LogMisfitError(f"a topic {name} exists already: delete it if nothing needs it, or {NEW_GENERATION}")
        if error != NO_ERROR:
            raise ConfigurationError(f"SLUICE_LOG_URL: no topic {name}: {message or describe(error)}")
        await cluster.bounds(wait_s=LEADERS_WAIT_S)
        return spell_topic_id(topic_id)
    finally:
        await cluster.close()


def _configs(settings: LogSettings) -> dict[str, str]:
    configs = {
        "cleanup.policy": "delete",
        "retention.ms": str(settings.log_retention_h * HOUR_MS),
        "retention.bytes": "-1",
        "max.message.bytes": str(BATCH_BYTES_MAX),
    }
    if settings.log_replication > 2:
        configs["min.insync.replicas"] = "2"  # acknowledged means on two brokers, and one may be away
    return configs


async def open_kafka_log(settings: LogSettings, address: Address, expected: Expected, client_id: str) -> "KafkaLog":
    """Raises as `engines.open_log`."""
    cluster = _cluster(settings, address, expected.name, expected.identity, client_id)
    try:
        await _verify(cluster, expected)
    except BaseException:
        await cluster.close()
        raise
    return KafkaLog(settings, address, expected, client_id, cluster)


async def _verify(cluster: Cluster, expected: Expected) -> None:
    deadline = asyncio.get_running_loop().time() + MISSING_WAIT_S
    while True:
        try:
            topic = await cluster.refresh()
            break
        except TopicMissingError as error:
            if asyncio.get_running_loop().time() > deadline:
                raise LogMisfitError(f"{error}: bring it back, or {NEW_GENERATION}") from error
        await asyncio.sleep(POLL_S)
    if len(topic.leaders) != expected.partitions:
        raise LogMisfitError(
            f"topic {cluster.name} has {len(topic.leaders)} partitions, the database knows {expected.partitions}: "
            f"devices would change places. {NEW_GENERATION.capitalize()}"
        )
    if topic.replication == 1:
        _log.warning("replication factor 1: a lost broker loses acknowledged readings", extra={"log": cluster.name})


def _cluster(
    settings: LogSettings,
    address: Address,
    name: str,
    identity: str | None,
    client_id: str,
    *,
    timeout_s: float | None = None,
) -> Cluster:
    if timeout_s is None:
        # Half of what an append may take, so that a connection gone silent leaves time for a second try.
        timeout_s = settings.log_append_timeout_ms / 2000
    return Cluster(address, name=name, identity=identity, client_id=client_id, timeout_s=timeout_s)


class KafkaLog:
    """One process's hold on a topic. Made by `engines.open_log`; belongs to one event loop."""

    def __init__(
        self, settings: LogSettings, address: Address, expected: Expected, client_id: str, cluster: Cluster
    ) -> None:
        self.source: UUID = expected.source
        self.partitions = expected.partitions
        self._settings = settings
        self._address = address
        self._expected = expected
        self._client_id = client_id
        self._cluster = cluster
        self._trouble = Trouble(expected.name)
        self._writer = KafkaWriter(settings, cluster, expected.partitions, self._trouble)
        self.body_bytes_max = self._writer.body_bytes_max
        self.append = self._writer.append  # the hot path, without a call in between
        self.append_all = self._writer.append_all
        self._readers: set[KafkaReader] = set()
        self._landed = Landed(self._publish, LANDED_EVERY_S)
        self._coordinator: int | None = None
        self._watch = asyncio.get_running_loop().create_task(self._keep_watch(), name="log-watch")

    @property
    def queued_bytes(self) -> int:
        return self._writer.queued_bytes

    @property
    def trouble(self) -> str | None:
        reason = self._trouble.reason
        if reason is None and self._readers:
            return next((reader.trouble.reason for reader in self._readers if reader.trouble.reason), None)
        return reason

    async def _keep_watch(self) -> None:
        """See whether the topic is still the one that was opened, and when trouble is over."""
        loop = asyncio.get_running_loop()
        due = loop.time() + WATCH_S
        while True:
            await asyncio.sleep(WATCH_TROUBLED_S)
            if self._trouble.reason is None and loop.time() < due:
                continue
            due = loop.time() + WATCH_S
            try:
                await self._cluster.refresh()
            except LogMisfitError as error:
                self._trouble.begin(str(error))
                self._writer.refuse(str(error))
                return
            except UnavailableError as error:
                self._trouble.begin(str(error))
            else:
                if not self._writer.refuses:
                    self._trouble.over()

    async def bounds(self) -> dict[int, Bounds]:
        return await self._cluster.bounds(wait_s=self._cluster.timeout_s)

    async def expiring(self, share: float) -> dict[int, int]:
        age_ms = self._settings.log_retention_h * HOUR_MS * share
        return await self._cluster.positions_at(time.time_ns() // 1_000_000 - round(age_ms))

    def reader(self) -> KafkaReader:
        expected = self._expected
        cluster = _cluster(
            self._settings,
            self._address,
            expected.name,
            expected.identity,
            self._client_id,
            timeout_s=FETCH_TIMEOUT_S,
        )
        trouble = Trouble(expected.name)
        reader = KafkaReader(cluster, self._settings.log_fetch_bytes_max, trouble, self._readers.discard)
        self._readers.add(reader)
        return reader

    async def landed(self, positions: Mapping[int, int]) -> None:
        self._landed.tell(positions)

    async def _publish(self, positions: dict[int, int]) -> None:
        if self._coordinator is None:
            self._coordinator = await self._cluster.coordinator(GROUP)
        offsets = [(partition, position, "") for partition, position in positions.items()]
        request = OffsetCommitRequest(GROUP, NO_GENERATION, "", -1, [(self._expected.name, offsets)])
        try:
            response = await self._cluster.send(self._coordinator, request)
        except LINK_ERRORS as error:
            self._coordinator = None
            raise UnavailableError(f"offsets were not published: {explain(error)}") from error
        errors = {error for _, answers in response.topics for _, error in answers} - {NO_ERROR}
        if errors:
            self._coordinator = None
            raise UnavailableError(f"offsets were not published: {', '.join(map(describe, errors))}")

    async def close(self) -> None:
        await self._landed.close()
        await self._writer.close()
        self._watch.cancel()
        await asyncio.gather(self._watch, return_exceptions=True)
        for reader in list(self._readers):
            await reader.close()
        await self._cluster.close()

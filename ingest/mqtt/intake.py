"""From a message to a record that is durable, and to its acknowledgement.

The same judgement, limits and log as by HTTP. Nobody can be answered here: what is no good goes to the quarantine of
its device and is acknowledged; what cannot be judged or kept now is not acknowledged, and the broker keeps it.
Messages of a device that have to wait do so in their order, and hold nobody else up. Left out: connections
(`session`), and messages that are no readings (`hearing`).
"""

import asyncio
import base64
import logging
import os
import random
from collections import deque
from functools import partial
from typing import Final, NamedTuple

import msgspec

from ingest.admit import Admission, Admitted, Sender, Sent
from ingest.credentials import KNOWN, Credentials, Grant, UnknownTokenError, names_device
from ingest.formats.shape import BodyError, Malformed, Measurement, Submission, storable
from ingest.limits import LimitExceededError, Limits
from ingest.mqtt import snapshots
from ingest.mqtt.connection import Connection, Message
from ingest.mqtt.failures import Failures
from ingest.mqtt.hearing import Hearing, answers_of
from ingest.mqtt.marking import delivery_of, is_made_up, with_nonce
from ingest.mqtt.metrics import BridgeMetrics
from ingest.mqtt.names import Names, TrayFullError
from ingest.mqtt.settings import BridgeSettings
from ingest.mqtt.snapshots import Snapshot, SnapshotError
from ingest.mqtt.topics import WITH_READINGS, Kind, Router, Target, Voice
from ingest.mqtt.voices import Voices
from ingest.registry import Connections
from ingest.settings import IngestSettings
from ingest.stamps import Stamps
from runtime.clock import Clock
from runtime.errors import OutcomeUnknownError, SluiceError, UnavailableError
from runtime.log.port import Log
from schemas import record as records
from schemas.errors import ReadingCode
from schemas.topics import partition_of

_log = logging.getLogger("sluice.bridge")

WAY: Final = "mqtt"
_SUSPENDED: Final = "the device is suspended"
_STALE: Final = "`ts` is outside the replay window, and no `timestamp` says when it was measured"
_NO_PLANT: Final = "the device is no plant: such messages are a plant's"
_UNASSIGNED: Final = "no device of the site has this name yet"
_EVIDENCE_MAX: Final = 2_048
_ACCEPTED: Final = ("accepted", "")
_DURABLE: Final = ("durable",)
_NOT_WRITTEN: Final = ("not_written",)
_UNKNOWN: Final = ("unknown",)
_RETRY_S: Final = 1.0


class Source(NamedTuple):
    """Where messages of a family come from."""

    family: str
    router: Router


class _Held(NamedTuple):
    source: Source
    connection: Connection
    message: Message
    target: Target


class Intake:
    """Of one process, for all of its sessions. `take` never blocks; `stop` ends what waits."""

    def __init__(
        self,
        *,
        log: Log,
        credentials: Credentials,
        names: Names,
        limits: Limits,
        settings: BridgeSettings,
        ingest: IngestSettings,
        clock: Clock,
        metrics: BridgeMetrics,
        failures: Failures,
        events: Connections,
    ) -> None:
        self._log = log
        self._credentials = credentials
        self._names = names
        self._voices = Voices(settings.mqtt_topics_cache_max)
        self._limits = limits
        self._settings = settings
        self._readings_max = ingest.readings_per_request_max
        self._clock = clock
        self._metrics = metrics
        self._failures = failures
        self._replay_us = round(settings.mqtt_replay_window_s * 1e6)
        self._hearing = Hearing(events, limits=limits, settings=settings, clock=clock, done=self._done)
        self._tasks: list[asyncio.Task[None]] = []
        self._admission = Admission(
            future_us=round(ingest.reading_future_s * 1e6), year_floor=ingest.reading_year_floor
        )
        self._stamps = Stamps()
        self._id_prefix = os.urandom(6).hex()
        self._messages = 0
        self._record_bytes_max = log.body_bytes_max
        self._held: dict[bytes, deque[_Held]] = {}
        self._releasing: set[asyncio.Task[None]] = set()

    @property
    def held(self) -> int:
        return sum(map(len, self._held.values()))

    @property
    def trouble(self) -> str | None:
        """Why what devices say beside readings cannot be kept right now."""
        return self._hearing.trouble

    def start(self) -> "list[asyncio.Task[None]]":
        """Its tasks, none of which ends by itself."""
        self._tasks = self._hearing.start()
        return self._tasks

    async def stop(self) -> None:
        ending = [*self._releasing, *self._tasks]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)

    def take(self, source: Source, connection: Connection, message: Message) -> None:
        """A message that has just come."""
        router = source.router
        target = router.known.get(message.topic) or router.find(message.topic)
        if message.again:
            self._metrics.repeated.add((source.family,))
        if target is None:
            self._drop(source, connection, message, "malformed_topic")
            return
        if target.prefix:
            self._take_named(_Held(source, connection, message, target))
            return
        if message.packet and target.kind in WITH_READINGS:
            connection.window.assign(message.number, partition_of(target.device, self._log.partitions))
        held = _Held(source, connection, message, target)
        if self._held and self._waits(held):
            return
        grant = self._credentials.cached(target.device)
        if grant is None:
            self._hold(held)
            return
        self._metrics.credential_lookups.add(KNOWN)
        try:
            self._settle(held, grant)
        except LimitExceededError:
            self._hold(held)

    def _take_named(self, held: _Held) -> None:
        """The same, of a device that its site has to be asked for."""
        target, message = held.target, held.message
        if message.packet and target.kind is Kind.READINGS:
            held.connection.window.expect(message.number)
        if self._waits(held):
            return
        bound = self._names.cached(target)
        if bound is None:
            self._hold(held)
            return
        self._metrics.credential_lookups.add(KNOWN)
        try:
            self._settle(held._replace(target=bound.target), bound.grant)
        except LimitExceededError:
            self._hold(held)

    # ------------------------------------------------------------ what is to be done with one

    def _settle(self, held: _Held, grant: Grant) -> None:
        """Raises `LimitExceededError` for one that has to wait; with any other, it is out of our hands."""
        try:
            self._judge(held, grant)
        except LimitExceededError:
            raise
        except Exception:
            _log.exception("a message cannot be judged", extra={"family": held.source.family})
            if held.target.kind not in WITH_READINGS:
                self._drop(held.source, held.connection, held.message, "malformed")
                return
            self._set_aside(held, grant, ReadingCode.UNDECODABLE, "the message cannot be judged")

    def _judge(self, held: _Held, grant: Grant) -> None:
        source, connection, message, target = held
        if target.prefix and message.packet and target.kind is Kind.READINGS:
            connection.window.decide(message.number, partition_of(target.device, self._log.partitions))
        if target.organisation is not None and grant.organisation != target.organisation:
            self._drop(source, connection, message, "foreign_organisation")
            return
        if target.kind not in WITH_READINGS:
            self._hearing.hear(source.family, connection, message, target, grant)
            return
        if message.retained:
            self._drop(source, connection, message, "retained")
            return
        if target.voice is Voice.ECHO and self._voices.has_said(target.device, message.arrived_us):
            self._drop(source, connection, message, "echo")
            return
        # What is repeated was counted already. Nor may it wait: landing has to see where the repeats end.
        if not message.is_counted and not message.again:
            self._limits.request(grant, self._clock.now_us())
            message.is_counted = True
        if message.size > self._settings.mqtt_message_bytes_max:
            why = f"the message has {message.size} bytes, up to {self._settings.mqtt_message_bytes_max} are taken"
            self._set_aside(held, grant, ReadingCode.UNDECODABLE, why)
            return
        if target.kind is Kind.SNAPSHOT:
            self._judge_snapshot(held, grant)
            return
        try:
            submissions = target.format.decode(message.payload, target)
        except BodyError as error:
            self._set_aside(held, grant, ReadingCode.UNDECODABLE, str(error))
            return
        if target.voice is Voice.FIRST:
            self._voices.heard(target.device, message.arrived_us)
        self._take_readings(held, grant, submissions)

    def _judge_snapshot(self, held: _Held, grant: Grant) -> None:
        message = held.message
        try:
            snapshot = self._read_snapshot(held, grant)
        except SnapshotError as error:
            # Of a plant that is cut off for good, no signature is known any more.
            code, why = (ReadingCode.DEVICE_SUSPENDED, _SUSPENDED) if grant.suspended else (error.code, str(error))
            if code is ReadingCode.BAD_SIGNATURE and error.is_forged and not message.again:
                self._failures.note(held.target.device, message.arrived_us)
            self._set_aside(held, grant, code, why)
            self._metrics.snapshots.add((str(code),))
            return
        self._take_readings(held, grant, [snapshot.submission], snapshot)
        self._metrics.snapshots.add((snapshot.kind,))

    def _read_snapshot(self, held: _Held, grant: Grant) -> Snapshot:
        """Raises `SnapshotError`."""
        message = held.message
        if grant.plant is None:
            raise SnapshotError(ReadingCode.UNKNOWN_DEVICE, _NO_PLANT)
        window = self._admission.window(message.arrived_us, grant.retention_days)
        return snapshots.read(message.payload, grant.plant, window, self._replay_us)

    def _take_readings(
        self, held: _Held, grant: Grant, submissions: list[Submission], snapshot: Snapshot | None = None
    ) -> None:
        source, connection, message, target = held
        if len(submissions) == 1:
            numbered = [(0, submissions[0])]
            count = len(submissions[0].measurements)
        else:
            numbered, count = [], 0
            for submission in submissions:
                numbered.append((count, submission))
                count += len(submission.measurements)
        if not count:
            self._drop(source, connection, message, "empty")
            return
        if count > self._readings_max:
            why = f"a message has up to {self._readings_max} readings, not {count}"
            self._set_aside(held, grant, ReadingCode.UNDECODABLE, why)
            return
        if not message.again:
            self._limits.volume(grant, count, message.size)
        if grant.suspended:
            self._refuse(
                held, grant, numbered, ReadingCode.DEVICE_SUSPENDED, _SUSPENDED, is_decoded=True, snapshot=snapshot
            )
            return
        if snapshot is not None and snapshot.is_stale:
            self._refuse(held, grant, numbered, ReadingCode.STALE_ENVELOPE, _STALE, snapshot=snapshot)
            return
        if target.is_unassigned:
            self._refuse(held, grant, numbered, ReadingCode.UNASSIGNED_DEVICE, _UNASSIGNED, is_decoded=True)
            return
        for submission in submissions:
            if submission.device is not None and not names_device(grant, submission.device):
                _disown(submission)
        received_us = self._stamps.reserve(message.arrived_us, count)
        admitted = self._admission.admit(
            numbered,
            Sender(grant.organisation, target.device),
            self._admission.window(received_us, grant.retention_days),
            record_id=self._stamps.record_id(),
            request_id=self._name(),
            way=WAY,
            sent=_sent(held) if snapshot is None else None,
        )
        self._append(held, grant, admitted if snapshot is None else with_nonce(admitted, snapshot))

    def _set_aside(self, held: _Held, grant: Grant, code: ReadingCode, why: str) -> None:
        """The whole message, which holds nothing that can be told apart, goes to the quarantine."""
        shown = Submission([Malformed(str(code), why, _evidence(held.message.payload))])
        self._refuse(held, grant, [(0, shown)], code, why)

    def _refuse(
        self,
        held: _Held,
        grant: Grant,
        numbered: list[tuple[int, Submission]],
        code: ReadingCode,
        why: str,
        *,
        is_decoded: bool = False,
        snapshot: Snapshot | None = None,
    ) -> None:
        received_us = self._stamps.reserve(held.message.arrived_us, 1)
        admitted = self._admission.refuse(
            numbered,
            Sender(grant.organisation, held.target.device),
            self._admission.window(received_us, grant.retention_days),
            code,
            why,
            record_id=self._stamps.record_id(),
            request_id=self._name(),
            way=WAY,
            sent=_sent(held) if is_decoded and snapshot is None else None,
        )
        self._append(held, grant, admitted if snapshot is None else with_nonce(admitted, snapshot))

    def _drop(self, source: Source, connection: Connection, message: Message, result: str) -> None:
        """There is nothing to keep of it."""
        self._done(source.family, connection, message, result)

    def _done(self, family: str, connection: Connection, message: Message, result: str) -> None:
        self._metrics.messages.add((family, result))
        connection.acknowledge(message)

    def _name(self) -> str:
        self._messages += 1
        return f"{self._id_prefix}{self._messages:x}"

    # ------------------------------------------------------------ keeping

    def _append(self, held: _Held, grant: Grant, admitted: Admitted) -> None:
        source, connection, message, target = held
        record = admitted.record
        partition = partition_of(target.device, self._log.partitions)
        if message.packet and (record.refused or is_made_up(record)):
            delivery = delivery_of(connection, message, partition)
            record = msgspec.structs.replace(record, version=records.VERSION, delivery=delivery)
        body = records.encode(record)
        if len(body) > self._record_bytes_max:
            why = f"its readings fill {len(body)} bytes, up to {self._record_bytes_max} fit into a record"
            self._set_aside(held, grant, ReadingCode.UNDECODABLE, why)
            return
        try:
            future = self._log.append(partition, body)
        except SluiceError as error:
            self._keep_away(held, error)
            return
        is_known_again = record.delivery is not None
        future.add_done_callback(partial(self._appended, source, connection, message, admitted, is_known_again))

    def _appended(
        self,
        source: Source,
        connection: Connection,
        message: Message,
        admitted: Admitted,
        is_known_again: bool,
        future: "asyncio.Future[int]",
    ) -> None:
        if future.cancelled() or (error := future.exception()) is not None:
            failure = SluiceError("the log is closed") if future.cancelled() else error
            self._keep_away(_Held(source, connection, message, _NOWHERE), failure)
            return
        connection.acknowledge(message, is_known_again=is_known_again)
        metrics = self._metrics
        metrics.records.add(_DURABLE)
        metrics.acknowledge_seconds.observe((self._clock.now_us() - message.arrived_us) / 1e6)
        if admitted.accepted:
            metrics.messages.add((source.family, "accepted"))
            metrics.readings.add(_ACCEPTED, admitted.accepted)
        else:
            metrics.messages.add((source.family, "quarantined"))
        for rejection in admitted.rejections:
            metrics.readings.add(("refused", rejection.code))

    def _keep_away(self, held: _Held, error: BaseException | None) -> None:
        """The log did not take it, or did not say so: the broker sends it again, in order, to the next connection."""
        self._metrics.records.add(_UNKNOWN if isinstance(error, OutcomeUnknownError) else _NOT_WRITTEN)
        self._metrics.unacknowledged.add((held.source.family,))
        held.connection.abort(f"the log does not take what comes: {error}")

    # ------------------------------------------------------------ those that wait

    def _waits(self, held: _Held) -> bool:
        """Whether it does now, behind others that do."""
        queue = self._held.get(_lane(held.target))
        if queue is None:
            return False
        queue.append(held)
        return True

    def _hold(self, held: _Held) -> None:
        lane = _lane(held.target)
        self._held[lane] = deque([held])
        task = asyncio.create_task(self._release(lane), name="bridge held messages")
        self._releasing.add(task)
        task.add_done_callback(self._releasing.discard)

    async def _release(self, lane: bytes) -> None:
        """Settle what waits of a device, in order; by then nothing does."""
        queue = self._held[lane]
        try:
            while queue:
                await self._settle_in_time(queue)
                queue.popleft()
        except asyncio.CancelledError:
            raise
        except Exception as error:
            _log.exception("messages that waited cannot be settled: the broker sends them again")
            for held in queue:
                held.connection.abort(f"a message cannot be settled: {error}")
        finally:
            del self._held[lane]

    async def _settle_in_time(self, queue: deque[_Held]) -> None:
        """The first one."""
        held = queue[0]
        while not held.connection.closed.done():
            try:
                held, grant = await self._find(held)
            except UnknownTokenError:
                self._drop(held.source, held.connection, held.message, "unknown_device")
                return
            except TrayFullError:
                self._drop(held.source, held.connection, held.message, "tray_full")
                return
            except UnavailableError:
                await asyncio.sleep(_RETRY_S * random.uniform(0.5, 1.5))  # noqa: S311 - spreads, hides nothing
                continue
            if held.connection.closed.done():
                return
            try:
                self._settle(held, grant)
            except LimitExceededError as error:
                if self._is_over(held, error, len(queue)):
                    self._metrics.limited.add((error.kind.name, error.scope))
                    if held.target.kind not in WITH_READINGS:
                        self._drop(held.source, held.connection, held.message, "rate_limited")
                        return
                    self._refuse_limited(held, grant, str(error))
                    return
                await asyncio.sleep(min(error.resets_in_s, _RETRY_S))
                continue
            return

    def _refuse_limited(self, held: _Held, grant: Grant, why: str) -> None:
        if held.target.kind is not Kind.SNAPSHOT:
            self._refuse(held, grant, _shown(held), ReadingCode.RATE_LIMITED, why, is_decoded=True)
            return
        try:
            snapshot = self._read_snapshot(held, grant)
        except SnapshotError:
            self._set_aside(held, grant, ReadingCode.RATE_LIMITED, why)
            return
        self._refuse(held, grant, [(0, snapshot.submission)], ReadingCode.RATE_LIMITED, why, snapshot=snapshot)

    async def _find(self, held: _Held) -> tuple[_Held, Grant]:
        """With the device that is meant, whose grant it is. Raises as `Names.find`."""
        if not held.target.prefix:
            return held, await self._credentials.find([held.target.device])
        bound = await self._names.find(held.target)
        return held._replace(target=bound.target), bound.grant

    def _is_over(self, held: _Held, error: LimitExceededError, waiting: int) -> bool:
        """Whether it may not wait until the limit lets it in. `waiting`: how many do in its lane."""
        settings = self._settings
        waited_s = (self._clock.now_us() - held.message.arrived_us) / 1e6
        is_late = waited_s + error.resets_in_s > settings.mqtt_limit_wait_s
        is_too_many = self.held > settings.mqtt_held_max and waiting > settings.mqtt_held_max // len(self._held)
        return is_late or error.is_beyond or is_too_many


def _lane(target: Target) -> bytes:
    """In which messages wait one behind the other: a device's, and its answers to commands beside them."""
    return target.device if target.kind is not Kind.ANSWER else answers_of(target.device)


_NOWHERE: Final = Target(Kind.READINGS, None, b"")


def _disown(submission: Submission) -> None:
    """Its body names another device than its topic: all of it is refused."""
    message = "`device` is not the device of the topic"
    submission.measurements = [
        Malformed(str(ReadingCode.DEVICE_MISMATCH), message, one) if isinstance(one, Measurement) else one
        for one in submission.measurements
    ]


def _sent(held: _Held) -> Sent | None:
    """Finds what was sent, for the quarantine, in a format that says it in one piece."""
    finds = held.target.format.sent
    return None if finds is None else finds(held.message.payload)


def _shown(held: _Held) -> list[tuple[int, Submission]]:
    """What a message holds, to be kept in the quarantine."""
    payload = held.message.payload
    try:
        submissions = held.target.format.decode(payload, held.target)
    except BodyError as error:
        malformed = Malformed(str(ReadingCode.UNDECODABLE), str(error), _evidence(payload))
        return [(0, Submission([malformed]))]
    numbered, count = [], 0
    for submission in submissions:
        numbered.append((count, submission))
        count += len(submission.measurements)
    return numbered


def _evidence(payload: bytes) -> object:
    """The beginning of a payload: as text where it is one."""
    shown = payload[:_EVIDENCE_MAX]
    try:
        text = shown.decode()
    except UnicodeDecodeError as error:
        # A character of up to four bytes may be cut in two.
        is_cut = len(payload) > _EVIDENCE_MAX - 3 and error.start > len(shown) - 4
        text = shown[: error.start].decode() if is_cut else "\0"
    return text if storable(text) else {"base64": base64.b64encode(shown).decode()}

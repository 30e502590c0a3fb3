"""The ingest face: from a request to records that are durable, and the answer that says so.

`handle` is the whole face; `runtime.http.server` puts it on a socket, and `sluice up` beside the API. Left out: who
may send (`callers`), how readings are judged (`ingest.admit`) and kept (`ingest.keeping`), bodies (`bodies`).
"""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime
from math import ceil
from time import perf_counter
from typing import Final
from urllib.parse import unquote

import msgspec
import orjson
from aiohttp import web
from msgspec.structs import replace
from multidict import istr

from ingest.admit import Admission, Rejection, Sender
from ingest.credentials import Grant
from ingest.formats import measurements_json, shelly_get
from ingest.formats.shape import BodyError, Submission
from ingest.http.answers import Refusal, limited
from ingest.http.bodies import Room, check_size, read_body
from ingest.http.callers import SENDERS, SUSPENDED, ByDevice, Callers, bearer, check_active
from ingest.http.pacing import APPLIED, Paced, Pacer
from ingest.http.preferences import PREFER, WAIT_STORED, prefers
from ingest.idempotency import BadKeyError, ConflictError, Repeats, name_request
from ingest.keeping import Durable, Keeper, Part, RecordTooLargeError
from ingest.limits import LimitExceededError, Limits
from ingest.metrics import IngestMetrics
from ingest.overload import Overload
from ingest.paced.lane import LaneFullError
from ingest.receipts import Receipt, ReceiptError, Receipts, State
from ingest.settings import IngestSettings
from ingest.stamps import Stamps
from runtime.clock import Clock
from runtime.errors import OutcomeUnknownError, OverloadedError, UnavailableError
from runtime.http.answers import Answer
from runtime.http.cors import Origins
from runtime.http.request_ids import REQUEST_ID, taken
from schemas import record as records
from schemas.errors import ReadingCode, RequestCode
from schemas.record import Idempotency

_log = logging.getLogger("sluice.ingest")

INGEST_PATH: Final = "/v1/ingest"
SHELLY_PATH: Final = "/v1/ingest/shelly/"
RECEIPTS_PATH: Final = "/v1/receipts/"
_INGEST_METHODS: Final = ("GET", "POST")
_SHELLY_METHODS: Final = ("GET",)
_RECEIPT_METHODS: Final = ("GET",)
#: Every path of this face, and the methods that it takes beside OPTIONS (`ingest.http.description`).
ROUTES: Final = {
    INGEST_PATH: _INGEST_METHODS,
    f"{SHELLY_PATH}{{token}}": _SHELLY_METHODS,
    f"{RECEIPTS_PATH}{{receipt}}": _RECEIPT_METHODS,
}

# Looked up in every request: a header's name that knows its hash is found in half the time.
_IDEMPOTENCY_KEY: Final = istr("Idempotency-Key")
_X_DEVICE_ID: Final = istr("X-Device-Id")


class _Call(msgspec.Struct):
    """A request that brings readings, while it is worked on."""

    request: web.BaseRequest
    request_id: str
    arrived_us: int
    grant: Grant
    submissions: list[Submission]
    size: int
    """Of its body or query, unpacked."""
    paced: Paced | None
    """How it is paced; None for one that is not."""
    sent: measurements_json.Sent | None = None
    """Its measurements as they came; None where the format has no text of each."""
    name: Idempotency | None = None


class IngestService:
    """One process's ingest. Everything it needs is handed to it; `start` begins, `stop` ends its own tasks."""

    def __init__(
        self,
        *,
        keeper: Keeper,
        callers: Callers,
        receipts: Receipts,
        limits: Limits,
        settings: IngestSettings,
        clock: Clock,
        metrics: IngestMetrics,
        origins: Origins | None = None,
    ) -> None:
        self._keeper = keeper
        self._origins = origins or None
        self._callers = callers
        self._metrics = metrics
        self._receipts = receipts
        self._limits = limits
        self._pacer = Pacer(limits, keeper.lane)
        self._overload = Overload(settings.overload_lag_ms / 1000, metrics.loop_lag_seconds.observe)
        self._settings = settings
        self._clock = clock
        self._admission = Admission(
            future_us=round(settings.reading_future_s * 1e6), year_floor=settings.reading_year_floor
        )
        self._room = Room(settings.http_in_flight_bytes_max)
        self._repeats: Repeats[Answer] = Repeats(settings.idempotency_entries_max, clock)
        self._stamps = Stamps()
        self._requests = 0
        # Random per process and counted within it, so that an id costs no system call.
        self._id_prefix = os.urandom(6).hex()
        self._tasks: list[asyncio.Task[None]] = []
        self.connections: Callable[[], int] = lambda: 0

    async def start(self) -> None:
        await self._callers.start()
        await self._keeper.start()
        self._tasks = [
            asyncio.create_task(self._keep_house(), name="ingest housekeeping"),
            asyncio.create_task(self._overload.watch(), name="ingest overload"),
        ]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._keeper.stop()
        self._publish()
        await self._callers.stop()
        self._limits.close()

    async def watch(self) -> None:
        """Until one of its tasks ends, which none does by itself. Raises what ended it."""
        done, _ = await asyncio.wait({*self._tasks, *self._callers.tasks}, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()

    @property
    def note(self) -> str | None:
        """What keeps it from serving somebody, though not everybody."""
        return self._callers.trouble

    @property
    def trouble(self) -> str | None:
        """Why requests cannot be served right now; None when they can."""
        return self._keeper.trouble

    async def _keep_house(self) -> None:
        while True:
            self._publish()
            await asyncio.sleep(1.0)

    def _publish(self) -> None:
        self._metrics.in_flight_bytes.set(self._room.taken)
        self._metrics.log_queued_bytes.set(self._keeper.queued_bytes)
        self._metrics.connections.set(self.connections())
        self._metrics.overloaded.set(self._overload.is_on)
        self._metrics.registry_age_seconds.set(self._callers.registry_age_s)
        self._metrics.publish()

    # ------------------------------------------------------------ routes

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Any request of the ingest face."""
        self._requests += 1
        sent = request.headers.get(REQUEST_ID)
        request_id = (None if sent is None else taken(sent)) or f"{self._id_prefix}{self._requests:x}"
        path, _, query = request.raw_path.partition("?")
        if not path.startswith("/"):  # a request target in absolute form, as proxies send it
            path, query = request.rel_url.raw_path, request.rel_url.raw_query_string
        name, route, methods = self._route(path)
        try:
            if request.method not in methods:
                answer = _other_method(request.method, methods, request_id)
            elif self._overload.is_on:
                answer = _behind().answer(request_id)
            else:
                answer = await route(request, request_id, path, query)
        except Refusal as refusal:
            answer = refusal.answer(request_id)
        except LimitExceededError as error:
            self._metrics.limited.add((error.kind.name, error.scope))
            answer = limited(error, request_id)
        except Exception:
            _log.exception("a request failed", extra={"request_id": request_id, "route": name})
            answer = Refusal(RequestCode.INTERNAL, "this is our fault, not yours").answer(request_id)
        self._metrics.requests.add((name, answer.status))
        if self._origins is not None:
            answer.add(self._origins.headers(request.headers, _allowed(methods)))
        return answer

    def refuse(self, status: int, path: str | None) -> Answer:
        """The answer to what never became a request (`runtime.http.server`), whatever its path."""
        code, message = _NO_REQUEST[status]
        self._requests += 1
        self._metrics.requests.add(("malformed", status))
        return Refusal(code, message).answer(f"{self._id_prefix}{self._requests:x}")

    @staticmethod
    def serves(path: str) -> bool:
        """Whether a path is one of this face, where it shares a listener with another."""
        return f"{path}/".startswith((f"{INGEST_PATH}/", RECEIPTS_PATH))

    def _route(self, path: str) -> "tuple[str, _Route, tuple[str, ...]]":
        if path in (INGEST_PATH, INGEST_PATH + "/"):
            return "ingest", self._ingest, _INGEST_METHODS
        if path.startswith(SHELLY_PATH):
            return "shelly", self._ingest_shelly, _SHELLY_METHODS
        if path.startswith(RECEIPTS_PATH):
            return "receipt", self._receipt, _RECEIPT_METHODS
        return "none", self._receipt, ()

    async def _ingest(self, request: web.BaseRequest, request_id: str, path: str, query: str) -> Answer:
        arrived_us = self._clock.now_us()
        if request.method == "GET":
            return await self._ingest_query(request, request_id, arrived_us, query, None)
        settings, room = self._settings, self._room
        # Refused before any work is done: neither token nor body has been looked at.
        check_size(request, settings.body_bytes_max, room)
        token = bearer(request)
        grant = self._callers.known(token, SENDERS) or await self._callers.look_up(request, token, SENDERS)
        paced = self._pacer.request(request, grant, arrived_us)
        body = await read_body(
            request, bytes_max=settings.body_bytes_max, timeout_s=settings.http_body_timeout_s, room=room
        )
        size = len(body)
        self._metrics.body_bytes.add((), size)
        room.take(size)
        try:
            submissions = measurements_json.decode(body)
            sent = measurements_json.Sent(body)
            call = _Call(request, request_id, arrived_us, grant, submissions, size, paced, sent)
            return await self._take_named(call, body)
        except BodyError as error:
            raise Refusal(error.code, str(error)) from None
        finally:
            room.taken -= size

    def _ingest_shelly(self, request: web.BaseRequest, request_id: str, path: str, query: str) -> Awaitable[Answer]:
        # Firmware that appends `&hum=…` to a URL without a query puts its parameters into the path.
        token, _, misplaced = path[len(SHELLY_PATH) :].partition("&")
        token = unquote(token)
        joined = f"{misplaced}&{query}" if misplaced else query
        return self._ingest_query(request, request_id, self._clock.now_us(), joined, token)

    async def _ingest_query(
        self, request: web.BaseRequest, request_id: str, arrived_us: int, query: str, token: str | None
    ) -> Answer:
        try:
            found = shelly_get.decode(query)
        except BodyError as error:
            raise Refusal(error.code, str(error)) from None
        token = token or found.token or bearer(request)
        grant = self._callers.known(token, SENDERS) or await self._callers.look_up(request, token, SENDERS)
        paced = self._pacer.request(request, grant, arrived_us)
        content = query.encode()
        call = _Call(request, request_id, arrived_us, grant, [found.submission], len(content), paced)
        return await self._take_named(call, content)

    async def _receipt(self, request: web.BaseRequest, request_id: str, path: str, query: str) -> Answer:
        token, kinds = bearer(request), (*SENDERS, "api_key")
        grant = self._callers.known(token, kinds) or await self._callers.look_up(request, token, kinds)
        check_active(grant)
        self._limits.request(grant, self._clock.now_us())
        text = unquote(path.removeprefix(RECEIPTS_PATH))
        try:
            receipt = self._receipts.read(text, grant.organisation)
        except ReceiptError:
            message = "no such receipt: it is damaged, too old, or of another organisation"
            raise Refusal(RequestCode.RECEIPT_NOT_FOUND, message) from None
        try:
            status = await self._receipts.status(receipt)
        except UnavailableError as error:
            raise Refusal(RequestCode.REGISTRY_UNAVAILABLE, str(error)) from error
        return Answer(200, orjson.dumps({"receipt": text} | msgspec.to_builtins(status)), request_id)

    # ------------------------------------------------------------ what

    def _take_named(self, call: _Call, content: bytes) -> Awaitable[Answer]:
        key = call.request.headers.get(_IDEMPOTENCY_KEY)
        if key is None:
            return self._take(call)
        try:
            call.name = name_request(key, call.grant.token_hash, content)
        except BadKeyError as error:
            raise Refusal(RequestCode.INVALID_PARAMETER, str(error)) from None
        return self._take_once(call, call.name)

    async def _take_once(self, call: _Call, name: Idempotency) -> Answer:
        """The answer to the request that this one repeats, as far as this process knows; else its own."""
        devices = _named_devices(call)
        try:
            while True:
                first, is_first = self._repeats.begin(name, devices)
                if is_first:
                    break
                await asyncio.wait({first.answer})
                if not first.answer.cancelled():
                    known = first.answer.result()
                    return Answer(known.status, known.content, call.request_id, b"Idempotency-Replayed: true\r\n")
        except ConflictError:
            raise Refusal(RequestCode.IDEMPOTENCY_CONFLICT, _NAMED_TWICE) from None
        try:
            answer = await self._take(call)
            # What is only partly durable is to be sent again: landing tells what it has.
            if b'"retryable":true' not in answer.content and len(answer.content) <= _ANSWER_KEPT_MAX:
                first.answer.set_result(answer)
            return answer
        finally:
            self._repeats.end(first)

    async def _take(self, call: _Call) -> Answer:
        """Judge a request's submissions, make what is good durable, and answer."""
        grant, submissions, headers = call.grant, call.submissions, call.request.headers
        count = self._checked_count(submissions)
        if self._keeper.trouble is not None:
            raise _refusal_of([])
        paced = call.paced = self._pacer.volume(call.request, grant, count, call.size, call.paced)
        header = headers.get(_X_DEVICE_ID)
        names_nobody = header is None and len(submissions) == 1 and submissions[0].device is None
        if names_nobody and grant.device is not None and not grant.suspended:
            # The usual request, without what several devices need.
            received_us = self._stamps.reserve(call.arrived_us, count)
            parts = [self._judge(call, received_us, grant.device, [(0, submissions[0])])]
            is_suspended, rejections = False, list[Rejection]()
        else:
            by_device = await self._callers.devices(grant, header, submissions)
            parts = self._admit(call, self._stamps.reserve(call.arrived_us, count), by_device)
            is_suspended, rejections = not by_device.devices, by_device.strays
        if call.name is not None:
            # Where nothing was accepted the key is not used up: the same may be accepted another time.
            parts = [_named(part, call.name) if part.admitted.accepted else part for part in parts]
        began = perf_counter()
        durable = await self._keep(parts, paced)
        if not durable.places:
            raise _refusal_of([error for _, error in durable.failed])
        self._metrics.append_seconds.observe(perf_counter() - began)
        for part in parts:
            rejections += part.admitted.rejections
        if is_suspended:
            # Only now: what a suspended device sent stands in the log, on its way to the quarantine.
            self._count_refused(rejections)
            raise Refusal(RequestCode.DEVICE_SUSPENDED, SUSPENDED)
        for part, _ in durable.failed:
            rejections += _not_durable(part)
        answer, receipt = self._answer(call, durable, rejections)
        if receipt is not None and paced is None and PREFER in headers and prefers(call.request, WAIT_STORED):
            return await self._wait(call.request_id, receipt, answer)
        return answer

    def _checked_count(self, submissions: list[Submission]) -> int:
        count = 0
        for submission in submissions:
            count += len(submission.measurements)
        if count > self._settings.readings_per_request_max:
            message = f"a request has up to {self._settings.readings_per_request_max} readings, not {count}"
            raise Refusal(RequestCode.TOO_MANY_READINGS, message)
        if not count:
            raise Refusal(RequestCode.NO_READINGS, "the request holds no reading")
        return count

    def _admit(self, call: _Call, received_us: int, by_device: ByDevice) -> list[Part]:
        parts = [
            self._judge(call, received_us, device, submissions) for device, submissions in by_device.devices.items()
        ]
        for device, submissions in by_device.suspended.items():
            refused = self._admission.refuse(
                submissions,
                Sender(call.grant.organisation, device),
                self._admission.window(received_us, call.grant.retention_days),
                ReadingCode.DEVICE_SUSPENDED,
                SUSPENDED,
                record_id=self._stamps.record_id(),
                request_id=call.request_id,
                way="http",
                sent=call.sent,
            )
            parts.append(Part(device, submissions, refused))
        return parts

    def _judge(self, call: _Call, received_us: int, device: bytes, submissions: list[tuple[int, Submission]]) -> Part:
        admitted = self._admission.admit(
            submissions,
            Sender(call.grant.organisation, device),
            self._admission.window(received_us, call.grant.retention_days),
            record_id=self._stamps.record_id(),
            request_id=call.request_id,
            way="http",
            sent=call.sent,
        )
        return Part(device, submissions, admitted)

    def _keep(self, parts: list[Part], paced: Paced | None) -> Awaitable[Durable]:
        try:
            return self._keeper.keep(parts) if paced is None else self._pace(parts, paced)
        except RecordTooLargeError as error:
            raise _too_large(error) from None

    async def _pace(self, parts: list[Part], paced: Paced) -> Durable:
        try:
            durable = await self._keeper.pace(paced.lane, paced.sender, parts, paced.cost)
        except RecordTooLargeError as error:
            raise _too_large(error) from None
        except LaneFullError as error:
            raise paced.refused(str(error)) from None
        self._pacer.kept(paced)
        return durable

    def _answer(self, call: _Call, durable: Durable, rejections: list[Rejection]) -> tuple[Answer, Receipt | None]:
        request_id = call.request_id
        accepted = durable.accepted
        self._count_refused(rejections)
        if not accepted:
            if durable.failed:
                raise _refusal_of([error for _, error in durable.failed])
            refusal = Refusal(RequestCode.ALL_REFUSED, "every reading was refused")
            return refusal.answer(request_id, rejected=_listed(rejections)), None
        self._metrics.readings.add(_ACCEPTED, accepted)
        receipt = Receipt(self._keeper.source, call.grant.organisation, durable.places)
        listed = orjson.dumps(_listed(rejections)) if rejections else b"[]"
        body = b'{"accepted":%d,"rejected":%s,"receipt":"%s","durable":"%s"}' % (
            accepted,
            listed,
            self._receipts.make(receipt).encode(),
            b"spool" if durable.spooled else b"log",
        )
        if durable.paced_until_us is None:
            return Answer(202, body, request_id), receipt
        until = datetime.fromtimestamp(ceil(durable.paced_until_us / 1e6), UTC)
        body = b'%s,"paced":true,"paced_until":"%s"}' % (body[:-1], f"{until:%Y-%m-%dT%H:%M:%SZ}".encode())
        return Answer(202, body, request_id, APPLIED), receipt

    def _count_refused(self, rejections: list[Rejection]) -> None:
        for rejection in rejections:
            self._metrics.readings.add(("refused", rejection.code))

    async def _wait(self, request_id: str, receipt: Receipt, answer: Answer) -> Answer:
        """Hold the answer until the readings have landed; as it is when that takes too long or cannot be told."""
        try:
            status = await self._receipts.wait(receipt, self._settings.wait_stored_s)
        except UnavailableError:
            return answer
        if status.state is not State.LANDED:
            return answer
        counts = b',"stored":%d,"duplicates":%d,"conflicts":%d,"quarantined":%d}' % (
            status.stored or 0,
            status.duplicates or 0,
            status.conflicts or 0,
            status.quarantined or 0,
        )
        if status.erased:
            counts = counts[:-1] + b',"erased":%d}' % status.erased
        return Answer(200, answer.content[:-1] + counts, request_id, b"Preference-Applied: wait=stored\r\n")


_NO_REQUEST: Final = {
    400: (RequestCode.BAD_REQUEST, "the request is not well-formed HTTP"),
    408: (RequestCode.REQUEST_TIMEOUT, "the head of the request did not come in time"),
    414: (RequestCode.URI_TOO_LONG, "the path and query are too long"),
    431: (RequestCode.HEAD_TOO_LARGE, "a header is too long, or there are too many"),
    500: (RequestCode.INTERNAL, "this is our fault, not yours"),
    501: (RequestCode.NOT_IMPLEMENTED, "HTTP has no such method"),
}
_ACCEPTED: Final = ("accepted", "")
_NAMED_TWICE: Final = "another request with this Idempotency-Key, and another content, came within 24 hours"
_ANSWER_KEPT_MAX: Final = 4_096
_Route = Callable[[web.BaseRequest, str, str, str], Awaitable[Answer]]


def _named_devices(call: _Call) -> str:
    """How a request names its devices: in its header, or in its body, where the token alone does not say."""
    header = call.request.headers.get(_X_DEVICE_ID)
    return header if header is not None else "\n".join(sorted({str(one.device) for one in call.submissions}))


def _named(part: Part, name: Idempotency) -> Part:
    record = replace(part.admitted.record, version=records.LATE_VERSION, idempotency=name)
    return replace(part, admitted=replace(part.admitted, record=record))


def _other_method(method: str, methods: tuple[str, ...], request_id: str) -> Answer:
    if not methods:
        raise Refusal(RequestCode.NOT_FOUND, "no such path: readings go to /v1/ingest")
    allow = f"Allow: {_allowed(methods)}\r\n".encode()
    if method == "OPTIONS":
        return Answer(204, b"", request_id, allow)
    raise Refusal(RequestCode.METHOD_NOT_ALLOWED, f"takes {' and '.join(methods)}", headers=allow)


def _allowed(methods: tuple[str, ...]) -> str:
    return ", ".join((*methods, "OPTIONS"))


def _behind() -> Refusal:
    return Refusal(RequestCode.OVERLOADED, "this process is behind with its work: try again later", close=True)


def _listed(rejections: Iterable[Rejection]) -> list[dict[str, object]]:
    ordered = sorted(rejections, key=lambda one: one.index)
    return [
        {"index": one.index, "code": one.code, "message": one.message, "retryable": one.retryable} for one in ordered
    ]


def _not_durable(part: Part) -> list[Rejection]:
    """The readings of a record that may not be in the log, as refusals that a repeat can mend."""
    refused = {rejection.index for rejection in part.admitted.rejections}
    message = "could not be made durable: send it again"
    return [
        Rejection(index, str(ReadingCode.NOT_DURABLE), message, retryable=True)
        for first, submission in part.submissions
        for index in range(first, first + len(submission.measurements))
        if index not in refused
    ]


def _too_large(error: RecordTooLargeError) -> Refusal:
    return Refusal(RequestCode.BODY_TOO_LARGE, f"{error}: split the request")


def _refusal_of(errors: list[Exception]) -> Refusal:
    if any(isinstance(error, OutcomeUnknownError) for error in errors):
        message = "it is not known whether the readings were kept: send them again, with their own times"
        return Refusal(RequestCode.OUTCOME_UNKNOWN, message)
    if any(isinstance(error, OverloadedError) for error in errors):
        return Refusal(RequestCode.OVERLOADED, "too much waits to be made durable: try again later")
    return Refusal(RequestCode.LOG_UNAVAILABLE, "readings cannot be made durable right now: try again later")

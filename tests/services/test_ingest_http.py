"""The ingest face as HTTP: routes, methods, connections, and what is no HTTP at all."""

import asyncio
import json
import logging
import time
from typing import Any
from uuid import uuid4

import pytest

from runtime.clock import SystemClock
from runtime.http.cors import Origins
from tests.ingest_rig import Face, Installation, Tenant, head_of, measured, post_bytes, rows
from tests.landing_rig import until
from tests.support import run

ONE = measured(("temperature", 21.5))


async def appended(face: Face) -> int:
    """How many records the log has."""
    return sum(bounds.end for bounds in (await face.log.bounds()).values())


def get_line(tenant: Tenant, query: str = "temp=4.2") -> bytes:
    return head_of("GET", f"/v1/ingest?token={tenant.token}&{query}")


# ---------------------------------------------------------------- answers


def test_a_reading_is_durable_when_it_is_acknowledged(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face() as face:
            sent = measured(("temperature", 21.5), ts="2026-11-01T08:22:00Z", device="fridge")
            reply = await face.post(tenant.token, sent | {"ts": time.time()})
            assert (reply.status, reply.headers["content-type"]) == (202, "application/json")
            content = reply.json()
            assert set(content) == {"accepted", "rejected", "receipt", "durable"}
            assert (content["accepted"], content["rejected"], content["durable"]) == (1, [], "log")
            (record,) = await face.records_of(tenant.device)
            assert record.organisation == tenant.organisation.bytes
            assert record.request_id == reply.headers["x-request-id"]
            assert [row[:3] + row[4:] for row in rows(record)] == [("temperature", "", "°C", 21.5, 0)]

    run(test())


def test_each_reading_is_answered_for_itself(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face() as face:
            mixed = measured(("temperature", 21.5), ("temperature", None), ("Bad Name", 1), ("humidity", 40))
            reply = await face.post(tenant.token, [mixed, measured(("humidity", 101))])
            assert (reply.status, reply.json()["accepted"]) == (202, 2)
            assert [(one["index"], one["code"], one["retryable"]) for one in reply.json()["rejected"]] == [
                (1, "invalid_value", False),
                (2, "invalid_metric", False),
                (4, "out_of_range", False),
            ]
            (record,) = await face.records_of(tenant.device)
            assert [refused.index for refused in record.refused] == [1, 2, 4]

    run(test())


def test_a_request_whose_readings_are_all_refused_is_422_and_still_goes_to_the_quarantine(
    installation: Installation,
) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face() as face:
            reply = await face.post(tenant.token, measured(("temperature", "warm"), ("temperature", 9999)))
            assert (reply.status, reply.code) == (422, "all_refused")
            assert [one["code"] for one in reply.json()["error"]["rejected"]] == ["invalid_value", "out_of_range"]
            (record,) = await face.records_of(tenant.device)
            assert (record.accepted, len(record.refused)) == (0, 2)

    run(test())


SPEECHLESS: list[tuple[bytes, int, str]] = [
    (b"", 400, "bad_json"),
    (b"{", 400, "bad_json"),
    (b"[" * 100_000, 400, "bad_json"),
    (b"\xff", 400, "bad_json"),
    (b'\xef\xbb\xbf{"measurements":[]}', 400, "bad_json"),
    (b"[1]", 400, "invalid_body"),
    (b'{"measurements":[],"measurements":[]}', 400, "invalid_body"),
    (b'{"measurements":[]}', 422, "no_readings"),
    (b"[]", 422, "no_readings"),
    (b'{"measurements":[{"type":"a","value":1e400}]}', 422, "all_refused"),
    (b'{"measurements":[{"type":"a","value":' + b"9" * 400 + b"}]}", 422, "all_refused"),
    (b'{"measurements":[{"type":"a","value":1,"value":2}]}', 422, "all_refused"),
    (b'{"measurements":[1]}', 422, "all_refused"),
]


def test_a_body_that_says_nothing_has_a_stable_code(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face() as face, face.connect() as wire:
            for body, status, code in SPEECHLESS:
                reply = await wire.ask(post_bytes(tenant.token, body))
                assert (reply.status, reply.code) == (status, code), body[:40]
            assert (await wire.ask(post_bytes(tenant.token, ONE))).status == 202

    run(test())


def test_no_depth_of_nesting_is_a_fault_of_ours(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face() as face, face.connect() as wire:
            for depth in range(900, 1000):
                body = b'{"measurements":[{"type":"a","value":' + b"[" * depth + b"]" * depth + b"}]}"
                reply = await wire.ask(post_bytes(tenant.token, body))
                assert (reply.status, reply.code) in [(422, "all_refused"), (400, "bad_json")]

    run(test())


def test_a_surrogate_or_a_nul_anywhere_costs_that_reading_only(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        junk = ("\ud800", "a\0b")
        bad = [
            {"type": "co2", "value": 1} | {field: text}
            for text in junk
            for field in ("type", "value", "label", "unit")
        ]
        dated = [{"type": "co2", "value": 1, "ts": f"2018-03-02{text[-2:-1] or text}18:25:03"} for text in junk]
        async with installation.face() as face:
            reply = await face.post(tenant.token, {"measurements": [*bad, *dated, {"type": "co2", "value": 2}]})
            assert (reply.status, reply.json()["accepted"]) == (202, 3)
            assert [one["index"] for one in reply.json()["rejected"]] == list(range(8))
            reply = await face.post(tenant.gateway, [measured(("co2", 1), device=text) for text in (*junk, "fridge")])
            assert (reply.status, reply.json()["accepted"]) == (202, 1)
            assert {one["code"] for one in reply.json()["rejected"]} == {"device_mismatch"}

    run(test())


# ---------------------------------------------------------------- routes and methods


def test_paths_that_take_a_post_and_paths_that_are_none(installation: Installation) -> None:
    good = ("/v1/ingest", "/v1/ingest?a=b", "/v1/ingest/")
    bad = ("/", "/v1", "/v1/ingests", "//v1/ingest", "/V1/INGEST", "/v1/%69ngest", "/v1/ingest/x", "/v1/receipts")

    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face() as face, face.connect() as wire:
            for target in good:
                raw = post_bytes(tenant.token, ONE).replace(b"/v1/ingest", target.encode(), 1)
                assert (await wire.ask(raw)).status == 202, target
            for target in bad:
                for method in ("GET", "POST", "OPTIONS", "DELETE"):
                    reply = await wire.ask(head_of(method, target))
                    assert (reply.status, reply.code) == (404, "not_found"), target

    run(test())


@pytest.mark.parametrize(
    ("target", "allow"),
    [("/v1/ingest?token={}&temp=1", "GET, POST, OPTIONS"), ("/v1/ingest/shelly/{}?temp=1", "GET, OPTIONS"),
     ("/v1/receipts/x", "GET, OPTIONS")],
)  # fmt: skip
def test_other_methods_say_what_is_allowed_and_take_nothing_in(
    installation: Installation, target: str, allow: str
) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        target_of = target.format(tenant.token)
        async with installation.face() as face, face.connect() as wire:
            before = await appended(face)
            for method in ("HEAD", "PUT", "DELETE", "PATCH", "TRACE", "PROPFIND"):
                await wire.send(head_of(method, target_of, tenant.token))
                reply = await wire.reply(to_head=method == "HEAD")
                assert (reply.status, reply.headers["allow"]) == (405, allow)
                assert method == "HEAD" or reply.code == "method_not_allowed"
            await wire.send(head_of("OPTIONS", target_of, tenant.token))
            reply = await wire.reply()
            assert (reply.status, reply.headers["allow"], reply.body) == (204, allow, b"")
            assert not {"content-length", "content-type"} & set(reply.headers)
            assert await appended(face) == before
            assert (await wire.ask(get_line(tenant))).status == 202

    run(test())


def test_targets_in_absolute_form_are_those_of_their_path(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face() as face:
            raw = post_bytes(tenant.token, ONE).replace(b"/v1/ingest", b"http://sluice.example:80/v1/ingest", 1)
            assert (await face.raw(raw)).status == 202
            target = f"http://sluice.example/v1/ingest?token={tenant.token}?temp=4.2"
            assert (await face.get(target)).status == 202
            assert (await face.get("http://sluice.example")).status == 404

    run(test())


# ---------------------------------------------------------------- connections


def test_a_connection_serves_many_requests(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face() as face, face.connect() as wire:
            for number in range(20):
                reply = await wire.ask(post_bytes(tenant.token, measured(("co2", number))))
                assert (reply.status, "connection" in reply.headers) == (202, False)
            await wire.send(post_bytes(tenant.token, ONE, Connection="close"))
            assert (await wire.reply()).headers["connection"] == "close"
            assert await wire.closed()

    run(test())


def test_http_1_0_closes_unless_it_asks_to_stay(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        old = get_line(tenant).replace(b"HTTP/1.1", b"HTTP/1.0")
        async with installation.face() as face:
            async with face.connect() as wire:
                reply = await wire.ask(old)
                assert (reply.status, reply.headers["connection"]) == (202, "close")
                assert await wire.closed()
            async with face.connect() as wire:
                for _ in range(2):
                    reply = await wire.ask(old.replace(b"\r\n\r\n", b"\r\nConnection: keep-alive\r\n\r\n"))
                    assert (reply.status, reply.headers["connection"]) == (202, "keep-alive")

    run(test())


def test_requests_sent_ahead_are_answered_in_their_order(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face() as face, face.connect() as wire:
            await wire.send(b"".join(post_bytes(tenant.token, measured(("co2", number))) for number in range(100)))
            replies = [await wire.reply() for _ in range(100)]
            assert {reply.status for reply in replies} == {202}
            values = [rows(record)[0][4] for record in await face.records_of(tenant.device)]
            assert values == [float(number) for number in range(100)]
            stamps = [rows(record)[0][3] for record in await face.records_of(tenant.device)]
            assert stamps == sorted(set(stamps))

    run(test())


def test_a_request_in_single_bytes_is_understood(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face() as face, face.connect() as wire:
            for byte in post_bytes(tenant.token, ONE):
                await wire.send(bytes([byte]))
                await asyncio.sleep(0)
            assert (await wire.reply()).status == 202

    run(test())


def test_a_get_with_a_body_is_a_get(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face() as face, face.connect() as wire:
            with_body = head_of("GET", f"/v1/ingest?token={tenant.token}&temp=1", Content_Length="5") + b"hello"
            for _ in range(2):
                assert (await wire.ask(with_body)).status == 202

    run(test())


def test_an_upgrade_is_not_taken_up(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face() as face, face.connect() as wire:
            for protocol in ("h2c", "websocket"):
                raw = post_bytes(tenant.token, ONE, Connection="Upgrade, HTTP2-Settings", Upgrade=protocol)
                assert (await wire.ask(raw)).status == 202
            assert (await wire.ask(get_line(tenant))).status == 202

    run(test())


BAD = (400, "bad_request")
LONG = (431, "head_too_large")
MALFORMED = [
    (b"\r\n\r\n\r\nnonsense\r\n\r\n", BAD),
    (b"GET\r\n\r\n", BAD),
    (b"GET /v1/ingest HTTP/9.9\r\nHost: a\r\n\r\n", BAD),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", BAD),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(200)), BAD),
    (b"GET /v1/ingest HTTP/1.1\r\n\r\n", BAD),
    (b"GET /v1/ingest HTTP/1.1\r\nHost: a\r\nno colon\r\n\r\n", BAD),
    (b"GET /v1/ingest HTTP/1.1\r\nHost: a\r\nX: \x00\r\n\r\n", BAD),
    (b"GET /\xff\xfe HTTP/1.1\r\nHost: a\r\n\r\n", BAD),
    (b"GET /v1/ingest?a=\x00 HTTP/1.1\r\nHost: a\r\n\r\n", BAD),
    (b"G\x00T / HTTP/1.1\r\nHost: a\r\n\r\n", BAD),
    (b"BREW /v1/ingest HTTP/1.1\r\nHost: a\r\n\r\n", (501, "not_implemented")),
    (b"POST /v1/ingest HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n", BAD),
    (b"POST /v1/ingest HTTP/1.1\r\nHost: a\r\nContent-Length: 1e3\r\n\r\n", BAD),
    (b"POST /v1/ingest HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999999\r\n\r\n", BAD),
    (b"POST /v1/ingest HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", BAD),
    (b"POST /v1/ingest HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", BAD),
    (b"GET /" + b"a" * 10_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", (414, "uri_too_long")),
    (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 10_000 + b"\r\n\r\n", LONG),
    (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 100 + b"\r\n", LONG),
    (b"GET http:///v1/ingest HTTP/1.1\r\nHost: a\r\n\r\n", BAD),
]


def test_what_is_no_http_is_told_so_and_let_go(installation: Installation, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face() as face:
            for raw, wanted in MALFORMED:
                async with face.connect() as wire:
                    reply = await wire.ask(raw)
                    assert ((reply.status, reply.code), reply.headers["connection"]) == (wanted, "close"), raw
                    assert await wire.closed()
            assert (await face.raw(get_line(tenant))).status == 202
            await until(
                lambda: _same(face.counted("sluice_ingest_requests_total", route="malformed"), len(MALFORMED))
            )

    run(test())
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_head_without_end_is_ended(installation: Installation) -> None:
    async def test() -> None:
        async with installation.face() as face, face.connect() as wire:
            sent, reply = 0, asyncio.create_task(wire.reply())
            await wire.send(b"GET / HTTP/1.1\r\n")
            while not reply.done() and sent < 10_000_000:
                await wire.send(b"X-Header: " + b"a" * 1000 + b"\r\n")
                await asyncio.sleep(0)
                sent += 1000
            assert ((await reply).status, (await reply).code) == LONG
            assert sent < 200_000

    run(test())


def test_a_slow_head_and_an_idle_connection_are_let_go(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        # The other time of each face is longer than the test may last.
        async with installation.face(http_idle_timeout_s=3_600.0, http_head_timeout_s=1.0) as face:
            async with face.connect() as slow:
                await slow.send(b"GET /v1/ingest HTTP/1.1\r\nHos")
                await slow.send(b"t: ")
                late = await slow.reply()
                assert (late.status, late.code, late.headers["connection"]) == (408, "request_timeout", "close")
                assert await slow.closed()
            await until(lambda: _same(face.server.count(), 0))
        async with installation.face(http_idle_timeout_s=2.0, http_head_timeout_s=3_600.0) as face:
            began = time.monotonic()
            async with face.connect() as idle, face.connect() as used:
                assert (await used.ask(get_line(tenant))).status == 202
                assert await idle.closed()
                assert await used.closed()
            assert time.monotonic() - began > 1.9
            await until(lambda: _same(face.server.count(), 0))

    run(test())


def test_a_body_in_pieces_and_a_head_after_it_are_no_slow_head(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face(http_head_timeout_s=0.3) as face, face.connect() as wire:
            raw = post_bytes(tenant.token, ONE)
            for piece in (raw[:-5], raw[-5:-1], raw[-1:]):
                await wire.send(piece)
                await asyncio.sleep(0.2)
            assert (await wire.reply()).status == 202
            await asyncio.sleep(0.5)
            assert (await wire.ask(get_line(tenant))).status == 202

    run(test())


async def _same(found: Any, wanted: Any) -> bool:
    return bool(found == wanted)


def test_connections_beyond_the_bound_are_closed_at_once(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face(http_connections_max=2) as face:
            async with face.connect() as first, face.connect() as second:
                for wire in (first, second):
                    assert (await wire.ask(get_line(tenant))).status == 202
                async with face.connect() as third:
                    assert await third.closed()
                assert (await first.ask(get_line(tenant))).status == 202
            await until(lambda: _same(face.server.count(), 0))
            assert (await face.raw(get_line(tenant))).status == 202

    run(test())


def test_answers_that_nobody_reads_do_not_pile_up(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face() as face, face.connect() as wire:
            wire.writer.transport.set_write_buffer_limits(high=2**30)
            wire.reader._transport.pause_reading()  # type: ignore[attr-defined]
            wire.writer.write(head_of("GET", "/nowhere") * 50_000)
            before = face.service._requests
            connections = face.server._connections
            assert connections is not None

            async def waits_for_the_reader() -> bool:
                return any(one.writing_paused for one in connections.open())

            await until(waits_for_the_reader)
            assert face.service._requests - before < 49_000
            assert (await face.raw(get_line(tenant))).status == 202
            wire.reader._transport.resume_reading()  # type: ignore[attr-defined]
            for _ in range(50_000):
                assert (await wire.reply()).status == 404

    run(test())


def test_what_is_in_flight_is_answered_when_it_stops(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face(wait_stored_s=0.5) as face, face.connect() as wire:
            await wire.send(post_bytes(tenant.token, ONE, Prefer="wait=stored"))
            before = await appended(face)
            await until(lambda: _grown(face, before - 1))
            stopping = asyncio.create_task(face.server.stop(5.0))
            reply = await wire.reply()
            assert (reply.status, reply.json()["accepted"]) == (202, 1)
            await stopping
            with pytest.raises(ConnectionRefusedError):
                await face.raw(get_line(tenant))

    run(test())


def test_whoever_connected_before_the_stop_is_answered_once_more(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with (
            installation.face() as face,
            face.connect() as fresh,
            face.connect() as used,
            face.connect() as half,
            face.connect() as silent,
        ):
            assert (await used.ask(get_line(tenant))).status == 202
            await half.send(get_line(tenant)[:20])
            stopping = asyncio.create_task(face.server.stop(5.0))
            connections = face.server._connections
            assert connections is not None
            await until(lambda: _same(connections.is_draining, True))
            await half.send(get_line(tenant)[20:])
            for wire in (fresh, used):
                await wire.send(get_line(tenant))
            for wire in (fresh, used, half):
                reply = await wire.reply()
                assert (reply.status, reply.headers["connection"]) == (202, "close")
            await stopping
            assert await silent.closed()

    run(test())


async def _grown(face: Face, before: int) -> bool:
    return await appended(face) > before


def test_a_client_that_goes_away_is_no_error(installation: Installation, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face() as face:
            whole = post_bytes(tenant.token, ONE)
            for length in (0, 5, len(whole) - 30, len(whole) - 1, len(whole)):
                async with face.connect() as wire:
                    await wire.send(whole[:length])
                    await asyncio.sleep(0.01)
            await until(lambda: _same(face.server.count(), 0))
            assert (await face.raw(whole)).status == 202

    run(test())
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_ids_of_requests_differ_and_stand_in_body_and_head(installation: Installation) -> None:
    async def test() -> None:
        async with installation.face() as face:
            replies = [await face.get("/nowhere") for _ in range(3)]
            ids = [json.loads(reply.body)["error"]["request_id"] for reply in replies]
            assert ids == [reply.headers["x-request-id"] for reply in replies]
            assert len(set(ids)) == 3

    run(test())


def test_a_request_keeps_the_good_id_that_it_came_with(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face() as face:
            for sent in ("7d0c", str(uuid4()), "Root=1-67891233-abcdef012345678912345678", "a" * 64):
                reply = await face.post(tenant.token, ONE, X_Request_Id=sent)
                assert (reply.status, reply.headers["x-request-id"]) == (202, sent)
                assert [one.request_id for one in await face.records_of(tenant.device)][-1] == sent
                refused = await face.post("nonsense", ONE, X_Request_Id=sent)
                assert (refused.status, refused.json()["error"]["request_id"]) == (401, sent)
            for sent in ("", "a" * 65, "a b", "-a", 'a"', "ä", tenant.token, f"x.{tenant.api_key}"):
                reply = await face.post(tenant.token, ONE, X_Request_Id=sent)
                assert reply.status == 202
                own = reply.headers["x-request-id"]
                assert own != sent
                assert [one.request_id for one in await face.records_of(tenant.device)][-1] == own

    run(test())


def test_pages_of_the_origins_that_are_set_may_send(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        ours, other = "https://app.example.org", "https://elsewhere.example.org"
        ask = {"Access_Control_Request_Method": "POST"}
        async with installation.face(origins=Origins((ours,))) as face:
            for origin, wanted in ((ours, ours), (other, None)):
                sent = await face.post(tenant.token, ONE, Origin=origin)
                assert (sent.status, sent.headers.get("access-control-allow-origin")) == (202, wanted)
                assert sent.headers["vary"] == "Origin"
                refused = await face.post("nonsense", ONE, Origin=origin)
                assert (refused.status, refused.headers.get("access-control-allow-origin")) == (401, wanted)
                asked = await face.raw(head_of("OPTIONS", "/v1/ingest", Origin=origin, **ask))
                assert (asked.status, asked.headers.get("access-control-allow-origin")) == (204, wanted)
            asked = await face.raw(head_of("OPTIONS", "/v1/ingest", Origin=ours, **ask))
            assert asked.headers["access-control-allow-methods"] == "GET, POST, OPTIONS"
            assert "X-Request-Id" in asked.headers["access-control-allow-headers"]
            assert "X-Request-Id" in asked.headers["access-control-expose-headers"]
            assert "vary" in (await face.post(tenant.token, ONE)).headers
        async with installation.face() as face:
            reply = await face.post(tenant.token, ONE, Origin=ours)
            assert not {"vary", "access-control-allow-origin"} & set(reply.headers)

    run(test())


class Stepped(SystemClock):
    """Its wall time is put forward and back."""

    ahead_us = 0

    def now_us(self) -> int:
        return super().now_us() + self.ahead_us


def test_a_clock_that_was_put_forward_and_back_is_believed_again(installation: Installation) -> None:
    async def test() -> None:
        tenant, clock = await installation.tenant(), Stepped()
        async with installation.face(clock=clock) as face:
            for clock.ahead_us in (0, 5 * 3_600_000_000, 0, -1_000_000):
                assert (await face.post(tenant.token, measured(("temperature", 4.2)))).status == 202
            moments = [record.received_at for record in await face.records_of(tenant.device)]
            assert moments[1] - moments[0] > 4 * 3_600_000_000
            # Put back by hours: believed at once. By a second: receive times go on from where they were.
            assert 0 < moments[2] - moments[0] < 600_000_000
            assert moments[3] > moments[2]

    run(test())

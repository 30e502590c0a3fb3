"""Bodies: packed, oversized, slow, endless, and lying about themselves."""

import asyncio
import gzip
import json
import time
import zlib
from collections.abc import Callable

import pytest
import zstandard

from tests.ingest_rig import Face, Installation, Reply, Tenant, Wire, head_of, measured, post_bytes, rows
from tests.landing_rig import until
from tests.support import run

ONE = json.dumps(measured(("temperature", 21.5))).encode()
BODY_BYTES_MAX = 4_000_000
CHUNKED = {"Transfer_Encoding": "chunked"}


def post_head(tenant: Tenant, **headers: str) -> bytes:
    return head_of("POST", "/v1/ingest", tenant.token, **headers)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


async def refused(face: Face, raw: bytes, status: int, code: str) -> Reply:
    """The answer to `raw`, which is a refusal; whoever comes next is served."""
    reply = await face.raw(raw)
    assert (reply.status, reply.code) == (status, code)
    assert (await face.get("/nowhere")).status == 404
    return reply


async def taken(face: Face, size: int) -> None:
    """Wait until so many bytes of bodies are held."""

    async def reached() -> bool:
        return face.service._room.taken == size

    await until(reached)


# ---------------------------------------------------------------- encodings and types


#: A zstd frame without content, which RFC 8878 has for other tools' notes.
_SKIPPABLE = b"\x50\x2a\x4d\x18\x05\x00\x00\x00notes"
PACKED = [
    ("identity", ONE),
    ("gzip", gzip.compress(ONE)),
    ("GZIP", gzip.compress(ONE)),
    ("x-gzip", gzip.compress(ONE)),
    ("gzip", gzip.compress(ONE[:20]) + gzip.compress(ONE[20:])),
    ("zstd", zstandard.compress(ONE)),
    ("zstd", zstandard.compress(ONE[:20]) + zstandard.compress(ONE[20:])),
    ("zstd", _SKIPPABLE + zstandard.compress(ONE + b" " * 400_000)),
    ("zstd", zstandard.ZstdCompressor(write_content_size=False, write_checksum=True).compress(ONE)),
]


def test_a_packed_body_is_unpacked(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face() as face:
            for encoding, body in PACKED:
                assert (await face.post(tenant.token, body, Content_Encoding=encoding)).status == 202, encoding
            values = [rows(record)[0][4] for record in await face.records_of(tenant.device)]
            assert values == [21.5] * len(PACKED)

    run(test())


def test_a_large_packed_body_is_unpacked_whole(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        submissions = [measured(("temperature", number / 100), ts=time.time() - number) for number in range(9_000)]
        body = json.dumps(submissions).encode()
        async with installation.face() as face:
            for encoding, packed in (("gzip", gzip.compress(body)), ("zstd", zstandard.compress(body))):
                reply = await face.post(tenant.token, packed, Content_Encoding=encoding)
                assert (reply.status, reply.json()["accepted"]) == (202, 9_000)

    run(test())


def test_an_encoding_nobody_asked_for_is_415_and_says_which_would_do(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face() as face:
            for encoding in ("br", "deflate", "gzip, gzip", "compress", "☃"):
                raw = post_bytes(tenant.token, ONE, Content_Encoding=encoding)
                reply = await refused(face, raw, 415, "unsupported_encoding")
                assert reply.headers["accept-encoding"] == "gzip, zstd"
            raw = post_bytes(tenant.token, ONE, Content_Encoding="\x7f")  # no character of a header
            await refused(face, raw, 400, "bad_request")

    run(test())


def test_types_of_a_json_text_are_taken_and_others_are_415(installation: Installation) -> None:
    good = ("application/json; charset=utf-8", "text/plain", "", "application/vnd.a+json", "TEXT/JSON")
    bad = ("text/html", "multipart/form-data; boundary=x", "application/xml", "image/png", "json", "☃")

    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face() as face:
            for kind in good:
                assert (await face.post(tenant.token, ONE, Content_Type=kind)).status == 202, kind
            for kind in bad:
                await refused(face, post_bytes(tenant.token, ONE, Content_Type=kind), 415, "unsupported_type")

    run(test())


DAMAGED = [
    ("gzip", ONE),
    ("gzip", gzip.compress(ONE)[:-1]),
    ("gzip", gzip.compress(ONE)[:-9]),
    ("gzip", gzip.compress(ONE) + b"\x1f\x8b"),
    ("gzip", gzip.compress(ONE) + b"junk"),
    ("gzip", gzip.compress(ONE)[:12] + b"\xff" + gzip.compress(ONE)[13:]),
    ("gzip", zlib.compress(ONE)),
    ("gzip", gzip.compress(b"") * 17),
    ("zstd", ONE),
    ("zstd", zstandard.compress(ONE)[:4]),
    ("zstd", zstandard.ZstdCompressor(write_checksum=True).compress(ONE)[:-4]),
    ("zstd", zstandard.compress(ONE + b" " * 400_000)[:-2]),
    ("zstd", zstandard.compress(ONE) + _SKIPPABLE[:-1]),
    ("zstd", zstandard.compress(ONE) + b"junk"),
    ("zstd", b"\x28\xb5\x2f\xfd" + b"\xff" * 100),
]


def test_a_body_that_does_not_unpack_is_400(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face() as face:
            for encoding, body in DAMAGED:
                raw = post_bytes(tenant.token, body, Content_Encoding=encoding)
                await refused(face, raw, 400, "bad_encoding")

    run(test())


def test_a_packed_body_that_was_cut_off_is_never_taken_in(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face() as face, face.connect() as wire:
            for encoding, packed in (("gzip", gzip.compress(ONE)), ("zstd", zstandard.compress(ONE))):
                for length in range(len(packed)):
                    reply = await wire.ask(post_bytes(tenant.token, packed[:length], Content_Encoding=encoding))
                    assert (reply.status, reply.code) == (400, "bad_encoding" if length else "bad_json")
            assert await face.records_of(tenant.device) == []

    run(test())


def _claims_to_be_small() -> bytes:
    """A zstd frame that says it holds 100 bytes, before 50 MB."""
    honest = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(50_000_000))
    return b"\x28\xb5\x2f\xfd\x20\x64" + honest[6:]


def _wide() -> bytes:
    """A zstd frame that wants a window of 128 MB."""
    wide = zstandard.ZstdCompressionParameters(window_log=27)
    return zstandard.ZstdCompressor(compression_params=wide).compress(bytes(9_000_000))


BOMBS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "gzip": ("gzip", lambda: gzip.compress(bytes(30_000_000))),
    "gzip members": ("gzip", lambda: gzip.compress(bytes(3_000_000)) * 2),
    "gzip nothing, often": ("gzip", lambda: gzip.compress(b"") * 150_000),
    "gzip in gzip": ("gzip", lambda: gzip.compress(gzip.compress(bytes(30_000_000)))),
    "zstd": ("zstd", lambda: zstandard.compress(bytes(100_000_000))),
    "zstd, no size": ("zstd", lambda: zstandard.ZstdCompressor(write_content_size=False).compress(bytes(50_000_000))),
    "zstd frames": ("zstd", lambda: zstandard.compress(bytes(3_000_000)) * 2),
    "zstd nothing, often": ("zstd", lambda: zstandard.compress(b"") * 200_000),
    "zstd says 100 bytes": ("zstd", _claims_to_be_small),
    "zstd says 16 EiB": ("zstd", lambda: b"\x28\xb5\x2f\xfd\xe0" + b"\xff" * 8 + b"\x01\x00\x00"),
    "zstd, wide": ("zstd", _wide),
}


def test_a_bomb_costs_no_more_than_a_body_may(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face() as face:
            await face.post(tenant.token, ONE)
            for name, (encoding, make) in BOMBS.items():
                raw = post_bytes(tenant.token, make(), Content_Encoding=encoding)
                began = time.process_time()
                reply = await face.raw(raw)
                assert time.process_time() - began < 0.5, name
                assert (reply.status, reply.code) in [
                    (413, "body_too_large"),
                    (400, "bad_encoding"),
                    (400, "bad_json"),  # unpacked once, it is another packed file, or nothing
                ], name
            assert (await face.post(tenant.token, ONE)).status == 202

    run(test())


# ---------------------------------------------------------------- sizes


def padded(size: int) -> bytes:
    return ONE + b" " * (size - len(ONE))


def test_a_body_may_have_exactly_its_bound(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        limit = BODY_BYTES_MAX
        async with installation.face() as face:
            assert (await face.post(tenant.token, padded(limit))).status == 202
            for encoding, pack in (("gzip", gzip.compress), ("zstd", zstandard.compress)):
                for size, status in ((limit, 202), (limit + 1, 413)):
                    reply = await face.post(tenant.token, pack(padded(size)), Content_Encoding=encoding)
                    assert reply.status == status

    run(test())


@pytest.mark.parametrize("size", [BODY_BYTES_MAX + 1, 10_000_000])
def test_a_larger_body_is_413_before_and_after_it_is_sent(installation: Installation, size: int) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face() as face:
            announced = post_head(tenant, Content_Length=str(size))
            reply = await refused(face, announced, 413, "body_too_large")
            assert reply.headers["connection"] == "close"
            await refused(face, announced + padded(size), 413, "body_too_large")
            packed = post_head(tenant, Content_Encoding="gzip", **CHUNKED) + chunk(padded(size))
            await refused(face, packed, 413, "body_too_large")

    run(test())


def test_more_readings_than_a_request_may_have_are_413(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        stamp = time.time()
        many = [{"type": "co2", "value": 1, "ts": stamp - number} for number in range(10_001)]
        async with installation.face() as face:
            reply = await face.post(tenant.token, {"measurements": many[:-1]})
            assert (reply.status, reply.json()["accepted"]) == (202, 10_000)
            await refused(face, post_bytes(tenant.token, {"measurements": many}), 413, "too_many_readings")
            split = [{"measurements": many[:5_000]}, {"measurements": many[5_000:]}]
            await refused(face, post_bytes(tenant.token, split), 413, "too_many_readings")

    run(test())


def test_readings_that_fill_more_than_a_batch_of_the_log_are_413(installation: Installation) -> None:
    """Also when they are refused, and it is the reasons that fill it."""

    async def test() -> None:
        tenant = await installation.tenant()
        texts = {"measurements": [{"type": "state", "value": "x" * 900}] * 2_000}
        bad_units = {"measurements": [{"type": "temperature", "value": 1, "unit": "bogus"}] * 10_000}
        async with installation.face() as face:
            for body in (texts, bad_units):
                await refused(face, post_bytes(tenant.token, body), 413, "body_too_large")

    run(test())


# ---------------------------------------------------------------- chunks, lengths and lies


def test_chunks_are_put_together(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face() as face, face.connect() as wire:
            body = b"".join(chunk(bytes([byte])) for byte in ONE) + b"0\r\n\r\n"
            assert (await wire.ask(post_head(tenant, **CHUNKED) + body)).status == 202
            await wire.send(post_head(tenant, **CHUNKED))
            for byte in ONE:
                await wire.send(chunk(bytes([byte])))
                await asyncio.sleep(0)
            assert (await wire.ask(b"0\r\nX-Trailer: 1\r\n\r\n")).status == 202

    run(test())


def test_chunks_without_end_are_ended_by_their_size(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face() as face, face.connect() as wire:
            await wire.send(post_head(tenant, **CHUNKED))
            reply = asyncio.create_task(wire.reply())
            sent = 0
            while not reply.done():
                await wire.send(chunk(b" " * 100_000))
                sent += 100_000
            assert ((await reply).status, (await reply).code) == (413, "body_too_large")
            assert sent < 10 * BODY_BYTES_MAX  # what stands in buffers, and what is read on to let it be heard
            assert face.service._room.taken == 0

    run(test())


def test_a_slow_body_is_ended_by_its_time(installation: Installation) -> None:
    async def trickle(wire: Wire, parts: bytes) -> Reply:
        reply = asyncio.create_task(wire.reply())
        while not reply.done():
            wire.writer.write(parts)
            await asyncio.sleep(0.02)
        return await reply

    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face(http_body_timeout_s=0.3) as face:
            async with face.connect() as endless, face.connect() as short, face.connect() as silent:
                await endless.send(post_head(tenant, **CHUNKED))
                await short.send(post_head(tenant, Content_Length="1000000"))
                await silent.send(post_head(tenant, Content_Length="100") + ONE[:10])
                began = time.monotonic()
                replies = await asyncio.gather(trickle(endless, chunk(b" ")), trickle(short, b" "), silent.reply())
                assert time.monotonic() - began > 0.25
            for reply in replies:
                assert (reply.status, reply.code, reply.headers["connection"]) == (408, "request_timeout", "close")

    run(test())


def test_a_malformed_chunk_is_told_at_once(installation: Installation) -> None:
    rests = (b"zz\r\n", b"-1\r\n", b"ffffffffffffffffff\r\n", b"5\r\nhelloworld\r\n", b"\r\n", b"5;\x00\r\n")

    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face(http_body_timeout_s=60.0) as face:
            for first in (b"", chunk(b" "), chunk(ONE)):
                for rest in rests:
                    async with face.connect() as wire:
                        await wire.send(post_head(tenant, **CHUNKED) + first)
                        await asyncio.sleep(0.002)
                        reply = await wire.ask(rest)
                        assert (reply.status, reply.code, reply.headers["connection"]) == (
                            400,
                            "bad_request",
                            "close",
                        )
            assert await face.records_of(tenant.device) == []

    run(test())


def test_a_length_that_lies(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face(http_body_timeout_s=0.2) as face:
            too_short = post_head(tenant, Content_Length=str(len(ONE) - 1)) + ONE
            assert (await face.raw(too_short)).status == 400
            too_long = post_head(tenant, Content_Length=str(len(ONE) + 1)) + ONE
            assert (await face.raw(too_long)).status == 408
            assert await face.records_of(tenant.device) == []

    run(test())


def test_a_client_that_waits_to_be_told_is_told(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        length = str(len(ONE))
        async with installation.face(http_body_timeout_s=3.0) as face:
            async with face.connect() as wire:
                reply = await wire.ask(post_head(tenant, Content_Length=length, Expect="100-continue"))
                assert (reply.status, reply.body) == (100, b"")
                assert (await wire.ask(ONE)).status == 202
                whole = post_head(tenant, Content_Length=length, Expect="100-continue") + ONE
                assert (await wire.ask(whole)).status == 202  # it did not wait, and needs no telling
                assert (await wire.ask(whole.replace(b"100-continue", b"a-pony"))).status == 202
            too_large = post_head(tenant, Content_Length="10000000", Expect="100-continue")
            await refused(face, too_large, 413, "body_too_large")
            unknown = head_of("POST", "/v1/ingest", Content_Length=length, Expect="100-continue")
            await refused(face, unknown, 401, "auth_required")
            old = post_head(tenant, Content_Length=length, Expect="100-continue").replace(b"HTTP/1.1", b"HTTP/1.0")
            await refused(face, old, 408, "request_timeout")  # such a client would not understand a 100

    run(test())


# ---------------------------------------------------------------- together


def test_bodies_of_all_requests_together_are_bounded(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face(http_in_flight_bytes_max=1_000_000) as face:
            for headers, body in (
                ({"Content_Length": "900001"}, b" " * 900_000),
                (CHUNKED, b"".join(chunk(b" " * 90_000) for _ in range(10))),
            ):
                async with face.connect() as holding:
                    await holding.send(post_head(tenant, **headers) + body)
                    await taken(face, 900_000)
                    reply = await refused(face, post_bytes(tenant.token, padded(200_000)), 503, "overloaded")
                    assert 1 <= int(reply.headers["retry-after"]) <= 5
                    assert (await face.post(tenant.token, ONE)).status == 202
                await taken(face, 0)
                assert (await face.post(tenant.token, padded(200_000))).status == 202

    run(test())


def test_what_was_announced_but_not_sent_takes_no_room(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        bound = installation.face(http_in_flight_bytes_max=1_000_000)
        async with bound as face, face.connect() as one, face.connect() as two:
            for wire in (one, two):
                await wire.send(post_head(tenant, Content_Length="900000") + b" ")
            await taken(face, 2)
            assert (await face.post(tenant.token, padded(500_000))).status == 202

    run(test())


def test_a_body_that_unpacks_to_more_than_there_is_room_for_is_503(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face(http_in_flight_bytes_max=1_000_000) as face:
            packed = gzip.compress(padded(2_000_000))
            await refused(face, post_bytes(tenant.token, packed, Content_Encoding="gzip"), 503, "overloaded")
            assert face.service._room.taken == 0

    run(test())

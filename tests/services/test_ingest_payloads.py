"""Requests of real devices, byte for byte, and the readings that come of them."""

import time
from datetime import datetime

from schemas.record import Quality
from tests.ingest_rig import Installation, rows
from tests.support import run

STAMPED = Quality.TIME_STAMPED.value
CONVERTED = Quality.UNIT_CONVERTED.value
H_AND_T = [("humidity", "", "%", 45.0, STAMPED), ("temperature", "", "°C", 21.38, STAMPED)]
AGENT = (
    b"Host: 192.168.1.10:8080\r\nUser-Agent: Shelly/20230913-112003/v1.14.0-gcb84623 (SHHT-1)\r\n"
    b"Connection: close\r\n\r\n"
)

#: A request line, and the readings it makes.
GETS = [
    # Gen1 H&T: appended to a URL with the token in its path, with a query, and with the query's own separator.
    ("/v1/ingest/shelly/{}?hum=45&temp=21.38&id=shellyht-1BDD1B", H_AND_T),
    ("/v1/ingest/shelly/{}&hum=45&temp=21.38&id=shellyht-1BDD1B", H_AND_T),
    ("/v1/ingest?token={}&device=fridge?hum=45&temp=21.38&id=shellyht-1BDD1B", H_AND_T),
    ("/v1/ingest?token={}&device=fridge&hum=45&temp=21.38&id=shellyht-1BDD1B", H_AND_T),
    # Gen2 and Gen3 webhooks: one reading a request.
    ("/v1/ingest?token={}&device=fridge&temp=4.2", [("temperature", "", "°C", 4.2, STAMPED)]),
    ("/v1/ingest?token={}&device=fridge&hum=61.0", [("humidity", "", "%", 61.0, STAMPED)]),
    ("/v1/ingest?token={}&tF=68", [("temperature", "", "°C", 20.0, STAMPED | CONVERTED)]),
    ("/v1/ingest?token={}&temp=4.2&hum=${{ev.rh}}", [("temperature", "", "°C", 4.2, STAMPED)]),
    # Gen1 Flood and Door/Window.
    ("/v1/ingest/shelly/{}?temp=19.5&flood=1&batV=2.97&id=shellyflood-1", [
        ("temperature", "", "°C", 19.5, STAMPED), ("leak", "", "", 1.0, STAMPED | 16),
        ("battery_voltage", "", "V", 2.97, STAMPED)]),
    ("/v1/ingest/shelly/{}?state=open&lux=120&temp=19.5&id=shellydw2-1", [
        ("open", "", "", 1.0, STAMPED | 16), ("illuminance", "", "lx", 120.0, STAMPED),
        ("temperature", "", "°C", 19.5, STAMPED)]),
]  # fmt: skip


def test_shelly(installation: Installation) -> None:
    async def test() -> None:
        async with installation.face() as face:
            for target, expected in GETS:
                tenant = await installation.tenant()
                before = time.time_ns() // 1000
                reply = await face.raw(b"GET %s HTTP/1.1\r\n" % target.format(tenant.token).encode(), AGENT)
                after = time.time_ns() // 1000
                assert (reply.status, reply.json()["accepted"]) == (202, len(expected)), target
                (record,) = await face.records_of(tenant.device)
                assert [row[:3] + row[4:] for row in rows(record)] == expected, target
                assert all(before <= row[3] <= after for row in rows(record))
                assert tenant.token not in repr(record)

    run(test())


ESP32 = (
    b"POST /v1/ingest HTTP/1.1\r\nHost: 192.168.1.10\r\nUser-Agent: ESP32HTTPClient\r\nConnection: keep-alive\r\n"
    b"Accept-Encoding: identity;q=1,chunked;q=0.1,*;q=0\r\nAuthorization: Bearer %s\r\n"
    b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
)


def test_esp32(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        body = (
            b'{"device":"fridge","ts":"2026-05-17T08:22:00Z","measurements":[{"type":"temperature","value":4.2,'
            b'"label":"front"}]}'
        )
        await installation.execute(tenant, "UPDATE organisations SET raw_retention_days = 36500")
        async with installation.face(reading_future_s=1e9) as face:
            reply = await face.raw(ESP32 % (tenant.token.encode(), len(body), body))
            assert (reply.status, reply.json()["accepted"], reply.json()["rejected"]) == (202, 1, [])
            (record,) = await face.records_of(tenant.device)
            moment = round(datetime.fromisoformat("2026-05-17T08:22:00Z").timestamp() * 1e6)
            assert rows(record) == [("temperature", "front", "°C", moment, 4.2, 0)]

    run(test())


def test_curl_as_the_first_start_prints_it(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        body = b'{"measurements": [{"type": "temperature", "value": 21.5}]}'
        head = b"POST /v1/ingest HTTP/1.1\r\nHost: 127.0.0.1:8080\r\nUser-Agent: curl/8.5.0\r\nAccept: */*\r\n"
        more = b"Authorization: Bearer %s\r\nContent-Length: %d\r\nContent-Type: %s\r\n\r\n"
        async with installation.face() as face:
            for kind in (b"application/json", b"application/x-www-form-urlencoded"):
                reply = await face.raw(head, more % (tenant.token.encode(), len(body), kind), body)
                assert (reply.status, reply.json()["accepted"]) == (202, 1)

    run(test())


def test_a_placeholder_alone_is_refused_and_says_why(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face() as face:
            reply = await face.raw(
                b"GET /v1/ingest?token=%s&temp=${ev.tC} HTTP/1.1\r\n" % tenant.token.encode(), AGENT
            )
            assert (reply.status, reply.code) == (422, "all_refused")
            (why,) = reply.json()["error"]["rejected"]
            assert (why["code"], why["index"]) == ("unexpanded_placeholder", 0)

    run(test())


def test_no_token_of_an_url_is_kept_or_told(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        token = tenant.token
        async with installation.face() as face:
            for query in (
                f"{token}=1",
                token,
                f"key={token}",
                f"temp={token}",
                f"event={token}&{token}",
                f"ts={token}&temp=1",
            ):
                reply = await face.get(f"/v1/ingest?token={token}&{query}")
                assert reply.status in (202, 422)
                assert token[8:] not in reply.body.decode()
            for record in await face.records_of(tenant.device):
                for refused in record.refused:
                    assert token[8:] not in refused.message + refused.payload.decode()

    run(test())

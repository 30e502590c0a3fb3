"""What a request costs ingest, piece by piece and without I/O: decode, admit, encode, who sends, the receipt.

`pytest bench/test_ingest.py --benchmark-only`. Left out: HTTP and the log's engines.
"""

import asyncio
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any, Final
from uuid import UUID, uuid4

import orjson
import pytest
import rfc8785
from prometheus_client import CollectorRegistry
from pytest_benchmark.fixture import BenchmarkFixture

from bench.workload import Fleet, Round, single_post
from ingest.admit import Admission, Admitted, Sender
from ingest.credentials import Credentials, Grant
from ingest.formats import measurements_json, shelly_get
from ingest.formats.shape import Submission
from ingest.limits import Limits, LimitSettings
from ingest.metrics import IngestMetrics
from ingest.mqtt import snapshots
from ingest.mqtt.marking import with_nonce
from ingest.plants import Plants
from ingest.receipts import Place, Receipt, Receipts
from ingest.settings import IngestSettings
from runtime.clock import ManualClock, SystemClock
from runtime.secrets import DEVICE_PREFIX, Seal, TokenHasher, make_token, new_ring
from schemas import record as records
from schemas.plants import SECRET_SEAL
from schemas.signing import canonical, signature, snapshot_parts

CLOCK: Final = ManualClock()
FLEET: Final = Fleet(["token"], CLOCK.now_us() // 1_000_000 - 3_600)
QUERY: Final = "temp=21.50&hum=45&id=shellyht-0123AB&battery=97&ts=1699999000"
SENDER: Final = Sender(uuid4().bytes, uuid4().bytes)
RETENTION_DAYS: Final = 396


def body_of(readings: int, *, epoch_times: bool = False) -> bytes:
    return Fleet(FLEET.tokens, FLEET.begin_s, epoch_times).body(0, 0, readings)


class Admit:
    """Admission of one body, as ingest calls it."""

    def __init__(self, submissions: list[Submission]) -> None:
        self._admission = Admission(future_us=600_000_000, year_floor=2015)
        self._submissions = list(enumerate(submissions))

    def __call__(self) -> Admitted:
        window = self._admission.window(CLOCK.now_us(), RETENTION_DAYS)
        return self._admission.admit(
            self._submissions, SENDER, window, record_id=SENDER.device, request_id="0123456789ab1", way="http"
        )


# ---------------------------------------------------------------- formats


@pytest.mark.parametrize("readings", [1, 100])
def test_decode_json(benchmark: BenchmarkFixture, readings: int) -> None:
    (submission,) = benchmark(measurements_json.decode, body_of(readings))

    assert len(submission.measurements) == readings


def test_decode_json_piece_by_piece(benchmark: BenchmarkFixture) -> None:
    """The way of a body that has one bad number in it."""
    (submission,) = benchmark(measurements_json.decode, body_of(100).replace(b"21.0,", b"1e400,", 1))

    assert len(submission.measurements) == 100


def test_decode_shelly_get(benchmark: BenchmarkFixture) -> None:
    query = benchmark(shelly_get.decode, QUERY)

    assert len(query.submission.measurements) == 3


# ---------------------------------------------------------------- admit and the record


@pytest.mark.parametrize(
    "body",
    [single_post("", 21.5).partition(b"\r\n\r\n")[2], body_of(100), body_of(100, epoch_times=True)],
    ids=["1-untimed", "100-rfc3339", "100-epoch"],
)
def test_admit(benchmark: BenchmarkFixture, body: bytes) -> None:
    admitted = benchmark(Admit(measurements_json.decode(body)))

    assert not admitted.rejections


@pytest.mark.parametrize("readings", [1, 100])
def test_encode_record(benchmark: BenchmarkFixture, readings: int) -> None:
    body = benchmark(records.encode, Admit(measurements_json.decode(body_of(readings)))().record)

    assert len(body) / readings <= (24 if readings == 100 else 200)


@pytest.mark.parametrize("readings", [1, 100])
def test_decode_record(benchmark: BenchmarkFixture, readings: int) -> None:
    body = records.encode(Admit(measurements_json.decode(body_of(readings)))().record)

    assert benchmark(records.decode, body).accepted == readings


# ---------------------------------------------------------------- who sends, and what it is given


class OneGrant:
    """A pool that knows one token, and stands in for the database."""

    def __init__(self, token_hash: bytes) -> None:
        self._row = {
            "token_hash": token_hash, "kind": "device", "organisation_id": uuid4(), "device_id": uuid4(),
            "site_id": None, "local_id": "demo", "status": "active", "raw_retention_days": RETENTION_DAYS,
            "expires_s": None, "epoch": 1, "limits": None,
        }  # fmt: skip

    async def fetch(self, query: str, *arguments: Any) -> list[Any]:
        return [self._row] if arguments else [{"epoch": 1}]

    async def listen(self, channel: str, callback: Callable[..., None]) -> None:
        await asyncio.Event().wait()


def test_known_credential(benchmark: BenchmarkFixture) -> None:
    """From the token as it was sent to its grant, out of the cache."""
    hasher, token = TokenHasher(new_ring()), make_token(DEVICE_PREFIX)
    source = OneGrant(hasher.digest(token))

    async def know() -> Credentials:
        credentials = Credentials(source, source, IngestSettings(), CLOCK, IngestMetrics(CollectorRegistry()))
        await credentials.start()
        await asyncio.sleep(0.3)  # what changed is asked for before anything is cached
        await credentials.find(hasher.digests(token))
        await credentials.stop()
        return credentials

    credentials = asyncio.run(know())

    assert benchmark(lambda: credentials.cached(hasher.digest(token))) is not None


@pytest.mark.parametrize("overrides", [None, (10**9,) * 6, (0,) * 6], ids=["defaults", "high", "none"])
@pytest.mark.parametrize("processes", [1, 2])
def test_count_a_request(
    benchmark: BenchmarkFixture, tmp_path: Path, processes: int, overrides: tuple[int, ...] | None
) -> None:
    """A request of one reading against all its limits, from one of 10,000 devices of 1,000 organisations."""
    clock = SystemClock()
    limits = [Limits(LimitSettings(), clock, tmp_path) for _ in range(processes)]
    organisations = [uuid4().bytes for _ in range(1_000)]
    grants = cycle([_grant(organisations[number % 1_000], overrides) for number in range(10_000)])

    def count() -> None:
        grant = next(grants)
        limits[0].request(grant, clock.now_us())
        limits[0].volume(grant, 1, 80)

    # Not as often as it likes: nobody is to reach a limit.
    benchmark.pedantic(count, rounds=10, iterations=20_000, warmup_rounds=1)  # type: ignore[no-untyped-call]
    for one in limits:
        one.close()


def _grant(organisation: bytes, overrides: tuple[int, ...] | None) -> Grant:
    device = uuid4().bytes
    return Grant("device", organisation, device, None, "demo", False, 396, 1e12, device, 1, 0.0, overrides)


def test_make_receipt(benchmark: BenchmarkFixture) -> None:
    source = OneGrant(b"")
    receipts = Receipts(Seal(new_ring(), "receipts"), source, CLOCK, 86_400.0)
    receipt = Receipt(uuid4().bytes, uuid4().bytes, [Place(3, 123_456, 100)])

    text = benchmark(receipts.make, receipt)

    assert receipts.read(text, receipt.organisation) == receipt


# ---------------------------------------------------------------- the load itself


def test_make_the_load(benchmark: BenchmarkFixture) -> None:
    """Made before it is sent: bounds how long a run takes to prepare."""
    lanes = benchmark(Round(FLEET, 0, 100, 100).lanes, 1)

    assert len(lanes[0]) == 100


# ---------------------------------------------------------------- plants


class Snapshots:
    """A cabinet with three devices behind it, eighteen readings of them, signed or not."""

    def __init__(self, *, must_sign: bool) -> None:
        self._admission = Admission(future_us=600_000_000, year_floor=2015)
        seal, device, secret = Seal(new_ring(), SECRET_SEAL), UUID(bytes=SENDER.device), bytes(32)
        templates = [
            _template(1, "PLANT", "CABINET", [{"name": f"bit_{bit}", "bit": bit} for bit in range(8)]),
            _template(2, "DEVICE", "METER", _fields("power", "imported", "exported")),
            _template(3, "DEVICE", "INVERTER", _fields("power", "produced")),
            _template(4, "DEVICE", "BATTERY", _fields("power", "soc")),
        ]
        row = {
            "device_id": device, "organisation_id": None, "plant_template": UUID(int=1),
            "auth_method": "TOKEN" if must_sign else "MTLS",
            "secret": seal.seal(secret), "former_secret": None, "former_until_us": None,
        }  # fmt: skip
        self._plant = Plants(seal).reader(templates)(row)
        now_ms = CLOCK.now_us() // 1_000
        self.envelope: dict[str, Any] = {"ts": now_ms, "n": "0a1b2c3d4e5f6071", "timestamp": now_ms - 500}
        self.envelope["devices"] = [
            {"externalId": "CAB-1", "type": "CABINET", "raw": 0b1010_0101},
            {
                "externalId": "M-1",
                "type": "METER",
                "values": {"power": 1523.5, "imported": 1023.125, "exported": 23.1},
            },
            {"externalId": "INV-1", "type": "INVERTER", "values": {"power": 4000, "produced": 90210.25}},
            {"externalId": "BAT-1", "type": "BATTERY", "values": {"power": -120.5, "soc": 81, "cycles": 12}},
            {"externalId": "BAT-2", "type": "BATTERY", "values": {"power": -119.5}},
        ]
        if must_sign:
            parts = snapshot_parts(str(device), now_ms, self.envelope["n"], now_ms - 500, self.envelope["devices"])
            self.envelope["sig"] = signature(secret, *parts)
        self._payload = orjson.dumps(self.envelope)

    def __call__(self) -> Admitted:
        """As the bridge does it, from the payload to what the log is given."""
        window = self._admission.window(CLOCK.now_us(), RETENTION_DAYS)
        snapshot = snapshots.read(self._payload, self._plant, window, 300_000_000)
        admitted = self._admission.admit(
            [(0, snapshot.submission)],
            SENDER,
            window,
            record_id=SENDER.device,
            request_id="0123456789ab1",
            way="mqtt",
        )
        records.encode(with_nonce(admitted, snapshot).record)
        return admitted


def _template(number: int, level: str, kind: str, signals: list[dict[str, Any]]) -> dict[str, Any]:
    text = orjson.dumps(signals).decode()
    return {"template_id": UUID(int=number), "organisation_id": None, "level": level, "type": kind, "signals": text}


def _fields(*names: str) -> list[dict[str, Any]]:
    return [{"name": name, "field": name} for name in names]


@pytest.mark.parametrize("must_sign", [False, True], ids=["unsigned", "signed"])
def test_snapshot(benchmark: BenchmarkFixture, must_sign: bool) -> None:
    assert benchmark(Snapshots(must_sign=must_sign)).accepted == 18


@pytest.mark.parametrize("write", [canonical, rfc8785.dumps], ids=["ours", "library"])
def test_canonical_form_of_a_snapshot(benchmark: BenchmarkFixture, write: Callable[[Any], bytes]) -> None:
    devices = Snapshots(must_sign=False).envelope["devices"]

    assert benchmark(write, devices) == rfc8785.dumps(devices)

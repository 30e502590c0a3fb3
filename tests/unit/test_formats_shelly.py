"""Shelly's GET requests, in every way their firmware joins its parameters to a URL."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest.formats.shape import BodyError, Malformed, Measurement, Submission
from ingest.formats.shelly_get import decode
from schemas.errors import RequestCode


def readings(query: str) -> list[object]:
    return decode(query).submission.measurements


def refusal(query: str) -> tuple[str, str]:
    """Code and message of the one parameter, which was refused."""
    (one,) = readings(query)
    assert isinstance(one, Malformed)
    return str(one.code), one.message


H_AND_T = [Measurement("humidity", 45.0), Measurement("temperature", 21.38)]


@pytest.mark.parametrize(
    ("query", "token", "device"),
    [
        ("hum=45&temp=21.38&id=shellyht-1BDD1B", None, None),
        ("token=T&device=fridge01?hum=45&temp=21.38&id=shellyht-1BDD1B", "T", "fridge01"),
        ("token=T&device=fridge01&hum=45&temp=21.38&id=shellyht-1BDD1B", "T", "fridge01"),
        ("?hum=45&temp=21.38", None, None),
        ("&hum=45&&temp=21.38&", None, None),
        ("token=T?hum=45?temp=21.38", "T", None),
        ("hum=45&temp=21.38&token=T", "T", None),
        ("%68um=4%35&temp=%2B21.38", None, None),
        ("hum=45&temp=+21.38&device=", None, None),
        ("HUM=45&Temp=21.38", None, None),
    ],
)
def test_gen1_and_its_ways_to_join_parameters(query: str, token: str | None, device: str | None) -> None:
    found = decode(query)
    assert found.token == token
    assert found.submission == Submission(H_AND_T, device, None)


def test_gen2_sends_one_parameter_at_a_time() -> None:
    assert decode("token=T&device=fridge01&temp=4.2").submission == Submission(
        [Measurement("temperature", 4.2)], "fridge01", None
    )
    assert readings("token=T&device=fridge01&hum=61.0") == [Measurement("humidity", 61.0)]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("battery=87", Measurement("battery", 87.0)),
        ("batV=2.9", Measurement("battery_voltage", 2.9, None, "V")),
        ("tC=4.2", Measurement("temperature", 4.2, None, "°C")),
        ("tF=39.6", Measurement("temperature", 39.6, None, "°F")),
        ("signal=-61", Measurement("signal", -61.0)),
        ("lux=120", Measurement("illuminance", 120.0)),
        ("apower=1.5e3", Measurement("power", 1500.0)),
        ("flood=1", Measurement("leak", True)),
        ("state=open", Measurement("open", True)),
        ("state=close", Measurement("open", False)),
        ("motion=0", Measurement("motion", False)),
        ("smoke=heavy", Measurement("smoke", True)),
        ("lwt=Offline", Measurement("online", False)),
        ("ext_power=true", Measurement("external_power", True)),
        ("event=S", Measurement("event", "S")),
        ("act_reasons=sensor,poweron", Measurement("wake_reason", "sensor,poweron")),
        ("event=a%20b%2Bc", Measurement("event", "a b+c")),
        ("event=%C3%A9%FF", Measurement("event", "é\ufffd")),
    ],
)
def test_the_parameters_of_its_sensors(query: str, expected: Measurement) -> None:
    assert readings(query) == [expected]


@pytest.mark.parametrize(
    ("query", "ts"),
    [
        ("ts=1779006120", "1779006120"),
        ("ts=2026-05-17T08:22:00Z", "2026-05-17T08:22:00Z"),
        ("ts=2026-05-17T10:22:00%2B02:00", "2026-05-17T10:22:00+02:00"),
        ("ts=2026-05-17T10:22:00+02:00", "2026-05-17T10:22:00+02:00"),  # a form's + would be a space
        ("ts=", None),
        ("ts", None),
        ("ts=null", None),
        ("ts=${ev.ts}", None),
        ("ts=%24%7Bev.ts%7D", None),
    ],
)
def test_its_time_if_it_says_one(query: str, ts: str | None) -> None:
    assert decode(f"temp=4&{query}").submission == Submission([Measurement("temperature", 4.0)], None, ts)


@pytest.mark.parametrize("value", ["${ev.tC}", "%24%7Bev.tC%7D", "{{tC}}", "%{tC}"])
def test_a_placeholder_that_was_not_filled_in_is_refused_alone(value: str) -> None:
    bad, good = readings(f"temp={value}&hum=61.0")
    assert isinstance(bad, Malformed)
    assert bad.code == "unexpanded_placeholder"
    assert good == Measurement("humidity", 61.0)


@pytest.mark.parametrize(
    ("query", "code", "message"),
    [
        ("temp=", "invalid_value", "`temp` is empty"),
        ("temp", "invalid_value", "`temp` is empty"),
        ("temp=null", "invalid_value", "`temp` is empty"),
        ("temp=warm", "invalid_value", "`temp` holds no value it can have"),
        ("temp=1_0", "invalid_value", "`temp` holds no value it can have"),
        ("temp=%D9%A1%D9%A2", "invalid_value", "`temp` holds no value it can have"),
        (
            "event=door%20${ev.state}",
            "unexpanded_placeholder",
            "`event` holds a placeholder the device did not fill in",
        ),
        ("temp=21,5", "invalid_value", "`temp` holds no value it can have"),
        ("flood=maybe", "invalid_value", "`flood` holds no value it can have"),
        ("warp=9", "unknown_parameter", "`warp` is no parameter that Sluice knows"),
        ("warp=${x}", "unexpanded_placeholder", "`warp` holds a placeholder the device did not fill in"),
        ("=5&warp=9", "unknown_parameter", "`warp` is no parameter that Sluice knows"),
        ("%00%0A=9", "unknown_parameter", "`'\\x00\\n'` is no parameter that Sluice knows"),
    ],
)
def test_a_parameter_that_says_nothing_is_refused_by_itself(query: str, code: str, message: str) -> None:
    assert refusal(query) == (code, message)


@pytest.mark.parametrize("value", ["nan", "-inf", "1e400", "Infinity"])
def test_numbers_that_are_not_finite_are_left_to_be_judged(value: str) -> None:
    (one,) = readings(f"temp={value}")
    assert isinstance(one, Measurement)
    assert not abs(one.value) < float("inf")


def test_what_the_firmware_says_of_itself_is_no_reading() -> None:
    assert readings("id=shellyht-1BDD1B&cid=1&mac=AABBCC&src=x&component=y") == []
    assert readings("") == []


def test_a_query_without_end_is_refused_as_a_whole() -> None:
    assert len(readings("&".join(["temp=1"] * 100))) == 100
    with pytest.raises(BodyError) as raised:
        decode("&".join(["temp=1"] * 101))
    assert raised.value.code is RequestCode.INVALID_PARAMETER


@given(
    st.text(max_size=200)
    | st.lists(st.sampled_from(["temp", "ts", "token", "=", "&", "?", "%", "+", "$", "{", "7", "é"])).map("".join)
)
def test_any_query_is_readings_and_refusals(query: str) -> None:
    try:
        found = decode(query)
    except BodyError:
        return
    for one in found.submission.measurements:
        if isinstance(one, Malformed):
            assert one.message.isprintable()
            assert len(one.message) < 400
        else:
            assert type(one) is Measurement
            assert type(one.value) in (float, bool, str)

"""The metric catalogue: conversions that hit known pairs to the last bit, and spellings that lead somewhere."""

import math
import re
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.catalogue import METRIC_SPELLINGS, METRICS, UNIT_SPELLINGS

#: (metric, value, unit, canonical value): one at least for every conversion there is.
PAIRS = [
    ("temperature", 68.0, "°F", 20.0),
    ("temperature", -40.0, "°F", -40.0),
    ("temperature", 273.15, "K", 0.0),
    ("dew_point", 50.0, "°F", 10.0),
    ("dew_point", 283.15, "K", 10.0),
    ("humidity", 0.5, "1", 50.0),
    ("soil_moisture", 0.25, "1", 25.0),
    ("level", 1.0, "1", 100.0),
    ("pressure", 101_325.0, "Pa", 1013.25),
    ("pressure", 101.325, "kPa", 1013.25),
    ("pressure", 1013.25, "mbar", 1013.25),
    ("pressure", 1.0, "bar", 1000.0),
    ("pressure", 1.0, "psi", 68.947572931683),
    ("pressure", 1.0, "mmHg", 1.33322387415),
    ("co2", 0.04, "%", 400.0),
    ("gas", 0.1, "%", 1000.0),
    ("tvoc", 0.5, "ppm", 500.0),
    ("pm2_5", 0.035, "mg/m³", 35.0),
    ("pm10", 0.05, "mg/m³", 50.0),
    ("illuminance", 1.5, "klx", 1500.0),
    ("voltage", 3300.0, "mV", 3.3),
    ("voltage", 0.4, "kV", 400.0),
    ("battery_voltage", 3300.0, "mV", 3.3),
    ("battery_voltage", 0.5, "kV", 500.0),
    ("current", 250.0, "mA", 0.25),
    ("current", 1.5, "kA", 1500.0),
    ("power", 500.0, "mW", 0.5),
    ("power", 1.5, "kW", 1500.0),
    ("power", 2.0, "MW", 2_000_000.0),
    ("apparent_power", 1.5, "kVA", 1500.0),
    ("reactive_power", 0.5, "kvar", 500.0),
    ("power_factor", 95.0, "%", 0.95),
    ("energy", 2.0, "kWh", 2000.0),
    ("energy", 1.5, "MWh", 1_500_000.0),
    ("energy", 3600.0, "J", 1.0),
    ("energy", 3.6, "kJ", 1.0),
    ("energy", 60.0, "Wmin", 1.0),
    ("energy_produced", 2.0, "kWh", 2000.0),
    ("energy_produced", 1.5, "MWh", 1_500_000.0),
    ("energy_produced", 3600.0, "J", 1.0),
    ("energy_produced", 3.6, "kJ", 1.0),
    ("energy_produced", 60.0, "Wmin", 1.0),
    ("energy_imported", 2.0, "kWh", 2000.0),
    ("energy_imported", 1.5, "MWh", 1_500_000.0),
    ("energy_imported", 3600.0, "J", 1.0),
    ("energy_imported", 3.6, "kJ", 1.0),
    ("energy_imported", 60.0, "Wmin", 1.0),
    ("energy_exported", 2.0, "kWh", 2000.0),
    ("energy_exported", 1.5, "MWh", 1_500_000.0),
    ("energy_exported", 3600.0, "J", 1.0),
    ("energy_exported", 3.6, "kJ", 1.0),
    ("energy_exported", 60.0, "Wmin", 1.0),
    ("frequency", 2.4, "kHz", 2400.0),
    ("frequency", 868.0, "MHz", 868_000_000.0),
    ("battery", 3.3, "V", 3.3),
    ("battery", 3300.0, "mV", 3.3),
    ("wind_speed", 36.0, "km/h", 10.0),
    ("wind_speed", 100.0, "mph", 44.704),
    ("wind_speed", 36.0, "kn", 18.52),
    ("rain", 2.5, "cm", 25.0),
    ("rain", 0.025, "m", 25.0),
    ("rain", 1.0, "in", 25.4),
    ("distance", 1500.0, "mm", 1.5),
    ("distance", 150.0, "cm", 1.5),
    ("distance", 1.5, "km", 1500.0),
    ("volume", 2.0, "m³", 2000.0),
    ("volume", 500.0, "ml", 0.5),
    ("flow", 60.0, "l/h", 1.0),
    ("flow", 6.0, "m³/h", 100.0),
    ("weight", 500.0, "g", 0.5),
    ("weight", 1.5, "t", 1500.0),
    ("duration", 1500.0, "ms", 1.5),
    ("duration", 2.0, "min", 120.0),
    ("duration", 2.0, "h", 7200.0),
    ("uptime", 1500.0, "ms", 1.5),
    ("uptime", 2.0, "min", 120.0),
    ("uptime", 2.0, "h", 7200.0),
]


@pytest.mark.parametrize(("metric", "value", "unit", "canonical"), PAIRS)
def test_a_conversion_hits_a_known_pair(metric: str, value: float, unit: str, canonical: float) -> None:
    assert METRICS[metric].conversions[unit](value) == pytest.approx(canonical, rel=1e-15, abs=1e-12)


@pytest.mark.parametrize(
    ("metric", "value", "unit", "canonical"),
    [
        ("temperature", 68.0, "°F", 20.0),
        ("temperature", 71.33, "°F", 21.85),
        ("temperature", 70.0, "°F", 21.11111111111111),
        ("temperature", 300.0, "K", 26.85),
        ("temperature", 273.16, "K", 0.01),
        ("pressure", 101.325, "kPa", 1013.25),
        ("pressure", 101_323.7, "Pa", 1013.237),
        ("energy", 2.0, "kWh", 2000.0),
        ("energy", 1.001, "kWh", 1001.0),
        ("voltage", 12.3, "mV", 0.0123),
        ("tvoc", 0.0049, "ppm", 4.9),
        ("co2", 0.0417, "%", 417.0),
    ],
)
def test_decimals_are_converted_without_noise(metric: str, value: float, unit: str, canonical: float) -> None:
    assert METRICS[metric].conversions[unit](value) == canonical


#: canonical = (value + add) × times, as the definitions of the units say.
DEFINED = {
    ("temperature", "°F"): (Fraction(-32), Fraction(5, 9)),
    ("temperature", "K"): (Fraction("-273.15"), Fraction(1)),
    ("energy", "kWh"): (Fraction(0), Fraction(1000)),
    ("energy", "J"): (Fraction(0), Fraction(1, 3600)),
    ("energy", "kJ"): (Fraction(0), Fraction(1000, 3600)),
    ("voltage", "mV"): (Fraction(0), Fraction(1, 1000)),
    ("pressure", "Pa"): (Fraction(0), Fraction(1, 100)),
    ("pressure", "kPa"): (Fraction(0), Fraction(10)),
    ("tvoc", "ppm"): (Fraction(0), Fraction(1000)),
    ("co2", "%"): (Fraction(0), Fraction(10_000)),
    ("wind_speed", "mph"): (Fraction(0), Fraction("0.44704")),
    ("wind_speed", "kn"): (Fraction(0), Fraction(1852, 3600)),
}
SENT = st.decimals(-(10**6), 10**6, places=6) | st.decimals(-1000, 1000, places=2)


@given(st.sampled_from(sorted(DEFINED)), SENT.map(float))
def test_a_conversion_gives_the_float_nearest_to_the_exact_value(key: tuple[str, str], value: float) -> None:
    """And so leads back to what was sent."""
    metric, unit = key
    add, times = DEFINED[key]
    converted = METRICS[metric].conversions[unit](value)
    assert converted == float((Fraction(repr(value)) + add) * times)
    assert float(Fraction(converted) / times - add) == pytest.approx(value, rel=1e-9, abs=1e-9)


@given(st.sampled_from(PAIRS), st.floats())
def test_a_conversion_takes_whatever_a_float_can_be(pair: tuple[str, float, str, float], value: float) -> None:
    converted = METRICS[pair[0]].conversions[pair[2]](value)
    assert math.isfinite(converted) <= math.isfinite(value)


def test_every_conversion_is_among_the_pairs() -> None:
    there_are = {(name, unit) for name, metric in METRICS.items() for unit in metric.conversions}
    assert there_are == {(metric, unit) for metric, _, unit, _ in PAIRS}


def test_a_unit_of_another_quantity_leads_to_a_metric_that_has_it() -> None:
    moved = {
        (name, unit): METRICS[conversion.metric]
        for name, metric in METRICS.items()
        for unit, conversion in metric.conversions.items()
        if conversion.metric is not None
    }
    assert {key: target.unit for key, target in moved.items()} == {("battery", "V"): "V", ("battery", "mV"): "V"}


def test_every_metric_is_sane() -> None:
    for name, metric in METRICS.items():
        assert metric.name == name
        assert re.fullmatch(r"[a-z][a-z0-9_]{1,31}", name)
        assert len(metric.unit) <= 16
        assert -math.inf < metric.low < metric.high < math.inf
        assert metric.unit not in metric.conversions
        if metric.boolean:
            assert (metric.unit, metric.low, metric.high, dict(metric.conversions)) == ("", 0.0, 1.0, {})


def test_a_spelling_of_a_unit_leads_to_a_unit_that_some_metric_takes() -> None:
    units = {unit for metric in METRICS.values() for unit in (metric.unit, *metric.conversions)}
    assert set(UNIT_SPELLINGS.values()) <= units
    assert not set(UNIT_SPELLINGS) & units  # what is a unit itself means itself


def test_a_spelling_of_a_metric_leads_to_a_metric() -> None:
    assert set(METRIC_SPELLINGS.values()) <= set(METRICS)
    assert not set(METRIC_SPELLINGS) & set(METRICS)
    assert all(spelling == spelling.lower() for spelling in METRIC_SPELLINGS)


@pytest.mark.parametrize(("metric", "value", "unit", "canonical"), PAIRS)
def test_what_was_converted_is_told_as_it_was_sent(metric: str, value: float, unit: str, canonical: float) -> None:
    assert METRICS[metric].conversions[unit].undo(canonical) == value


@given(
    st.sampled_from([(name, unit) for name, metric in METRICS.items() for unit in metric.conversions]),
    st.decimals(-10_000, 10_000, allow_nan=False, places=3),
)
def test_what_a_conversion_is_undone_to_converts_to_the_same(of: tuple[str, str], sent: Decimal) -> None:
    conversion = METRICS[of[0]].conversions[of[1]]
    canonical = conversion(float(sent))
    found = conversion.undo(canonical)
    assert found is not None
    assert conversion(found) == canonical
    assert len(repr(found)) <= len(repr(float(sent)))


def test_what_no_value_was_converted_to_is_not_undone() -> None:
    conversion = METRICS["temperature"].conversions["K"]
    assert conversion.undo(math.nan) is None
    assert conversion.undo(1e-300) is None

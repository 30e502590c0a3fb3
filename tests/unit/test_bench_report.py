"""What is said of figures: which targets they meet, and under which names programs find them."""

from array import array
from dataclasses import replace

import orjson
import pytest

from bench.load import Load
from bench.memory import MemoryFigures
from bench.pipeline import EndToEnd, Figures, LandingAlone, Options
from bench.report import (
    memory_object,
    memory_tables,
    memory_targets,
    pipeline_object,
    pipeline_tables,
    pipeline_targets,
)
from bench.singles import Single
from bench.yardsticks import Copied

CPU_S = {"ingest": 2.0, "kafka": 1.0, "worker": 1.0, "postgresql": 3.0, "load": 0.5, "others": 0.1}
SINGLE = Single("Shelly GET", 1, 128, 60_000, 20_000.0, array("d", [0.004]), 36.0, 5.0, 9.0, 24.0, 1.5, 40_000.0)
FIGURES = Figures(
    Options(2_000_000, 100, 32, 1, 5_000, 60_000, 128, epoch_times=False),
    EndToEnd(
        Load(20_000, 2_000_000, 7.0, 0.5, array("d", [0.005, 0.010])),
        8.0,
        CPU_S,
        1.0,
        20_000.0,
        [0.1] * 19 + [0.2, 0.3],
        {"ingest": 80_000_000, "worker": 90_000_000},
    ),
    LandingAlone(2_000_000, 4.0, 200_000.0, 0.5, 1.5),
    Copied(2_000_000, 200_000, 3.4, 3.0),
    [0.010] * 60,
    [replace(SINGLE, connections=32, to_bare=2.0), SINGLE],
)
WHOLE = FIGURES.end_to_end
MEMORY = MemoryFigures(
    100_000,
    1_000_000,
    1_000_000,
    {"ingest": 150_000_000, "worker": 301_000_000},
    {"ingest": 140_000_000, "worker": 290_000_000},
)


def met(figures: Figures) -> list[bool | None]:
    return [target.met for target in pipeline_targets(figures)]


def test_figures_on_their_bounds_meet_them() -> None:
    assert met(FIGURES) == [True] * 5


def test_what_a_run_leaves_to_do_counts() -> None:
    whole = pipeline_object(FIGURES)["pipeline"]

    assert whole["readings_per_s"] == 250_000
    assert whole["cpu_us_per_reading"] == pytest.approx(4.0)
    assert whole["cpu_us_per_reading_by_part"]["postgresql"] == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("missed", "figures"),
    [
        (0, replace(FIGURES, end_to_end=replace(WHOLE, committed_s=8.1))),
        (1, replace(FIGURES, end_to_end=replace(WHOLE, cpu_s={**CPU_S, "kafka": 6.0}))),
        (2, replace(FIGURES, landing=replace(FIGURES.landing, seconds=4.01))),
        (3, replace(FIGURES, singles=[replace(SINGLE, to_bare=1.51)])),
        (4, replace(FIGURES, trickle_s=[0.26] * 60)),
    ],
)
def test_a_figure_beyond_its_bound_misses_it(missed: int, figures: Figures) -> None:
    assert [number for number, is_met in enumerate(met(figures)) if not is_met] == [missed]


@pytest.mark.parametrize(
    ("short", "figures"),
    [
        (0, replace(FIGURES, end_to_end=replace(WHOLE, committed_s=0.9))),
        (1, replace(FIGURES, end_to_end=replace(WHOLE, cpu_s=dict.fromkeys(CPU_S, 0.1), settling_cpu_s=0.5))),
        (2, replace(FIGURES, copied=replace(FIGURES.copied, rows=400_000, seconds=0.68))),
        (3, replace(FIGURES, singles=[replace(SINGLE, requests=40_000)])),
    ],
)  # fmt: skip
def test_a_short_run_gives_no_verdict(short: int, figures: Figures) -> None:
    assert [number for number, is_met in enumerate(met(figures)) if is_met is None] == [short]
    assert pipeline_object(figures)["targets"][short]["met"] is None
    assert "too short to tell" in pipeline_tables(figures)


def test_the_object_is_json_and_the_tables_name_every_target() -> None:
    plain = orjson.loads(orjson.dumps(pipeline_object(FIGURES)))

    assert {"pipeline", "landing", "singles", "yardsticks", "targets", "machine", "options"} == plain.keys()
    text = pipeline_tables(FIGURES)
    assert all(target["what"] in text for target in plain["targets"])
    assert "missed" not in text


def test_memory_is_held_against_its_bounds() -> None:
    assert [target.met for target in memory_targets(MEMORY)] == [True, False]
    assert orjson.loads(orjson.dumps(memory_object(MEMORY)))["memory"]["peak_mb"] == {"ingest": 150, "worker": 301}
    assert "missed" in memory_tables(MEMORY)

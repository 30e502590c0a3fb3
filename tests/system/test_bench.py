"""`sluice bench pipeline` and `registry` on the real parts, small runs: their figures are whole."""

import json

from runtime.secrets import new_ring
from tests.databases import Database
from tests.system.roles import clean_environment, sluice

SMALL = ("--readings=4000", "--series=40", "--connections=4", "--singles=1000", "--single-connections=8")


def test_a_small_run_measures_everything(bare_database: Database, services: dict[str, str]) -> None:
    environment = clean_environment(
        **bare_database.environment,
        SLUICE_LOG_URL=services["SLUICE_LOG_URL"],
        SLUICE_SECRET_KEYS=str(new_ring()),
    )

    told = json.loads(sluice(environment, "bench", "pipeline", "--json", *SMALL))

    pipeline, landing = told["pipeline"], told["landing"]
    assert (pipeline["readings"], pipeline["requests"], landing["readings"]) == (4000, 40, 4000)
    assert all(us > 0 for us in pipeline["cpu_us_per_reading_by_part"].values())
    assert all(pipeline[name]["p95"] > 0 for name in ("receipt_to_row_ms", "receipt_to_commit_under_load_ms"))
    assert min(landing["readings_per_s"], landing["worker_us"], landing["postgresql_us"], landing["to_copy"]) > 0
    assert [single["connections"] for single in told["singles"]] == [4, 4, 4, 8, 8, 8]
    assert all(single["to_bare"] > 0 for single in told["singles"])
    assert {target["met"] for target in told["targets"][:-1]} == {None}


def test_a_small_run_over_mqtt_measures_everything(bare_database: Database, services: dict[str, str]) -> None:
    environment = clean_environment(
        **bare_database.environment,
        SLUICE_LOG_URL=services["SLUICE_LOG_URL"],
        SLUICE_MQTT_URL=services["SLUICE_MQTT_URL"],
        SLUICE_SECRET_KEYS=str(new_ring()),
    )
    small = ("--messages=400", "--devices=20", "--readings-per-message=10", "--batches=100", "--plants=20")

    told = json.loads(sluice(environment, "bench", "mqtt", "--json", *small))["mqtt"]

    assert [(one["readings"], one["messages"]) for one in told["drained"]] == [(1, 1200), (1, 1200)]
    assert all(min(one["bridge_us"], one["broker_us"], one["messages_per_s"]) > 0 for one in told["drained"])
    assert [(one["messages"], one["readings_per_message"]) for one in told["end_to_end"]] == [(400, 1), (100, 10)]
    assert all(one["committed_readings_per_s"] > 0 for one in told["end_to_end"])
    assert told["repeated_messages"] == 0
    assert 0 < told["queryable"]["ms"]["p50"] <= told["queryable"]["ms"]["p95"]
    fleet = told["reconnected"]
    assert (fleet["plants"], fleet["lost"], fleet["waiting"]) == (20, 0, 0)
    assert fleet["stored"] == fleet["acknowledged"] > 0
    assert min(fleet["connected_s"], fleet["back_s"], fleet["flowed_s"]) > 0


def test_a_small_registry_is_measured_by_every_filter(bare_database: Database, services: dict[str, str]) -> None:
    environment = clean_environment(
        **bare_database.environment,
        SLUICE_LOG_URL=services["SLUICE_LOG_URL"],
        SLUICE_SECRET_KEYS=str(new_ring()),
    )

    told = json.loads(sluice(environment, "bench", "registry", "--json", "--devices=2000", "--requests=20"))

    figures = told["registry"]
    assert len([name for name in figures["ms"] if name.startswith("list ")]) == 3 * len(figures["plans"]) == 36
    assert all(0 < one["p50"] <= one["p95"] for one in figures["ms"].values())
    assert {target["unit"] for target in told["targets"]} == {"ms", ""}


def test_a_small_history_is_asked_about_and_found_again(bare_database: Database, services: dict[str, str]) -> None:
    environment = clean_environment(
        **bare_database.environment,
        SLUICE_LOG_URL=services["SLUICE_LOG_URL"],
        SLUICE_SECRET_KEYS=str(new_ring()),
    )
    scale = ("--series=32", "--days=2", "--every=600", "--requests=10", "--clients=2", "--seconds=2")
    parts = ("month", "week", "latest", "late", "dashboards")

    first = json.loads(sluice(environment, "bench", "queries", "--json", *scale, f"--only={','.join(parts)}"))
    again = json.loads(sluice(environment, "bench", "queries", "--json", *scale, "--only=latest"))

    told = first["queries"]
    assert (told["filled"]["readings"], again["queries"]["filled"]["readings"]) == (32 * 2 * 144, 0)
    assert len(told["asked"]) == len(told["costs"]) == 5
    assert all(0 < one["ms"]["p50"] <= one["ms"]["p99"] and one["server_s"] > 0 for one in told["asked"])
    assert all(cost["rows"] < cost["raw"]["rows"] for cost in told["costs"] if cost["raw"])
    assert [cost["scans"] for cost in told["costs"] if cost["raw"] is None] == [0]
    assert (told["late"]["readings"], told["late"]["wrong"]) == (2 * 22 * 10, 0)
    assert told["late"]["compared"] > 0
    assert told["dashboards"]["beside_ms"]["p95"] > 0

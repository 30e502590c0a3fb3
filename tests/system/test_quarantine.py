"""The whole way through quarantine, as a user goes it with curl and an operator from a terminal."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from runtime.ids import uuid7
from tests.quarantine_rig import SOURCE
from tests.support import eventually
from tests.system.test_up import SLUICE, environment, up, values

PATH = "/api/v1/admin/quarantine"
COMMAND_S = 180


@dataclass(frozen=True)
class Plant:
    """A running `sluice up`, and ways to it."""

    data: Path
    known: dict[str, Any]

    def curl(self, line: str) -> Any:
        """What a curl command of the README answers."""
        variables = {"URL": self.known["url"], "API_KEY": self.known["api_key"], "TOKEN": self.known["ingest_token"]}
        done = subprocess.run(
            ["bash", "-c", f"curl -sS {line}"],
            env=os.environ | variables,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        return json.loads(done.stdout)

    def command(self, *arguments: str, code: int = 0, sent: str = "") -> str:
        """What `sluice quarantine …` prints."""
        done = subprocess.run(
            [SLUICE, "quarantine", *arguments],
            env=environment(SLUICE_CONFIG=str(self.data / "sluice.toml")),
            input=sent,
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            check=False,
        )
        assert done.returncode == code, (done.stdout, done.stderr)
        return done.stdout if code == 0 else done.stderr

    def json(self, *arguments: str, sent: str = "") -> Any:
        return json.loads(self.command(*arguments, "--json", sent=sent))

    def refuse(self, *values: float) -> list[str]:
        """Send readings with a unit that is none: their rows, in the order of the values."""
        measurements = [
            {"type": "temperature", "value": value, "unit": "°R", "label": str(value)} for value in values
        ]
        body = shlex.quote(json.dumps({"measurements": measurements}))
        answer = self.curl(f'$URL/v1/ingest -H "Authorization: Bearer $TOKEN" -d {body}')
        request = answer["error"]["request_id"]

        def found() -> list[str]:
            rows = self.json("list", "--request-id", request)["data"]
            by_value = {row["payload"]["value"]: row["quarantine_id"] for row in rows}
            return [by_value[value] for value in values] if len(by_value) == len(values) else []

        return eventually("the readings in quarantine", found)

    def state(self, row: str) -> str:
        found: str = self.json("show", row)["state"]
        return found

    @property
    def stored(self) -> list[Any]:
        return values(self.known["url"], self.known["device_id"], self.known["api_key"])

    def sql(self, script: str) -> None:
        """As the owner of everything, in its own database."""
        program = (
            "import asyncio, sys, asyncpg\n"
            "async def main():\n"
            "    connection = await asyncpg.connect(sys.argv[1])\n"
            "    await connection.execute(sys.argv[2])\n"
            "    await connection.close()\n"
            "asyncio.run(main())\n"
        )
        settings = (self.data / "sluice.toml").read_text().splitlines()
        (url,) = [line.partition(" = ")[2].strip('"') for line in settings if line.startswith("database_url")]
        subprocess.run([sys.executable, "-c", program, url, script], timeout=120, check=True)


@pytest.fixture(scope="module")
def plant() -> Iterator[Plant]:
    with TemporaryDirectory(prefix="sluice-up-") as directory:
        data = Path(directory) / "data"
        with up(data, "--json") as it:
            yield Plant(data, it.json)


def test_a_reading_refused_for_its_unit_is_found_edited_replayed_and_read_back(plant: Plant) -> None:
    """The README's lines."""
    answer = plant.curl(
        """$URL/v1/ingest -H "Authorization: Bearer $TOKEN" """
        """-d '{"measurements":[{"type":"temperature","value":21.5,"unit":"°R"}]}'"""
    )
    (why,) = answer["error"]["rejected"]
    assert why["code"] == "unknown_unit"

    def found() -> list[Any]:
        listed = plant.curl(f'"$URL{PATH}?code=unknown_unit&state=held" -H "Authorization: Bearer $API_KEY"')
        rows: list[Any] = listed["data"]
        return rows

    (row,) = eventually("the reading in quarantine", found)
    assert row["request_id"] == answer["error"]["request_id"]
    row_url = f"$URL{PATH}/{row['quarantine_id']}"
    edited = plant.curl(
        f"""-X PATCH {row_url} -H "Authorization: Bearer $API_KEY" """
        """-d '{"payload":{"type":"temperature","value":21.5,"unit":"°C"}}'"""
    )
    assert edited["original_payload"]["unit"] == "°R"
    asked = plant.curl(f'-X POST {row_url}/replay -H "Authorization: Bearer $API_KEY"')
    assert asked["state"] == "replaying"

    def released() -> bool:
        one = plant.curl(f'{row_url} -H "Authorization: Bearer $API_KEY"')
        return bool(one["state"] == "released" and one["payload"] is None)

    eventually("its release", released)
    device = plant.known["device_id"]
    read = plant.curl(f'"$URL/api/v1/readings?device_id={device}" -H "Authorization: Bearer $API_KEY"')
    (reading,) = read["data"]
    assert (reading["value"], reading["unit"], reading["flags"]) == (21.5, "°C", ["time_stamped"])
    assert datetime.fromisoformat(reading["ts"]) == datetime.fromisoformat(row["received_at"])


def test_an_operator_does_the_same_from_a_terminal(plant: Plant) -> None:
    (row,) = plant.refuse(31.5)
    assert row in plant.command("list", "--state", "held")
    assert "°R" in plant.command("show", row)
    mended = json.dumps({"type": "temperature", "value": 31.5, "unit": "°C", "label": "mended"})
    assert plant.json("edit", row, sent=mended)["edited"] is True
    assert "not one measurement" in plant.command("edit", row, code=2, sent="{")
    assert plant.command("replay", row) == f"{row} replaying\n"
    eventually("its release", lambda: plant.state(row) == "released")
    assert 31.5 in plant.stored
    assert "it was released" in plant.command("discard", row, "--note", "too late", code=2)


def test_a_filter_s_worth_is_replayed_and_discarded_from_a_terminal(plant: Plant) -> None:
    rows = plant.refuse(41.0, 42.0, 43.0)
    device = plant.known["device_id"]
    summary = plant.json("summary", "--code", "unknown_unit")
    assert (summary["total"], summary["data"][0]["device_id"]) == (3, device)
    assert "unknown_unit" in plant.command("summary")
    assert plant.json("replay", "--device", device) == {"requested": 3}
    # Nobody has mended them: they come back, each with an attempt more.
    eventually("them back", lambda: [plant.json("show", row)["attempts"] for row in rows] == [2, 2, 2])
    assert plant.json("replay", "--attempts-max", "1") == {"requested": 0}
    assert plant.command("discard", rows[0], "--note", "a test") == f"{rows[0]} discarded\n"
    assert plant.json("discard", "--code", "unknown_unit", "--note", "a test") == {"discarded": 2}
    assert plant.json("list", "--state", "held") == {"data": [], "more": False}
    assert [plant.json("show", row)["note"] for row in rows] == ["a test"] * 3
    assert plant.json("replay", "--all") == {"requested": 0}


def test_records_that_nobody_can_read_are_seen_by_operators_alone(plant: Plant) -> None:
    rows = [str(uuid7()) for _ in range(3)]
    for position, row in enumerate(rows):
        plant.sql(
            "SET ROLE sluice_worker; INSERT INTO quarantine (quarantine_id, code, message, payload, received_at,"
            f" source, partition, position, item) VALUES ('{row}', 'undecodable', 'not a record', '\\x00ff', now(),"
            f" '{SOURCE}', 0, {position}, 0)"
        )
    assert plant.json("list", "--state", "held")["data"] == []
    listed = plant.json("list", "--unreadable")["data"]
    assert {row["quarantine_id"] for row in listed} == {*rows}
    shown = plant.json("show", rows[0])
    assert (shown["payload_base64"], shown["device_id"]) == ("AP8=", None)
    assert "only be discarded" in plant.command("replay", rows[0], code=2)
    assert plant.command("discard", rows[0], "--note", "junk") == f"{rows[0]} discarded\n"
    assert plant.json("discard", "--unreadable", "--note", "junk") == {"discarded": 2}
    assert {plant.state(row) for row in rows} == {"discarded"}


BAD: list[tuple[str, ...]] = [
    ("replay",),
    ("discard", "--note", "x"),
    ("replay", str(uuid7()), "--all"),
    ("replay", str(uuid7()), "--code", "conflict"),
    ("list", "--unreadable", "--code", "conflict"),
    ("show", str(uuid7())),
    ("discard", "--code", "conflict", "--note", " "),
    ("list", "--from", "yesterday"),
    ("discard", "--code", "conflict"),
]


@pytest.mark.parametrize("arguments", BAD)
def test_bad_commands_say_what_is_wrong(plant: Plant, arguments: tuple[str, ...]) -> None:
    said = plant.command(*arguments, code=2)
    assert said.startswith(("sluice: ", "Usage: "))

"""schemathesis against the running API: some cases of each operation; `make conformance` is the long form."""

from pathlib import Path

from tests.databases import Database
from tests.system.conformance import run, stage

CASES_MIN = 300
SHORT = ("--phases", "examples,fuzzing", "--max-examples", "4", "--seed", "1", "--generation-deterministic")


def test_the_api_does_what_its_document_says(database: Database, tmp_path: Path) -> None:
    with stage(database, tmp_path) as stands:
        outcome = run(stands, tmp_path, *SHORT)
    assert outcome.status == 0, outcome.output
    assert outcome.cases >= CASES_MIN, outcome.output

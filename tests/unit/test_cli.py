"""What the command line offers. Left out: what the commands do (`tests/services`, `tests/system`)."""

from uuid import uuid4

import pytest
from click.testing import CliRunner

from deploy.cli import main


@pytest.mark.parametrize(("kind", "has_scopes"), [("device", False), ("gateway", False), ("api-key", True)])
def test_only_an_api_key_has_scopes(kind: str, has_scopes: bool) -> None:
    shown = CliRunner().invoke(main, ["token", kind, "--help"])
    assert shown.exit_code == 0
    assert ("--scope" in shown.output) is has_scopes
    assert "--expires-in-days" in shown.output


@pytest.mark.parametrize("kind", ["device", "gateway"])
def test_a_scope_for_what_has_none_is_refused(kind: str) -> None:
    refused = CliRunner().invoke(main, ["token", kind, str(uuid4()), "--scope", "owner"])
    assert refused.exit_code == 2
    assert "No such option" in refused.output


def test_the_help_names_every_command() -> None:
    done = CliRunner().invoke(main, ["--help"])
    assert done.exit_code == 0
    for command in (
        "up",
        "ingest",
        "worker",
        "api",
        "migrate",
        "seed",
        "token",
        "limits",
        "quarantine",
        "verify",
        "bench",
    ):
        assert f"\n  {command} " in done.output

"""The registry from a terminal: logging in, and organisations, sites, devices and keys over the HTTP API."""

import json
from pathlib import Path
from typing import Any

import pytest

from runtime.secrets import new_ring
from tests.databases import Database
from tests.support import ask
from tests.system.roles import clean_environment, role, sluice
from tests.system.test_people import EMAIL, PASSWORD, command


@pytest.fixture
def environment(database: Database, tmp_path: Path) -> dict[str, str]:
    found = clean_environment(
        SLUICE_LOG_URL=f"sqlite:///{tmp_path / 'log'}", SLUICE_SECRET_KEYS=str(new_ring()), **database.environment
    )
    sluice(found, "migrate")
    return found | {"XDG_CONFIG_HOME": str(tmp_path / "config")}


def test_the_registry_from_a_terminal(environment: dict[str, str], tmp_path: Path) -> None:
    def run(*arguments: str, typed: str = "", status: int = 0) -> str:
        done = command(environment, typed, *arguments)
        assert done.returncode == status, done.stderr
        return done.stdout if status == 0 else done.stderr

    def answer(*arguments: str) -> Any:
        return json.loads(run(*arguments, "--json"))

    run("admin", "create", EMAIL, typed=f"{PASSWORD}\n")
    assert "nobody has logged in" in run("site", "list", status=2)
    with role(environment, "api", "--listen", "127.0.0.1:0") as api:
        assert "login_failed" in run("login", api.url, "--email", EMAIL, typed="wrong password\n", status=1)
        logged_in = json.loads(run("login", api.url, "--email", EMAIL, "--json", typed=f"{PASSWORD}\n"))
        assert logged_in == {"url": api.url, "organisation_id": None}
        kept = tmp_path / "config" / "sluice" / "login.json"
        assert kept.stat().st_mode & 0o777 == 0o600
        organisation = answer("org", "create", "Ours")["organisation_id"]
        assert answer("org", "use", organisation) == {"organisation_id": organisation}
        assert organisation in run("org", "list")
        assert answer("org", "members")[0]["role"] == "owner"
        site = answer("site", "create", "Mt Arthur Mine", "--latitude", "-32.35", "--longitude", "150.87")
        assert site["slug"] == "mt-arthur-mine"
        run("site", "update", site["id"], "--name", "Mt Arthur Coal Mine")
        assert "Mt Arthur Coal Mine" in run("site", "list")
        device = answer("device", "create", "fridge01", "--site", site["id"], "--model", "diy_esp32")
        assert device["ingest_token"].startswith("ds_live_")
        again = "another device"
        assert "local_id_taken" in run(
            "device", "create", "fridge01", "--site", site["id"], "--model", "diy_esp32", "--name", again, status=1
        )
        hidden = run("device", "update", device["id"], "--name", "Walk-in \u202efridge", "--json", status=1)
        (line,) = hidden.splitlines()
        assert line.startswith("sluice: name: holds U+202E RIGHT-TO-LEFT OVERRIDE, which nobody sees there")
        assert line.endswith("(invalid)")
        run("device", "update", device["id"], "--name", "Walk-in fridge", "--notes", "one\ntwo")
        assert r"one\ntwo" in run("device", "show", device["id"])
        run("org", "create", "خانه‌های تهران")
        assert "خانه‌های تهران" in run("org", "list")
        assert "Walk-in fridge" in run("device", "list", "--site", site["id"], "--offline")
        assert answer("device", "rotate-token", device["id"])["ingest_token"] != device["ingest_token"]
        assert "diy_esp32" in run("device", "models")
        made = answer("key", "create", "for tests", "--scope", "devices:read", "--scope", "organisation:read")
        secret = next(value for value in made.values() if str(value).startswith("sk_live_"))
        assert "for tests" in run("key", "list")
        other = environment | {"XDG_CONFIG_HOME": str(tmp_path / "other")}
        assert command(other, f"{secret}\n", "login", api.url, "--api-key").returncode == 0
        assert "fridge01" in command(other, "", "device", "list").stdout
        assert answer("key", "revoke", made["credential_id"]) == {"revoked": made["credential_id"]}
        assert "token_invalid" in command(other, "", "device", "list").stderr
        assert answer("device", "delete", device["id"], "--yes") == {"deleted": device["id"]}
        assert answer("site", "delete", site["id"], "--yes") == {"id": site["id"], "status": "deleting"}
        refused = command(environment, "", "site", "delete", site["id"], "--yes", "--json")
        assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (1, "", 1)
        assert "site_not_found" in refused.stderr
        token = json.loads(kept.read_text())["access_token"]
        assert ask(f"{api.url}/api/v1/auth/me", token=token).status == 200
        assert answer("logout") == {"logged_out": api.url}
        assert not kept.exists()
        assert ask(f"{api.url}/api/v1/auth/me", token=token).status == 401
    assert "_SLUICE_COMPLETE" in run("completion", "bash")

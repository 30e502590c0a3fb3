"""What an operator does about people, on the command line: a super-admin, a link, the log of changes checked."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from uuid import uuid4

import asyncpg
import pytest

from runtime.secrets import new_ring
from tests.databases import Database
from tests.support import ask
from tests.system.roles import clean_environment, role, sluice

PASSWORD = "correct horse battery"
EMAIL = "ops@example.org"


def command(environment: Mapping[str, str], typed: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "deploy.cli", *arguments],
        env=environment, input=typed, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


@pytest.fixture
def environment(database: Database, tmp_path: Path) -> dict[str, str]:
    found = clean_environment(
        SLUICE_LOG_URL=f"sqlite:///{tmp_path / 'log'}", SLUICE_SECRET_KEYS=str(new_ring()), **database.environment
    )
    sluice(found, "migrate")
    return found


def post(url: str, path: str, body: object, token: str | None = None) -> tuple[int, dict[str, str]]:
    headers = {"Content-Type": "application/json"}
    answer = ask(f"{url}{path}", token=token, method="POST", body=json.dumps(body).encode(), **headers)
    return answer.status, answer.json() if answer.body else {}


def test_links_lead_to_the_api_and_not_to_where_devices_send(environment: dict[str, str]) -> None:
    environment |= {"SLUICE_PUBLIC_URL": "https://devices.example", "SLUICE_HTTP_LISTEN": "127.0.0.1:18080"}
    assert command(environment, f"{PASSWORD}\n", "admin", "create", EMAIL).returncode == 0

    def link(**more: str) -> str:
        return sluice({**environment, **more}, "admin", "reset-link", EMAIL).strip()

    assert link().startswith("http://127.0.0.1:8081/account#reset=")
    assert link(SLUICE_API_LISTEN="0.0.0.0:18081").startswith("http://127.0.0.1:18081/account#reset=")
    assert link(SLUICE_API_URL="https://people.example/").startswith("https://people.example/account#reset=")

    def invited(**more: str) -> tuple[str, str]:
        with role({**environment, **more}, "api", "--listen", "127.0.0.1:0") as api:
            tokens = post(api.url, "/api/v1/auth/login", {"email": EMAIL, "password": PASSWORD})[1]
            made = post(api.url, "/api/v1/organisations", {"name": "Ours"}, tokens["access_token"])[1]
            where = f"/api/v1/organisations/{made['organisation_id']}/invitations"
            body = {"email": "new@example.org", "role": "viewer"}
            return api.url, post(api.url, where, body, tokens["access_token"])[1]["link"]

    url, told = invited()
    assert told.startswith(f"{url}/account#invitation=")
    assert invited(SLUICE_API_URL="https://people.example")[1].startswith("https://people.example/account#")


def test_a_super_admin_and_a_link_and_the_chain(environment: dict[str, str], database: Database) -> None:
    short = command(environment, "short\n", "admin", "create", EMAIL)
    assert (short.returncode, "10 to 128" in short.stderr) == (2, True)
    assert command(environment, f"{PASSWORD}\n", "admin", "create", "nobody").returncode == 2
    made = command(environment, f"{PASSWORD}\n", "admin", "create", EMAIL, "--json")
    user = json.loads(made.stdout)["user_id"]
    assert PASSWORD not in made.stdout + made.stderr

    with role(environment, "api", "--listen", "127.0.0.1:0") as api:
        status, tokens = post(api.url, "/api/v1/auth/login", {"email": EMAIL, "password": PASSWORD})
        assert (status, tokens["user_id"]) == (200, user)
        me = ask(f"{api.url}/api/v1/auth/me", token=tokens["access_token"]).json()
        assert (me["super_admin"], me["name"]) == (True, "Administrator")
        body = {"name": "Ours"}
        assert post(api.url, "/api/v1/organisations", body, tokens["access_token"])[0] == 201

        link = json.loads(sluice(environment, "admin", "reset-link", EMAIL, "--json"))
        assert link["link"].endswith(link["token"])
        new = "another horse battery"
        reset = {"token": link["token"], "new_password": new}
        assert post(api.url, "/api/v1/auth/password/reset", reset)[0] == 204
        assert post(api.url, "/api/v1/auth/password/reset", reset)[0] == 422
        # All sessions have ended, and the old password is none.
        assert ask(f"{api.url}/api/v1/auth/me", token=tokens["access_token"]).status == 401
        assert post(api.url, "/api/v1/auth/login", {"email": EMAIL, "password": PASSWORD})[0] == 401
        assert post(api.url, "/api/v1/auth/login", {"email": EMAIL, "password": new})[0] == 200
        assert not any(secret in str(api.lines) for secret in (new, PASSWORD, link["token"]))

    nobody = command(environment, "", "admin", "reset-link", "nobody@example.org")
    assert (nobody.returncode, "nobody has" in nobody.stderr) == (2, True)

    whole = json.loads(sluice(environment, "verify", "--audit", "--json"))
    assert (whole["ok"], [chain["entries"] for chain in whole["chains"]]) == (True, [5, 1])
    execute(database, "UPDATE audit_log SET action = 'x' WHERE organisation_id IS NOT NULL")
    broken = command(environment, "", "verify", "--audit")
    assert (broken.returncode, "entry 1: its content" in broken.stdout) == (1, True)
    other = command(environment, "", "verify", "--audit", "--organisation", str(uuid4()))
    assert other.returncode == 0
    assert command(environment, "", "verify", "--audit", "--since", "0").returncode == 2


def execute(database: Database, sql: str) -> None:
    async def work() -> None:
        connection = await asyncpg.connect(database.superuser_url)
        await connection.execute(sql)
        await connection.close()

    asyncio.run(work())

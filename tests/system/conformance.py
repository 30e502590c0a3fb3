"""schemathesis against the running API, from its own OpenAPI document: `python -m tests.system.conformance`.

`sluice up` serves it beside the ingest face, on a real TimescaleDB. An organisation stands there with one of
everything, so that operations are called with ids that exist too; `schemathesis.toml` says what is checked, and the
hooks (`tests.system.conformance_hooks`) put ids into requests. Left out: what a right answer is, which schemathesis
knows.
"""

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final
from uuid import UUID, uuid4

from runtime.secrets import new_ring
from tests.conftest import CHECKOUT, run_services
from tests.databases import Database, LocalServer
from tests.quarantine_rig import Quarantine
from tests.support import ask
from tests.system.roles import clean_environment, sluice
from tests.system.test_up import up

STAGE: Final = "SLUICE_CONFORMANCE"
STATUSES: Final = "SLUICE_CONFORMANCE_STATUSES"
TOKEN: Final = "SLUICE_CONFORMANCE_TOKEN"
DEVICE_TOKEN: Final = "SLUICE_CONFORMANCE_DEVICE_TOKEN"
PASSWORD: Final = "correct horse battery"
ADMIN: Final = "admin@example.org"
OWNER: Final = "owner@example.org"
CASES_MIN: Final = 10_000
EXAMPLES: Final = 120
#: Operations that nothing can do yet: no device can be told anything.
NEVER_DONE: Final = frozenset({"POST /v1/devices/{id}/identify"})
HELD: Final = 400
RESETS_EACH: Final = 3
GUESTS: Final = 3
#: A run makes as many requests from one address, and of one device, as limits are there to prevent.
LIMITS: Final = {
    "SLUICE_AUTH_ACCESS_TOKEN_S": "86400",
    "SLUICE_AUTH_LOGINS_PER_MINUTE": "1000000",
    "SLUICE_AUTH_GUESSES_PER_MINUTE": "1000000",
    "SLUICE_AUTH_LOGIN_FAILURES_MAX": "1000",
    "SLUICE_LIMIT_DEVICE_REQUESTS_PER_MINUTE": "0",
    "SLUICE_LIMIT_UNKNOWN_REQUESTS_PER_MINUTE": "0",
    "SLUICE_OVERLOAD_LAG_MS": "0",
}
_CASES: Final = re.compile(r"(\d+) generated")


@dataclass(frozen=True)
class Outcome:
    """What schemathesis printed, how many requests it judged, and which operations none of them got done."""

    status: int
    output: str
    cases: int
    never_done: frozenset[str]


def call(url: str, token: str | None, method: str, path: str, body: object = None) -> Any:
    """What the API answers. Raises for anything but success."""
    sent = None if body is None else json.dumps(body).encode()
    answer = ask(f"{url}{path}", token=token, method=method, body=sent, **{"Content-Type": "application/json"})
    assert 200 <= answer.status < 300, f"{method} {path}: {answer.status} {answer.body!r}"
    return answer.json() if answer.body else None


@contextmanager
def stage(database: Database, directory: Path) -> Iterator[dict[str, Any]]:
    """Both faces, running, and what the hooks have to know of what is in them."""
    environment = clean_environment(
        SLUICE_LOG_URL=f"sqlite:///{directory / 'log'}",
        SLUICE_SECRET_KEYS=str(new_ring()),
        **LIMITS,
        **database.environment,
    )
    sluice(environment, "migrate")
    made = subprocess.run(
        [sys.executable, "-m", "deploy.cli", "admin", "create", ADMIN],
        env=environment, input=f"{PASSWORD}\n", capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    sluice(environment, "ca", "init")
    variables = {name: text for name, text in environment.items() if name.startswith("SLUICE_")}
    with up(directory / "data", "--json", lines=1, **variables) as running:
        yield _inhabited(running.json["url"], environment, database)


def _inhabited(url: str, environment: Mapping[str, str], database: Database) -> dict[str, Any]:
    admin = call(url, None, "POST", "/api/v1/auth/login", {"email": ADMIN, "password": PASSWORD})["access_token"]
    organisation = call(url, admin, "POST", "/api/v1/organisations", {"name": "Ours"})["organisation_id"]
    there = f"/api/v1/organisations/{organisation}"
    owner = _join(url, admin, there, OWNER, "owner")
    guests = [f"guest-{number}@example.org" for number in range(GUESTS)]
    members = [_join(url, admin, there, guest, "member")["user_id"] for guest in guests]
    token = owner["access_token"]
    place = f"/api/organisations/{organisation}/sites"
    site = call(url, token, "POST", place, {"name": "Mt Arthur Mine", "slug": "mt-arthur"})["id"]
    server = {"hardwareId": "server", "version": "1", "hostname": "server.local"}
    gateway = call(url, token, "POST", f"{place}/{site}/register-server", server)["siteToken"]
    new = {"site_id": f"site_{site}", "local_id": "fridge", "name": "Fridge", "model": "diy_esp32"}
    made = call(url, token, "POST", "/v1/devices", new)
    device = made["id"]
    group = call(url, token, "POST", "/api/v1/device-groups", {"name": "Fridges"})["group_id"]
    call(url, token, "POST", f"{place}/{site}/mqtt/password")
    plants = {
        name: _plant(url, token, name, method) for name, method in (("plant", "MTLS"), ("token_plant", "TOKEN"))
    }
    template = {"name": "Cabinet of ours", "level": "PLANT", "type": "CABINET"}
    resets = [
        json.loads(sluice(environment, "admin", "reset-link", guest, "--json"))["token"]
        for guest in guests[:-1]
        for _ in range(RESETS_EACH)
    ]
    return {
        "url": url,
        "token": token,
        "session": call(url, token, "GET", "/api/v1/auth/me")["session_id"],
        "owner_id": owner["user_id"],
        "organisation": organisation,
        "guest": guests[-1],
        "member": members[0],
        "password": PASSWORD,
        "site": site,
        "gateway": gateway,
        "device": device,
        "device_token": made["ingest_token"],
        "device_uuid": str(UUID(device.removeprefix("dev_"))),
        "group": group,
        "template": call(url, token, "POST", "/api/v1/device-templates", template)["id"],
        **plants,
        "resets": resets,
        "held": asyncio.run(_held(database, organisation)),
        "unassigned": asyncio.run(_in_tray(database, organisation, site)),
        "schemas": call(url, None, "GET", "/api/schemas")["data"],
    }


def _plant(url: str, token: str, serial_number: str, method: str) -> str:
    """One that is provisioned."""
    new = {"name": "Plant", "serialNumber": serial_number, "type": "SENSOR", "authMethod": method}
    plant = str(call(url, token, "POST", "/api/v1/plants", new)["id"])
    call(url, token, "POST", f"/api/v1/plants/{plant}/provision")
    return plant


def _join(url: str, token: str, there: str, email: str, role_name: str) -> Any:
    invited = call(url, token, "POST", f"{there}/invitations", {"email": email, "role": role_name})
    body = {"token": secret_of(invited), "password": PASSWORD, "name": "Somebody"}
    return call(url, None, "POST", "/api/v1/invitations/accept", body)


def secret_of(invitation: Mapping[str, Any]) -> str:
    """That stands in an invitation's link."""
    return str(invitation["link"].partition("invitation=")[2])


async def _in_tray(database: Database, organisation: Any, site: Any) -> list[str]:
    """Devices that nobody has claimed yet."""
    sql = "SELECT note_unassigned(gen_random_uuid(), $1::text::uuid, $2::text::uuid, $3, 'json', 1000)"
    quarantine = Quarantine(database)
    return [
        str((await quarantine.superuser(sql, organisation, site, f"new-{number}"))[0][0]) for number in range(HELD)
    ]


async def _held(database: Database, organisation: Any) -> list[str]:
    quarantine = Quarantine(database)
    return [str(await quarantine.hold(organisation, None)) for _ in range(HELD)]


def run(stage: Mapping[str, Any], directory: Path, *options: str) -> Outcome:
    """schemathesis with the configuration of the checkout, and these options beside it."""
    statuses = directory / "statuses.json"
    tokens = {TOKEN: stage["token"], DEVICE_TOKEN: stage["device_token"]}
    environment = dict(os.environ) | {STAGE: json.dumps(stage), STATUSES: str(statuses)} | tokens
    program = Path(sys.executable).with_name("schemathesis")
    done = subprocess.run(
        [str(program), "run", f"{stage['url']}/api/v3/api-docs", "--no-color", "--continue-on-failure", *options],
        cwd=CHECKOUT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    found = _CASES.search(done.stdout)
    told = json.loads(statuses.read_text()) if statuses.exists() else {}
    never = {name for name, counts in told.items() if not any(status.startswith("2") for status in counts)}
    return Outcome(done.returncode, done.stdout, int(found.group(1)) if found else 0, frozenset(never))


def faults(outcome: Outcome, cases_min: int) -> list[str]:
    """What is wrong with a run beside what schemathesis says itself."""
    found = []
    if outcome.cases < cases_min:
        found.append(f"{outcome.cases} cases, where {cases_min} are wanted")
    if unreached := sorted(outcome.never_done - NEVER_DONE):
        found.append(f"no request of these was answered with success: {', '.join(unreached)}")
    return found


@contextmanager
def _database() -> Iterator[Database]:
    run_services("start")
    server = LocalServer(CHECKOUT / ".services")
    database = asyncio.run(server.create(f"conformance_{uuid4().hex}"))
    try:
        yield database
    finally:
        asyncio.run(server.drop(database.name))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.system.conformance", description=__doc__)
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="of each operation, in each phase that draws")
    parser.add_argument("--cases-min", type=int, default=CASES_MIN, help="fewer are a failure")
    parser.add_argument("--seed", type=int, help="to draw the same again")
    options = parser.parse_args()
    seed = [] if options.seed is None else ["--seed", str(options.seed)]
    with TemporaryDirectory() as path, _database() as database, stage(database, Path(path)) as stands:
        outcome = run(stands, Path(path), "--max-examples", str(options.examples), *seed)
    print(outcome.output)
    wrong = faults(outcome, options.cases_min)
    print("\n".join(wrong) or f"{outcome.cases} cases")
    return 1 if wrong else outcome.status


if __name__ == "__main__":
    sys.exit(main())

"""A token is rotated while its device posts to several processes, as one that leaked would be."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

from runtime.secrets import new_ring
from tests.databases import Database
from tests.support import ask, eventually
from tests.system.roles import clean_environment, role, sluice

RATE = 50
#: What the design promises of a revoked token, in every process.
FELT_WITHIN_S = 1.0


class Posted(NamedTuple):
    """A request of the device: when it was sent (monotonic seconds), its answer, and the process that gave it."""

    sent_at: float
    status: int
    process: str


@contextmanager
def posting(url: str, token: str) -> Iterator[list[Posted]]:
    """What a device that posts RATE times a second is told; each request has a connection of its own."""
    posted: list[Posted] = []
    stop = threading.Event()
    began = time.monotonic()

    def post(number: int) -> None:
        sent_at = time.monotonic()
        body = b'{"measurements":[{"type":"temperature","value":%d}]}' % (number % 100)
        answer = ask(f"{url}/v1/ingest", token=token, method="POST", body=body)
        posted.append(Posted(sent_at, answer.status, answer.headers["X-Request-Id"][:12]))

    def work(numbers: Iterator[int]) -> None:
        for number in numbers:
            stop.wait(max(0.0, began + number / RATE - time.monotonic()))
            if stop.is_set():
                return
            post(number)

    threads = [threading.Thread(target=work, args=(count(first, 4),)) for first in range(4)]
    for thread in threads:
        thread.start()
    try:
        yield posted
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def processes(posted: list[Posted], status: int) -> set[str]:
    """Those that have answered so."""
    return {one.process for one in list(posted) if one.status == status}


def test_no_process_takes_the_old_token_a_second_after_the_answer(bare_database: Database, tmp_path: Path) -> None:
    environment = clean_environment(
        **bare_database.environment,
        SLUICE_LOG_URL=f"sqlite:///{tmp_path}/log",
        SLUICE_DATA_DIR=str(tmp_path),
        SLUICE_SECRET_KEYS=str(new_ring()),
    )
    sluice(environment, "migrate")
    demo = json.loads(sluice(environment, "seed", "--json"))
    ingest = role(environment, "ingest", "--listen", "127.0.0.1:0", "--processes", "2")
    with ingest as ingest_role, role(environment, "api", "--listen", "127.0.0.1:0") as api:
        with posting(ingest_role.url, demo["ingest_token"]) as posted:
            eventually("both processes know the token", lambda: len(processes(posted, 202)) == 2)
            path = f"/v1/devices/dev_{UUID(demo['device_id']).hex}/rotate-token"
            answer = ask(f"{api.url}{path}", token=demo["api_key"], method="POST")
            answered_at = time.monotonic()
            eventually(
                "it was tried for twice as long",
                lambda: posted[-1].sent_at > answered_at + 2 * FELT_WITHIN_S,
            )
        assert answer.status == 200
        assert {one.status for one in posted} == {202, 401}
        assert len(processes(posted, 401)) == 2
        assert max(one.sent_at for one in posted if one.status == 202) - answered_at <= FELT_WITHIN_S
        new = ask(
            f"{ingest_role.url}/v1/ingest",
            token=answer.json()["ingest_token"],
            method="POST",
            body=b'{"measurements":[{"type":"temperature","value":1}]}',
        )
        assert new.status == 202

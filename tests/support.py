"""Small helpers of the tests: running coroutines, waiting for a condition, asking a server over HTTP."""

import asyncio
import contextlib
import json
import resource
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")
# Against what never comes; how long what comes takes is the machine's, which is shared.
RUN_TIMEOUT_S = 240.0
EVENTUALLY_S = 120.0
ANSWER_S = 60.0
POLL_S = 0.02


def run(test: Coroutine[Any, Any, T], timeout_s: float = RUN_TIMEOUT_S) -> T:
    """Run a test to its end, which is never far."""

    async def bounded() -> T:
        async with asyncio.timeout(timeout_s):
            return await test

    return asyncio.run(bounded())


def eventually(what: str, look: Callable[[], T], timeout_s: float = EVENTUALLY_S) -> T:
    """What `look` gives once it is true; fails saying that `what` did not come."""
    deadline = time.monotonic() + timeout_s
    while not (found := look()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(POLL_S)
    return found


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writes beyond this size fail in this process, as on a disk that breaks."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@dataclass(frozen=True)
class Answer:
    """What a server answered; `status` 0 when nobody did."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)

    def json(self) -> Any:
        return json.loads(self.body)


def ask(
    url: str, *, token: str | None = None, method: str = "GET", body: bytes | None = None, **headers: str
) -> Answer:
    """One request on a connection of its own."""
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    request = urllib.request.Request(url, data=body, headers=headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
            return Answer(answer.status, answer.read(), dict(answer.headers))
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, error.read(), dict(error.headers))
    except (OSError, urllib.error.URLError) as error:
        return Answer(0, str(error).encode())

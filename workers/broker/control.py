"""Speaks with the broker's dynamic-security plugin. Left out: what is said to it (`planning`)."""

import asyncio
import itertools
from collections.abc import Sequence
from typing import Any, Final

import aiomqtt
import orjson

from runtime.errors import UnavailableError
from workers.broker.planning import Entry

TOPIC: Final = "$CONTROL/dynamic-security/v1"
RESPONSES: Final = f"{TOPIC}/response"
#: Entries of one answer, 200 bytes each.
PAGE: Final = 1_000
#: Answers that wait to be read: there is one at a time.
ANSWERS_MAX: Final = 100
#: Always the same, so that who was stopped and comes back late is thrown out by whoever followed him.
CLIENT_ID: Final = "sluice-broker-keeper"


class Control:
    """Commands over a connection, one message at a time."""

    def __init__(self, client: aiomqtt.Client, timeout_s: float) -> None:
        self._client = client
        self._timeout_s = timeout_s
        self._numbers = itertools.count(1)

    async def open(self) -> None:
        """Raises `UnavailableError`."""
        try:
            await self._client.subscribe(RESPONSES, qos=1)
        except aiomqtt.MqttError as error:
            raise UnavailableError(f"the broker does not let us hear its answers: {error}") from error

    async def say(self, commands: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The answer to each; `error` stands in one that was refused. Raises `UnavailableError`."""
        number = str(next(self._numbers))
        message = orjson.dumps({"commands": [command | {"correlationData": number} for command in commands]})
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._client.publish(TOPIC, message, qos=1, timeout=self._timeout_s)
                async for answer in self._client.messages:
                    responses = _responses(answer.payload)
                    if responses and responses[0].get("correlationData") == number:
                        return responses
        except (aiomqtt.MqttError, TimeoutError) as error:
            raise UnavailableError(f"the broker does not answer: {error or type(error).__name__}") from error
        raise UnavailableError("the broker does not answer: the connection ended")

    async def settle(self) -> None:
        """Until the broker has done what it was sent before, a signal included. Raises `UnavailableError`."""
        # It looks at signals between its rounds: the second answer is of a later one than the first.
        for _ in range(2):
            await self.say([{"command": "getDefaultACLAccess"}])

    async def entries(self) -> dict[str, Entry]:
        """All that the broker has. Raises `UnavailableError`."""
        found: dict[str, Entry] = {}
        total = 1
        for offset in itertools.count(0, PAGE):
            if offset >= total:
                break
            (answer,) = await self.say([{"command": "listClients", "verbose": True, "count": PAGE, "offset": offset}])
            if "data" not in answer:
                raise UnavailableError(f"the broker does not list its clients: {answer.get('error')}")
            total = answer["data"]["totalCount"]
            found |= {one["username"]: _entry(one) for one in answer["data"]["clients"]}
        return found


def _responses(payload: Any) -> list[dict[str, Any]]:
    try:
        found = orjson.loads(payload)["responses"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return []
    return found if isinstance(found, list) else []


def _entry(one: dict[str, Any]) -> Entry:
    return Entry(one.get("textname", ""), not one.get("disabled", False), one.get("textdescription", ""))

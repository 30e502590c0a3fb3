"""What is said to the broker, against a model of its plugin: in the end it knows whom the registry wants it to."""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.broker.planning import (
    MARK,
    NO_PASSWORD,
    Client,
    Command,
    Entry,
    Kind,
    commands_for,
    in_order,
    mark_of,
    plugin_file,
)

NAME = "0190"
PASSWORDS = ("one", "two")
REVOKED = datetime(2026, 1, 1, tzinfo=UTC).isoformat()
marks = st.sampled_from([NO_PASSWORD, *(mark_of(password) for password in PASSWORDS)])
revoked = st.sampled_from(["", REVOKED, "later"])
clients = st.none() | st.builds(Client, marks, is_enabled=st.booleans(), revoked=revoked)


@dataclass
class Plugin:
    """As far as it is of one client: what it refuses, and who is thrown out."""

    entry: Entry | None = None
    password: str | None = None
    thrown_out: int = 0
    refused: list[str] = field(default_factory=list)

    def do(self, body: dict[str, Any]) -> None:
        command = body["command"]
        if (command == "createClient") is (self.entry is not None):
            self.refused.append(command)
            return
        if command == "createClient":
            self.entry = Entry(body["textname"], is_enabled=True)
            self.password = body.get("password")
            return
        assert self.entry is not None
        if command != "enableClient":
            self.thrown_out += 1
        if command == "deleteClient":
            self.entry, self.password = None, None
        elif command == "modifyClient":
            self.password = body.get("password", self.password)
            self.entry = self.entry._replace(
                mark=body.get("textname", self.entry.mark), revoked=body.get("textdescription", self.entry.revoked)
            )
        else:
            self.entry = self.entry._replace(is_enabled=command == "enableClient")

    def lets_in(self, password: str) -> bool:
        return self.entry is not None and self.entry.is_enabled and self.password == password


def apply(plugin: Plugin, client: Client | None, password: str | None) -> list[Command]:
    said = commands_for(NAME, client, plugin.entry, password)
    for command in said:
        plugin.do(command.body)
        assert plugin.entry == command.leaves
    return said


@given(st.lists(st.tuples(clients, st.booleans()), max_size=6))
def test_it_ends_as_the_registry_wants_it(wishes: list[tuple[Client | None, bool]]) -> None:
    plugin = Plugin()
    for client, is_at_hand in wishes:
        wanted = None if client is None else next((one for one in PASSWORDS if mark_of(one) == client.mark), None)
        before, thrown_out = plugin.entry, plugin.thrown_out
        apply(plugin, client, wanted if is_at_hand else None)
        assert not plugin.refused
        for password in PASSWORDS:
            is_wanted = client is not None and client.is_enabled and password == wanted
            assert is_wanted or not plugin.lets_in(password)
            if is_wanted and is_at_hand:
                assert plugin.lets_in(password)
        if client is not None and client.revoked and (before is None or before.revoked != client.revoked):
            assert plugin.thrown_out > thrown_out
        if (
            before is not None
            and before.is_enabled
            and before.mark != NO_PASSWORD
            and not plugin.lets_in(str(plugin.password))
        ):
            assert plugin.thrown_out > thrown_out
        if client is None or (client.mark == NO_PASSWORD and not client.revoked):
            assert plugin.entry is None
        assert apply(plugin, client, wanted if is_at_hand else None) == []


def test_entries_of_others_are_left_alone_until_their_name_is_wanted() -> None:
    others = Entry("an operator's", is_enabled=True)
    assert commands_for(NAME, None, others, None) == []
    plugin = Plugin(others, "theirs")
    apply(plugin, Client(mark_of("one"), is_enabled=True), "one")
    assert (plugin.lets_in("theirs"), plugin.lets_in("one")) == (False, True)


def test_what_takes_away_goes_first_and_what_is_said_of_one_stays_together() -> None:
    new = commands_for("a", Client(mark_of("one"), is_enabled=True, revoked=REVOKED), None, "one")
    made = commands_for("b", Client(mark_of("one"), is_enabled=True), None, "one")
    gone = commands_for("c", None, Entry(MARK, is_enabled=True), None)
    assert [[one.kind for one in some] for some in in_order([made, new, gone])] == [
        [Kind.CREATED, Kind.KICKED], [Kind.DELETED], [Kind.CREATED],
    ]  # fmt: skip


@pytest.mark.parametrize("is_enabled", [True, False])
def test_the_file_has_what_a_command_would_leave(*, is_enabled: bool) -> None:
    hashed = "$7$101$c2FsdHNhbHRzYWx0$aGFzaA=="
    client = Client(mark_of(hashed), is_enabled=is_enabled, revoked=REVOKED)
    (found,) = plugin_file({NAME: client}, {NAME: hashed})["clients"]
    assert found.pop("disabled", False) is not is_enabled
    assert found == {
        "username": NAME, "textname": client.mark, "textdescription": REVOKED, "roles": [],
        "password": "aGFzaA==", "salt": "c2FsdHNhbHRzYWx0", "iterations": 101,
    }  # fmt: skip
    assert commands_for(NAME, client, Entry(client.mark, is_enabled, REVOKED), None) == []

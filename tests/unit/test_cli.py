"""What the command line offers. Left out: what the commands do (`tests/services`, `tests/system`)."""

from collections.abc import Iterator, Sequence
from uuid import uuid4

import click
import pytest
from click.testing import CliRunner

from deploy.cli import main
from deploy.printing import say, say_table
from deploy.rollups import told
from workers.rollups.session import NEVER


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


def commands(group: click.Group, context: click.Context, *path: str) -> Iterator[tuple[str, ...]]:
    """The whole table: where each command that does something stands."""
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        here = click.Context(command, context, name)
        if isinstance(command, click.Group):
            yield from commands(command, here, *path, name)
        else:
            yield (*path, name)


def at(path: Sequence[str]) -> tuple[click.Command, click.Context]:
    command: click.Command = main
    context = click.Context(main, info_name="sluice", **main.context_settings)
    for name in path:
        assert isinstance(command, click.Group)
        found = command.get_command(context, name)
        assert found is not None
        command, context = found, click.Context(found, context, name)
    return command, context


COMMANDS = [" ".join(path) for path in commands(main, click.Context(main))]
GROUPS = sorted({command.rpartition(" ")[0] for command in COMMANDS})
#: They run until they are stopped, or print a script.
WITHOUT_JSON = {"api", "bridge", "broker keep", "ingest", "worker", "completion"}


def test_the_table_is_walked_as_a_whole() -> None:
    assert {"up", "site delete", "device rotate-token", "bench registry", "token keys"} <= set(COMMANDS)
    assert set(COMMANDS) > WITHOUT_JSON


@pytest.mark.parametrize("name", sorted({*COMMANDS} - WITHOUT_JSON))
def test_every_command_answers_in_json_where_it_is_asked_to(name: str) -> None:
    command, _ = at(name.split())
    assert [option for option in command.params if "--json" in option.opts], name


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_says_what_it_is_for(name: str) -> None:
    command, _ = at(name.split())
    assert command.help
    for option in command.params:
        if isinstance(option, click.Option) and not option.hidden:
            assert option.help, (name, option.opts)


@pytest.mark.parametrize("name", GROUPS)
def test_a_list_of_commands_cuts_nothing_off_in_80_columns(name: str) -> None:
    done = CliRunner().invoke(main, [*name.split(), "--help"], terminal_width=80)
    assert done.exit_code == 0
    assert "..." not in done.output.partition("Options:")[2]
    group, context = at(name.split())
    assert isinstance(group, click.Group)
    for command in group.list_commands(context):
        assert f"\n  {command} " in done.output


def test_what_is_typed_is_text() -> None:
    refused = CliRunner().invoke(main, ["site", "create", "a\udcff"])
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "argument 3 is not UTF-8" in refused.stderr


def test_a_question_is_asked_beside_the_answer() -> None:
    for command in ("site", "device"):
        left = CliRunner().invoke(main, [command, "delete", "x", "--json"], input="n\n")
        assert (left.exit_code, left.stdout) == (1, "")
        assert "Go on?" in left.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_completes_commands_options_and_choices(shell: str) -> None:
    def completed(*words: str) -> list[str]:
        place = {"COMP_WORDS": " ".join(("sluice", *words)), "COMP_CWORD": str(len(words))}
        done = CliRunner().invoke(main, prog_name="sluice", env={**place, "_SLUICE_COMPLETE": f"{shell}_complete"})
        lines = done.output.splitlines()
        return lines[1::3] if shell == "zsh" else [line.partition(",")[2] for line in lines]

    assert {"up", "site", "dashboard-user"} <= set(completed(""))
    assert completed("site", "del") == ["delete"]
    # Completing asks nothing.
    assert completed("site", "delete", "x", "--j") == ["--json"]
    assert completed("key", "create", "x", "--scope", "sites:") == ["sites:read", "sites:write"]


def test_times_are_told_that_only_the_database_has_years_for() -> None:
    day = 86_400 * 10**6
    assert told(0) == "2000-01-01T00:00:00+00:00"
    assert told(-day) == "1999-12-31T00:00:00+00:00"
    assert told(-730_119 * day) == "0001-01-01T00:00:00+00:00"
    # As PostgreSQL has them: the last day of 1 BC, the first of its calendar, and one behind what Python has.
    assert told(-730_120 * day) == "+0000-12-31T00:00:00+00:00"
    assert told(-2_451_545 * day + day // 2) == "-4713-11-24T12:00:00+00:00"
    assert told(2_921_940 * day) == "+10000-01-01T00:00:00+00:00"
    assert told(NEVER) is None


def test_in_a_table_what_is_stored_moves_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    say_table([("id", "name"), ("1", "Ou\u200brs\x1b[2J\u202e"), ("2", "خانه‌ها")])
    say("a\nb\x9b")
    assert capsys.readouterr().out.split("\n") == [
        "id  name",
        "1   Ou\\u200brs\\x1b[2J\\u202e",
        "2   خانه‌ها",
        "a\\nb\\x9b",
        "",
    ]

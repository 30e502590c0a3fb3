"""`sluice quarantine`: its options. Left out: what it does (`deploy.quarantine`)."""

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final, TextIO
from uuid import UUID

import click

from api.quarantine import HELD, STATES, Filter
from deploy.commands.options import F, as_moment, json_option, load_settings
from deploy.quarantine import Desk, open_desk, payload_bytes_max
from runtime.errors import ConfigurationError
from runtime.settings import Settings

#: More than any payload may have; read at most.
PAYLOAD_CHARACTERS_MAX: Final = 100_000


@click.group()
def quarantine() -> None:
    """Look at what was set aside; mend, replay or discard it."""


def _at_the_desk(json: bool | None, do: Callable[[Desk, Settings], Coroutine[Any, Any, None]]) -> None:
    settings = load_settings(json=json)

    async def work() -> None:
        async with open_desk(settings) as desk:
            await do(desk, settings)

    asyncio.run(work())


def _filter_options(command: F) -> F:
    for option in (
        click.option("--attempts-max", type=click.IntRange(min=1), help="1: what was never replayed."),
        click.option("--to", "end", callback=as_moment, metavar="TIME", help="Received before it."),
        click.option("--from", "start", callback=as_moment, metavar="TIME", help="Received from it on."),
        click.option("--request-id", help="Of the request that brought it."),
        click.option("--device", "device_id", type=click.UUID, help="Of one device."),
        click.option("--code", help="Set aside for this reason."),
        click.option("--organisation", type=click.UUID, help="Whose; may be left out where there is only one."),
    ):
        command = option(command)
    return command


_state_option: Final = click.option("--state", type=click.Choice(STATES), help="What became of it.")
_unreadable_option: Final = click.option(
    "--unreadable", is_flag=True, help="Records that nobody can read, which belong to no organisation."
)
_note_option: Final = click.option("--note", required=True, help="Why; it is kept.")
_ids_argument: Final = click.argument("ids", type=click.UUID, nargs=-1)


@quarantine.command("list")
@_filter_options
@_state_option
@_unreadable_option
@click.option("--limit", type=click.IntRange(1, 10_000), default=100, show_default=True, help="Rows at most.")
@json_option
def quarantine_list(
    json: bool | None, organisation: UUID | None, state: str | None, unreadable: bool, limit: int, **wanted: Any
) -> None:
    """List rows, newest first."""
    found = Filter(**wanted)
    if unreadable and (organisation is not None or found.names_something):
        raise ConfigurationError("--unreadable goes with --state and --limit alone")
    if unreadable:
        _at_the_desk(json, lambda desk, _: desk.list_unreadable(state, limit))
    else:
        _at_the_desk(json, lambda desk, _: desk.list(organisation, found, state, limit))


@quarantine.command("show")
@click.argument("quarantine_id", metavar="ID", type=click.UUID)
@json_option
def quarantine_show(quarantine_id: UUID, json: bool | None) -> None:
    """Show one row with its payload, and the one before edits."""
    _at_the_desk(json, lambda desk, _: desk.show(quarantine_id))


@quarantine.command("summary")
@_filter_options
@_state_option
@json_option
def quarantine_summary(json: bool | None, organisation: UUID | None, state: str | None, **wanted: Any) -> None:
    """Count rows by code and device.

    Held ones, unless another state is named.
    """
    _at_the_desk(json, lambda desk, _: desk.summary(organisation, Filter(**wanted), state or HELD, 1_000))


@quarantine.command("edit")
@click.argument("quarantine_id", metavar="ID", type=click.UUID)
@click.argument("payload", type=click.File("r"), default="-")
@json_option
def quarantine_edit(quarantine_id: UUID, payload: TextIO, json: bool | None) -> None:
    """Replace the payload of a held row.

    PAYLOAD is a file with the measurement as JSON; without it, standard input is read.
    """
    text = payload.read(PAYLOAD_CHARACTERS_MAX)
    _at_the_desk(json, lambda desk, settings: desk.edit(quarantine_id, text, payload_bytes_max(settings)))


@quarantine.command("replay")
@_ids_argument
@_filter_options
@click.option("--all", "everything", is_flag=True, help="Everything that is held.")
@json_option
def quarantine_replay(
    ids: tuple[UUID, ...], json: bool | None, organisation: UUID | None, everything: bool, **wanted: Any
) -> None:
    """Have rows judged and stored again.

    They are named by their ids or by a filter. A running ingest does it.
    """
    found = _which(ids, organisation, everything, wanted)
    if ids:
        _at_the_desk(json, lambda desk, _: desk.replay(ids))
    else:
        _at_the_desk(json, lambda desk, _: desk.replay_found(organisation, found))


@quarantine.command("discard")
@_ids_argument
@_filter_options
@_unreadable_option
@_note_option
@json_option
def quarantine_discard(
    ids: tuple[UUID, ...], json: bool | None, organisation: UUID | None, unreadable: bool, note: str, **wanted: Any
) -> None:
    """Throw rows away for good.

    They are named by their ids or by a filter.
    """
    found = _which(ids, organisation, unreadable, wanted)
    if unreadable:
        _at_the_desk(json, lambda desk, _: desk.discard_unreadable(note))
    elif ids:
        _at_the_desk(json, lambda desk, _: desk.discard(ids, note))
    else:
        _at_the_desk(json, lambda desk, _: desk.discard_found(organisation, found, note))


def _which(ids: tuple[UUID, ...], organisation: UUID | None, flagged: bool, wanted: Mapping[str, Any]) -> Filter:
    """Raises `ConfigurationError` unless exactly one of ids, a filter and a flag says what is meant."""
    found = Filter(**wanted)
    if bool(ids) + found.names_something + flagged != 1 or (ids and organisation is not None):
        raise ConfigurationError("say what is meant by ids, or by a filter, or by an option for everything")
    return found

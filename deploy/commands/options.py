"""What the commands share: options, settings with the options over them, exit statuses."""

import os
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any, Final, NoReturn, TypeVar

import click

from api.access.scopes import SCOPES
from deploy.printing import say
from deploy.settings import load, settings_of_up
from runtime.errors import MissingSettingError
from runtime.logging import LoggingSettings, set_up_logging
from runtime.settings import CONFIG_VARIABLE, Settings

EXIT_UNAVAILABLE: Final = 1
F = TypeVar("F", bound=Callable[..., Any])


def refuse(error: Exception, status: int) -> NoReturn:
    """End with the error in one line on standard error, with `--json` too: nothing on standard output is its sign."""
    say(f"sluice: {' '.join(str(error).split())}", err=True)
    sys.exit(status)


def with_remedy(error: MissingSettingError) -> MissingSettingError:
    """Names the file of a `sluice up` in this directory as well: it leads to what that one runs on."""
    file = settings_of_up(os.environ)
    if file is None:
        return error
    return MissingSettingError(f"{error}; or, to reach what `sluice up` runs here: {CONFIG_VARIABLE}={file}")


def load_settings(**overrides: object) -> Settings:
    """All settings, with the options given (by the names of the settings) over them, and logging as they say."""
    settings = load({name: value for name, value in overrides.items() if value is not None})
    set_up_logging(settings.get(LoggingSettings))
    return settings


def json_option(command: F) -> F:
    return click.option("--json", "json", is_flag=True, default=None, help="Print JSON, for programs.")(command)


def ask(what: str, *, hidden: bool = False, twice: bool = False) -> str:
    """What somebody types, asked for on standard error: standard output has the answer alone."""
    return str(click.prompt(what, hide_input=hidden, confirmation_prompt=twice, err=True))


def scope_option(*, required: bool = False) -> Callable[[F], F]:
    """`--scope`, given once or several times."""
    left_out = "" if required else " Without it: owner."
    return click.option(
        "--scope", "scopes", type=click.Choice(SCOPES), metavar="SCOPE", multiple=True, required=required,
        help=f"What it may do, given several times for several: {', '.join(SCOPES)}.{left_out}",
    )  # fmt: skip


def confirmation_option(question: str) -> Callable[[F], F]:
    """`--yes`, without which the question is asked, on standard error as well."""

    def confirm(context: click.Context, parameter: click.Parameter, value: bool) -> None:
        if not value and not context.resilient_parsing:
            click.confirm(question, abort=True, err=True)

    return click.option(
        "--yes", is_flag=True, callback=confirm, expose_value=False, help="Do it without asking first."
    )


def as_moment(context: click.Context, parameter: click.Parameter, text: str | None) -> datetime | None:
    """The callback of an option that takes a time."""
    from api.http.spelt import parse_time  # noqa: PLC0415 - no role needs it

    try:
        return None if text is None else parse_time(text)
    except (ValueError, OverflowError):
        said = "neither RFC 3339 with an offset nor seconds since 1970"
        raise click.BadParameter(said, context, parameter) from None

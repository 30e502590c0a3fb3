"""What the commands share: options, settings with the options over them, exit statuses."""

import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any, Final, NoReturn, TypeVar

import click

from deploy.settings import load
from runtime.logging import LoggingSettings, set_up_logging
from runtime.settings import Settings

EXIT_UNAVAILABLE: Final = 1
F = TypeVar("F", bound=Callable[..., Any])


def refuse(error: Exception, status: int) -> NoReturn:
    """End with the error in one line."""
    click.echo(f"sluice: {' '.join(str(error).split())}", err=True)
    sys.exit(status)


def load_settings(**overrides: object) -> Settings:
    """All settings, with the options given (by the names of the settings) over them, and logging as they say."""
    settings = load({name: value for name, value in overrides.items() if value is not None})
    set_up_logging(settings.get(LoggingSettings))
    return settings


def json_option(command: F) -> F:
    return click.option("--json", "json", is_flag=True, default=None, help="Print one line of JSON.")(command)


def as_moment(context: click.Context, parameter: click.Parameter, text: str | None) -> datetime | None:
    """The callback of an option that takes a time."""
    from api.http.spelt import parse_time  # noqa: PLC0415 - no role needs it

    try:
        return None if text is None else parse_time(text)
    except (ValueError, OverflowError):
        said = "neither RFC 3339 with an offset nor seconds since 1970"
        raise click.BadParameter(said, context, parameter) from None

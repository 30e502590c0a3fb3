"""The command `sluice`. Left out: its commands and their options (`deploy.commands`), what they do.

A command's module is loaded when the command is asked for: a role holds in memory what it needs itself.
"""

from importlib import import_module
from typing import Any, Final

import click

from deploy.commands.options import EXIT_UNAVAILABLE, refuse
from runtime.errors import ConfigurationError, SluiceError
from runtime.supervisor import EXIT_REFUSED

_COMMANDS: Final = {
    "deploy.commands.roles": ("api", "ingest", "up", "worker"),
    "deploy.commands.operators": (
        "admin",
        "limits",
        "migrate",
        "seed",
        "settings",
        "spool",
        "token",
        "verify",
        "version",
    ),
    "deploy.commands.dashboards": ("dashboard-user",),
    "deploy.commands.quarantine": ("quarantine",),
    "deploy.commands.retention": ("retention",),
    "deploy.commands.rollups": ("rollups",),
    "deploy.commands.registry": ("completion", "device", "key", "login", "logout", "org", "site"),
    "bench.command": ("bench",),
}
_MODULES: Final = {name: module for module, names in _COMMANDS.items() for name in names}


class Commands(click.Group):
    """Loads a command when it is asked for; an error that a person can mend becomes one line and an exit status."""

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted(_MODULES)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in _MODULES:
            return None
        command: click.Command = getattr(import_module(_MODULES[name]), name.replace("-", "_"))
        return command

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except ConfigurationError as error:
            refuse(error, EXIT_REFUSED)
        except SluiceError as error:
            refuse(error, EXIT_UNAVAILABLE)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def main() -> None:
    """Telemetry ingestion in which every acknowledged reading is accounted for.

    Every option is also a setting: `sluice settings` lists all of them.
    """


if __name__ == "__main__":
    main()

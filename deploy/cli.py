"""The command `sluice`. Left out: its commands and their options (`deploy.commands`), what they do.

A command's module is loaded when the command is asked for: a role holds in memory what it needs itself.
"""

from importlib import import_module
from typing import Any, Final

import click

from deploy.commands.options import EXIT_UNAVAILABLE, refuse, with_remedy
from runtime.errors import ConfigurationError, MissingSettingError, SluiceError
from runtime.supervisor import EXIT_REFUSED

_ROLES: Final = "deploy.commands.roles"
_OPERATORS: Final = "deploy.commands.operators"
_REGISTRY: Final = "deploy.commands.registry"
#: As the help lists them: what each is for, and the module that has it.
_COMMANDS: Final = {
    "Run it": {"up": _ROLES, "ingest": _ROLES, "bridge": _ROLES, "worker": _ROLES, "api": _ROLES},
    "Operate it, beside its database": {
        "admin": _OPERATORS,
        "broker": "deploy.commands.broker",
        "ca": "deploy.commands.certificates",
        "dashboard-user": "deploy.commands.dashboards",
        "limits": _OPERATORS,
        "migrate": _OPERATORS,
        "quarantine": "deploy.commands.quarantine",
        "retention": "deploy.commands.retention",
        "rollups": "deploy.commands.rollups",
        "seed": _OPERATORS,
        "spool": _OPERATORS,
        "token": _OPERATORS,
        "verify": _OPERATORS,
    },
    "Use it, over its HTTP API": {
        "login": _REGISTRY,
        "logout": _REGISTRY,
        "org": _REGISTRY,
        "site": _REGISTRY,
        "device": _REGISTRY,
        "key": _REGISTRY,
        "simulate": "deploy.commands.simulate",
    },
    "About it": {
        "bench": "bench.command",
        "completion": "deploy.commands.completion",
        "settings": _OPERATORS,
        "version": _OPERATORS,
    },
}
_MODULES: Final = {name: module for commands in _COMMANDS.values() for name, module in commands.items()}


class Commands(click.Group):
    """Loads a command when it is asked for; an error that a person can mend becomes one line and an exit status."""

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted(_MODULES)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in _MODULES:
            return None
        command: click.Command = getattr(import_module(_MODULES[name]), name.replace("-", "_"))
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        widest = max(map(len, _MODULES))
        for section, names in _COMMANDS.items():
            found = {name.ljust(widest): self.get_command(context, name) for name in names}
            with formatter.section(section):
                formatter.write_dl(
                    [
                        (name, command.get_short_help_str(formatter.width - 6 - widest))
                        for name, command in found.items()
                        if command is not None
                    ]
                )

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        for number, text in enumerate(args, 1):
            # As the operating system hands bytes on that are no UTF-8: no text that is kept may hold them.
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise click.UsageError(f"argument {number} is not UTF-8", context)
        return super().parse_args(context, args)

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except MissingSettingError as error:
            refuse(with_remedy(error), EXIT_REFUSED)
        except ConfigurationError as error:
            refuse(error, EXIT_REFUSED)
        except SluiceError as error:
            refuse(error, EXIT_UNAVAILABLE)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def main() -> None:
    """Telemetry ingestion in which every acknowledged reading is accounted for.

    Each command has its own --help. Settings, which a role also takes from the environment or a file, are listed by
    `sluice settings`. Exit status: 0 done, 1 refused or not possible now, 2 a wrong command, option or setting; the
    reason is told on standard error, with --json too.
    """


if __name__ == "__main__":
    main()

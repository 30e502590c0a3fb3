"""`sluice api`, `bridge`, `ingest`, `worker`, `up`: processes that run until told to stop. Left out: what they do."""

import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Final

import click

from deploy.commands.options import F, json_option, load_settings
from deploy.roles.role import Launch, Role, run_role
from runtime.lifecycle import run
from runtime.supervisor import INHERITED_OPTION, Inherited


def _role_options(command: F) -> F:
    processes = click.option("--processes", type=int, metavar="N", help="How many processes share the work.")
    metrics = click.option("--metrics-listen", metavar="HOST:PORT", help="Where probes and metrics are served.")
    inherited = click.option(INHERITED_OPTION, hidden=True, help="For the processes that a parent starts.")
    return processes(metrics(inherited(command)))


_listen_option: Final = click.option("--listen", metavar="HOST:PORT", help="Where requests are taken.")


def run_named_role(name: str, inherited: str | None, overrides: Mapping[str, object]) -> None:
    """Be a process of that role, until told to stop."""
    settings = load_settings(**overrides)
    launch = Launch(
        settings,
        ["-P", "-m", "deploy.cli", *sys.argv[1:]],
        None if inherited is None else Inherited.parse(inherited),
    )
    role: Role = getattr(import_module(f"deploy.roles.{name}"), name.upper())
    run(lambda stop: run_role(role, launch, stop))


@click.command()
@_listen_option
@_role_options
def api(listen: str | None, processes: int | None, metrics_listen: str | None, inherited: str | None) -> None:
    """Answer the API's requests over HTTP."""
    overrides = {"api_listen": listen, "api_processes": processes, "metrics_listen": metrics_listen}
    run_named_role("api", inherited, overrides)


@click.command()
@click.option("--metrics-listen", metavar="HOST:PORT", help="Where probes and metrics are served.")
def bridge(metrics_listen: str | None) -> None:
    """Take readings in from an MQTT broker (SLUICE_MQTT_URL).

    Several share the sessions; when one ends, others take its sessions over.
    """
    run_named_role("bridge", None, {"metrics_listen": metrics_listen})


@click.command()
@_listen_option
@_role_options
def ingest(listen: str | None, processes: int | None, metrics_listen: str | None, inherited: str | None) -> None:
    """Take readings in over HTTP."""
    overrides = {"http_listen": listen, "http_processes": processes, "metrics_listen": metrics_listen}
    run_named_role("ingest", inherited, overrides)


@click.command()
@_role_options
def worker(processes: int | None, metrics_listen: str | None, inherited: str | None) -> None:
    """Store what stands in the log in the database."""
    run_named_role("worker", inherited, {"worker_processes": processes, "metrics_listen": metrics_listen})


@click.command()
@click.option("--data", "data_dir", metavar="DIR", help="Where everything is kept.")
@click.option("--port", type=click.IntRange(0, 65_535), help="Of the one address for devices and queries; 0: any.")
@click.option("--metrics-listen", metavar="HOST:PORT", help="Where probes and metrics are served.")
@json_option
def up(data_dir: str | None, port: int | None, metrics_listen: str | None, json: bool | None) -> None:
    """Run everything in one process, on parts of its own.

    It brings a PostgreSQL and a log with it, makes a demo organisation at its first start, and prints two commands to
    try: one sends a reading, the other reads it back.
    """
    from deploy.up import run_up, with_port  # noqa: PLC0415 - it holds every role, of which a process has one

    given = {"data_dir": data_dir, "metrics_listen": metrics_listen, "json": json}
    overrides: dict[str, object] = {name: value for name, value in given.items() if value is not None}
    if port is not None:
        overrides["http_listen"] = with_port(load_settings(**overrides), port)
    settings = load_settings(**overrides)
    run(lambda stop: run_up(settings, overrides, stop))

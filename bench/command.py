"""`sluice bench`: its commands and their options. Left out: what they measure, and how that is shown."""

import sys
from pathlib import Path
from typing import Final

import click
import orjson

from bench import api as api_bench
from bench import hostile as hostile_bench
from bench import live as live_bench
from bench import memory as memory_bench
from bench import mqtt as mqtt_bench
from bench import pipeline as pipeline_bench
from bench import queries as queries_bench
from bench.errors import BenchError
from bench.faults import run as faults_bench
from bench.faults.catalogue import FAULTS
from bench.faults.report import faults_object, faults_tables
from bench.history import Scale
from bench.report import (
    api_object,
    api_tables,
    hostile_object,
    hostile_tables,
    live_object,
    live_tables,
    memory_object,
    memory_tables,
    mqtt_object,
    mqtt_tables,
    pipeline_object,
    pipeline_tables,
    queries_object,
    queries_tables,
)

CHECKOUT: Final = Path(__file__).resolve().parents[1]
READINGS_MAX: Final = 20_000_000

_json_option: Final = click.option("--json", "as_json", is_flag=True, help="Print one object instead of tables.")
_services_option: Final = click.option(
    "--services",
    type=click.Path(file_okay=False, path_type=Path),
    default=CHECKOUT / ".services",
    metavar="DIR",
    help="Where a run's own Kafka and database are made, and removed again; not used with SLUICE_LOG_URL, "
    "SLUICE_DATABASE_URL and SLUICE_DATABASE_OWNER_URL set.",
)


@click.group()
def bench() -> None:
    """Measure the pipeline on real parts, on this machine."""


@bench.command()
@click.option("--readings", type=click.IntRange(1_000, READINGS_MAX), default=2_000_000, show_default=True,
              help="Sent in all.")  # fmt: skip
@click.option("--readings-per-request", type=click.IntRange(1, 10_000), default=100, show_default=True,
              help="In one body.")  # fmt: skip
@click.option(
    "--connections", type=click.IntRange(1, 1_000), default=32, show_default=True, help="Sending at a time."
)
@click.option("--processes", type=click.IntRange(1, 64), default=1, show_default=True, help="Of ingest.")
@click.option("--series", type=click.IntRange(4, 400_000), default=5_000, show_default=True,
              help="That the readings belong to.")  # fmt: skip
@click.option("--singles", type=click.IntRange(1_000, 1_000_000), default=60_000, show_default=True,
              help="Small requests, for each way of sending one.")  # fmt: skip
@click.option("--single-connections", type=click.IntRange(1, 4_000), default=128, show_default=True,
              help="For those: so many that ingest is never idle, like the bare handler beside it.")  # fmt: skip
@click.option("--times", type=click.Choice(["rfc3339", "epoch"]), default="rfc3339", show_default=True,
              help="How times are written.")  # fmt: skip
@_json_option
@_services_option
def pipeline(
    readings: int,
    readings_per_request: int,
    connections: int,
    processes: int,
    series: int,
    singles: int,
    single_connections: int,
    times: str,
    as_json: bool,
    services: Path,
) -> None:
    """From a request to a committed row: rates, latencies, CPU.

    CPU is told by part, beside what COPY and a bare aiohttp handler take.
    """
    options = pipeline_bench.Options(
        readings=readings,
        readings_per_request=readings_per_request,
        connections=connections,
        processes=processes,
        series=series,
        singles=singles,
        single_connections=single_connections,
        epoch_times=times == "epoch",
    )
    figures = pipeline_bench.measure(options, services)
    click.echo(orjson.dumps(pipeline_object(figures)).decode() if as_json else pipeline_tables(figures))


@bench.command()
@click.option("--devices", type=click.IntRange(100, 200_000), default=100_000, show_default=True,
              help="That ingest knows.")  # fmt: skip
@click.option("--series", type=click.IntRange(100, 2_000_000), default=1_000_000, show_default=True,
              help="That a worker knows.")  # fmt: skip
@_json_option
@_services_option
def memory(devices: int, series: int, as_json: bool, services: Path) -> None:
    """The memory of ingest and a worker that know many devices."""
    if series % devices or series // devices > 1_000:
        raise BenchError("--series is a multiple of --devices, up to 1,000 of them each")
    figures = memory_bench.measure(devices, series, services)
    click.echo(orjson.dumps(memory_object(figures)).decode() if as_json else memory_tables(figures))


@bench.command()
@click.option("--messages", type=click.IntRange(100, 1_000_000), default=100_000, show_default=True,
              help="Of one reading, in each turn.")  # fmt: skip
@click.option("--devices", type=click.IntRange(4, 100_000), default=1_000, show_default=True,
              help="That they are of.")  # fmt: skip
@click.option("--readings-per-message", type=click.IntRange(2, 1_000), default=100, show_default=True,
              help="In a large message.")  # fmt: skip
@click.option("--batches", type=click.IntRange(100, 100_000), default=20_000, show_default=True,
              help="Large messages.")  # fmt: skip
@click.option("--plants", type=click.IntRange(0, 10_000), default=5_000, show_default=True,
              help="With certificates, connected at once to a broker that is restarted; 0: none.")  # fmt: skip
@_json_option
@_services_option
def mqtt(
    messages: int,
    devices: int,
    readings_per_message: int,
    batches: int,
    plants: int,
    as_json: bool,
    services: Path,
) -> None:
    """From a broker to a committed row: rates and CPU of the bridge.

    Of messages with one reading and with many; how soon one can be queried, and how soon plants are back.
    """
    options = mqtt_bench.Options(messages, devices, readings_per_message, batches, plants)
    figures = mqtt_bench.measure(options, services)
    click.echo(orjson.dumps(mqtt_object(figures)).decode() if as_json else mqtt_tables(figures))


@bench.command()
@click.option("--devices", type=click.IntRange(2_000, 1_000_000), default=100_000, show_default=True,
              help="Of one organisation.")  # fmt: skip
@click.option("--requests", type=click.IntRange(20, 10_000), default=200, show_default=True, help="Of each kind.")
@_json_option
@_services_option
def registry(devices: int, requests: int, as_json: bool, services: Path) -> None:
    """The time that the API takes for lists, devices and logins.

    Lists by every filter; devices made and got.
    """
    figures = api_bench.measure(devices, requests, services)
    click.echo(orjson.dumps(api_object(figures)).decode() if as_json else api_tables(figures))


@bench.command()
@click.option(
    "--requests", type=click.IntRange(1_000, 10_000_000), default=100_000, show_default=True, help="Hostile ones."
)
@click.option("--attackers", type=click.IntRange(1, 1_000), default=32, show_default=True, help="At a time.")
@click.option("--seed", type=click.IntRange(0, 2**31), default=20_261_121, show_default=True,
              help="The same one makes the same requests again.")  # fmt: skip
@_json_option
@_services_option
def hostile(requests: int, attackers: int, seed: int, as_json: bool, services: Path) -> None:
    """Hostile requests beside good ones: faults, crashes, memory.

    At the ingest face, while good devices send. Exit status 1 for any fault.
    """
    figures = hostile_bench.measure(hostile_bench.Options(requests, attackers, seed), services)
    click.echo(orjson.dumps(hostile_object(figures)).decode() if as_json else hostile_tables(figures))
    if figures.failures:
        raise click.exceptions.Exit(1)


@bench.command()
@click.option("--seconds", type=click.FloatRange(2, 3_600), default=60, show_default=True, help="Of load, each.")
@click.option("--hold", type=click.FloatRange(0.5, 600), default=10, show_default=True,
              help="Seconds that each fault is there.")  # fmt: skip
@click.option("--rate", type=click.IntRange(100, 1_000_000), help="Readings a second; else half the machine's.")
@click.option("--only", metavar="NAME,…", help="Some of the faults.")
@click.option("--logs", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
              help="Where what the roles log is kept, by fault.")  # fmt: skip
@click.option("--list", "is_listed", is_flag=True, help="Print the names of all faults, and do nothing else.")
@_json_option
@click.option(
    "--services",
    type=click.Path(file_okay=False, path_type=Path),
    default=CHECKOUT / ".services",
    metavar="DIR",
    help="Where Kafka and databases of the run's own are made, and removed again: it kills them.",
)
def faults(
    seconds: float,
    hold: float,
    rate: int | None,
    only: str | None,
    logs: Path | None,
    is_listed: bool,
    as_json: bool,
    services: Path,
) -> None:
    """Break each part under load, and look every reading up.

    Every one that was acknowledged; exit status 1 if one is lost or doubled.
    """
    if is_listed:
        click.echo("\n".join(FAULTS))
        return
    names = tuple(only.split(",")) if only else tuple(FAULTS)
    suite = faults_bench.measure(faults_bench.Options(seconds, hold, rate, names=names, logs=logs), services)
    click.echo(orjson.dumps(faults_object(suite)).decode() if as_json else faults_tables(suite))
    sys.exit(0 if suite.kept else 1)


@bench.command()
@click.option("--listeners", type=click.IntRange(1, 10_000), default=1_000, show_default=True,
              help="Streams, each of a device of its own.")  # fmt: skip
@click.option("--readings-per-request", type=click.IntRange(1, 1_000), default=5, show_default=True,
              help="Each device sends one request a second.")  # fmt: skip
@click.option("--seconds", type=click.IntRange(1, 600), default=20, show_default=True, help="How long it is sent.")
@_json_option
@_services_option
def live(listeners: int, readings_per_request: int, seconds: int, as_json: bool, services: Path) -> None:
    """How soon an acknowledged reading is told, and at what cost."""
    figures = live_bench.measure(live_bench.Options(listeners, readings_per_request, seconds), services)
    click.echo(orjson.dumps(live_object(figures)).decode() if as_json else live_tables(figures))


@bench.command()
@click.option("--series", type=click.IntRange(32, 5_000), default=200, show_default=True,
              help="Each of a device of its own.")  # fmt: skip
@click.option("--days", type=click.IntRange(1, 400), default=30, show_default=True, help="Of history.")
@click.option("--every", type=click.IntRange(1, 3_600), default=60, show_default=True, metavar="SECONDS",
              help="Between two readings of a series.")  # fmt: skip
@click.option("--requests", type=click.IntRange(10, 10_000), default=200, show_default=True, help="Of each kind.")
@click.option("--clients", type=click.IntRange(1, 64), multiple=True, default=(1, 4), show_default=True,
              help="That ask at a time; may be given more than once.")  # fmt: skip
@click.option("--seconds", type=click.IntRange(2, 3_600), default=30, show_default=True,
              help="Of load, for what runs beside ingest.")  # fmt: skip
@click.option("--readings", type=click.IntRange(125_000, READINGS_MAX), default=1_000_000, show_default=True,
              help="Landed in each turn, with and without roll-ups beside.")  # fmt: skip
@click.option("--only", metavar="NAME,…", help=f"Some of {', '.join(queries_bench.PARTS)}.")
@click.option("--keep", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
              help="Where the filled database stays: a stopped run goes on, a later one has it.")  # fmt: skip
@_json_option
@_services_option
def queries(
    series: int,
    days: int,
    every: int,
    requests: int,
    clients: tuple[int, ...],
    seconds: int,
    readings: int,
    only: str | None,
    keep: Path | None,
    as_json: bool,
    services: Path,
) -> None:
    """What answers take, beside the same from raw.

    Over a history that is filled first.
    """
    names = tuple(only.split(",")) if only else queries_bench.PARTS
    if unknown := set(names) - set(queries_bench.PARTS):
        raise BenchError(f"--only: there is no {', '.join(sorted(unknown))}")
    options = queries_bench.Options(Scale(series, days, every), requests, clients, names, seconds, readings)
    figures = queries_bench.measure(options, services, keep)
    click.echo(orjson.dumps(queries_object(figures)).decode() if as_json else queries_tables(figures))


if __name__ == "__main__":
    bench()

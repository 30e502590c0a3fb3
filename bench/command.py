"""`sluice bench`: its commands and their options. Left out: what they measure, and how that is shown."""

from pathlib import Path
from typing import Final

import click
import orjson

from bench import memory as memory_bench
from bench import pipeline as pipeline_bench
from bench.errors import BenchError
from bench.report import memory_object, memory_tables, pipeline_object, pipeline_tables

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
@click.option("--readings", type=click.IntRange(1_000, READINGS_MAX), default=2_000_000, show_default=True)
@click.option("--readings-per-request", type=click.IntRange(1, 10_000), default=100, show_default=True)
@click.option("--connections", type=click.IntRange(1, 1_000), default=32, show_default=True)
@click.option("--processes", type=click.IntRange(1, 64), default=1, show_default=True, help="Of ingest.")
@click.option("--series", type=click.IntRange(4, 400_000), default=5_000, show_default=True)
@click.option("--singles", type=click.IntRange(1_000, 1_000_000), default=60_000, show_default=True,
              help="Requests of one reading, for each way of sending one.")  # fmt: skip
@click.option("--single-connections", type=click.IntRange(1, 4_000), default=128, show_default=True,
              help="For those: so many that ingest is never idle, like the bare handler beside it.")  # fmt: skip
@click.option("--times", type=click.Choice(["rfc3339", "epoch"]), default="rfc3339", show_default=True)
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
    """From a request to a committed row: rates, latencies and CPU by part, beside COPY and a bare aiohttp handler."""
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
@click.option("--devices", type=click.IntRange(100, 200_000), default=100_000, show_default=True)
@click.option("--series", type=click.IntRange(100, 2_000_000), default=1_000_000, show_default=True)
@_json_option
@_services_option
def memory(devices: int, series: int, as_json: bool, services: Path) -> None:
    """What ingest takes when it knows many devices, and a worker when it knows many series."""
    if series % devices or series // devices > 1_000:
        raise BenchError("--series is a multiple of --devices, up to 1,000 of them each")
    figures = memory_bench.measure(devices, series, services)
    click.echo(orjson.dumps(memory_object(figures)).decode() if as_json else memory_tables(figures))


if __name__ == "__main__":
    bench()

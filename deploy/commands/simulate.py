"""`sluice simulate`: a fleet of plants that do as real ones would. Left out: what they do (`bench.simulator`)."""

import asyncio
import json as json_text
import signal
from contextlib import suppress
from typing import Final
from urllib.parse import parse_qsl, urlsplit
from uuid import UUID

import click
import uvloop

from bench.simulator.fleet import PLANTS_MAX, RATE_MAX, Fleet, Options, Summary
from bench.simulator.plants import Api, Broker
from deploy.commands.options import json_option
from deploy.printing import say, say_table
from deploy.remote import Remote, kept
from runtime.mqtt import OPTIONS, check_mqtt_url, endpoint
from schemas.plants import AuthMethod

DURATION_S_MAX: Final = 7 * 86_400.0
DEVICES_MAX: Final = 32
_OPTION: Final = "--broker"


def _as_broker(context: click.Context, parameter: click.Parameter, url: str | None) -> Broker | None:
    if url is None:
        return None
    try:
        check_mqtt_url(url)
    except ValueError as error:
        raise click.BadParameter(str(error), context, parameter) from None
    given = dict(parse_qsl(urlsplit(url).query))
    if urlsplit(url).username is not None or given.keys() - {OPTIONS[0]}:
        raise click.BadParameter("says nothing of who logs in: each plant is itself", context, parameter)
    return Broker(endpoint(url, _OPTION).address, given.get(OPTIONS[0]))


@click.command()
@click.option("--plants", type=click.IntRange(1, PLANTS_MAX), default=10, show_default=True, help="How many.")
@click.option("--auth", type=click.Choice([method.lower() for method in AuthMethod]), default="mtls",
              show_default=True, help="How they log in at the broker.")  # fmt: skip
@click.option("--rate", type=click.FloatRange(0, RATE_MAX), default=10.0, show_default=True,
              help="Messages a second, of all together.")  # fmt: skip
@click.option("--duration", type=click.FloatRange(0, DURATION_S_MAX), metavar="SECONDS",
              help="For how long, once they have been made; otherwise until it is interrupted.")  # fmt: skip
@click.option("--devices-per-plant", type=click.IntRange(1, DEVICES_MAX), default=3, show_default=True,
              help="Meters, inverters and batteries.")  # fmt: skip
@click.option(_OPTION, callback=_as_broker, metavar="URL",
              help="mqtts://host:port?cafile=FILE or mqtt://host:port, if not where packages say.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0, 2**31), help="The same one measures the same values again.")
@json_option
def simulate(
    plants: int,
    auth: str,
    rate: float,
    duration: float | None,
    devices_per_plant: int,
    broker: Broker | None,
    seed: int | None,
    json: bool | None,
) -> None:
    """Act as plants over MQTT, as real ones do.

    They connect, sign what they publish, answer commands, come back. Plants of the organisation that `sluice login`
    chose are found or made, and provisioned, over the HTTP API; a later run has the same ones again. They are marked
    in their metadata, and no others are touched. Interrupted, they send what waits and log off; the summary says what
    became of it.
    """
    remote = Remote(kept())
    api = Api(remote.ask, UUID(remote.organisation), broker)
    options = Options(plants, AuthMethod(auth.upper()), rate, devices_per_plant, seed)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        summary = runner.run(_simulate(api, options, duration))
    if json:
        click.echo(json_text.dumps(summary.as_object()))
    else:
        _show(summary)


async def _simulate(api: Api, options: Options, duration_s: float | None) -> Summary:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    fleet = await Fleet.make(api, options)
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    say(f"{options.plants} plants are there", err=True)
    async with fleet:
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), duration_s)
    return fleet.summary()


def _show(summary: Summary) -> None:
    told = summary.as_object()
    failures = told.pop("failures")
    rows = [(name.replace("_", " "), f"{value:,.6g}") for name, value in told.items()]
    say_table(rows, numbers=True)
    for reason, count in sorted(failures.items()):
        say(f"{count} × {reason}")

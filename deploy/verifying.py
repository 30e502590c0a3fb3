"""`sluice verify`: opens what it needs, and prints what was found. Left out: the verification (`workers.verify`)."""

import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from typing import Any, Final
from uuid import UUID

import click
import orjson

from deploy.database import check_up_to_date
from deploy.generation import READER_ROLE, open_generation
from deploy.printing import say, say_table
from deploy.settings import DeploySettings
from runtime.clock import SystemClock
from runtime.errors import ConfigurationError
from runtime.log import LogSettings
from runtime.postgres import PostgresSettings, connect
from runtime.settings import Settings
from workers.settings import LandingSettings
from workers.verify.reading import Span
from workers.verify.run import Report, Totals, Verification
from workers.verify.settings import VerifySettings
from workers.verify.store import ALWAYS, NEVER
from workers.verify.tally import Finding
from workers.verify.times import as_text, from_datetime

_HEADS: Final = (
    "received",
    "stored",
    "duplicate",
    "conflict",
    "quarantined",
    "by rule",
    "erased",
    "LOST",
    "altered",
    "unexplained",
)


async def verify(
    settings: Settings, *, since: datetime | None, until: datetime | None, organisation: UUID | None
) -> bool:
    """Whether everything is where it must be. Raises `ConfigurationError`, `UnavailableError`."""
    if since is not None and until is not None and since >= until:
        raise ConfigurationError(
            f"--since {since.isoformat()} is not before --until {until.isoformat()}: nothing lies between"
        )
    await check_up_to_date(settings)
    span = Span(
        NEVER if since is None else from_datetime(since),
        ALWAYS if until is None else from_datetime(until),
        organisation,
    )
    postgres = settings.get(PostgresSettings)
    connection: Any = await connect(postgres, role=READER_ROLE, application="sluice verify start")
    try:
        _, log = await open_generation(connection, settings.get(LogSettings), client_id="sluice-verify")
    finally:
        await connection.close()
    as_json = settings.get(DeploySettings).json
    shown: list[Finding] = []
    verification = Verification(
        postgres,
        settings.get(VerifySettings),
        settings.get(LandingSettings),
        log,
        span,
        clock=SystemClock(),
        emit=_print_line if as_json else _keep(shown, settings.get(VerifySettings).verify_findings_max),
        say=lambda text: say(text, err=True),
    )
    try:
        report = await verification.run()
    finally:
        await log.close()
    if as_json:
        click.echo(orjson.dumps({"summary": summary(report)}, default=str, option=orjson.OPT_NON_STR_KEYS).decode())
    else:
        _print(report, shown)
    return not report.differs


def _keep(shown: list[Finding], most: int) -> Callable[[Finding], None]:
    def keep(finding: Finding) -> None:
        if len(shown) < most:
            shown.append(finding)

    return keep


def _print_line(finding: Finding) -> None:
    sys.stdout.write(orjson.dumps({"finding": finding.told()}, default=str).decode() + "\n")


def summary(report: Report) -> dict[str, object]:
    """For programs."""
    return {
        "source": report.source,
        "organisations": {organisation: asdict(totals) for organisation, totals in report.organisations.items()},
        "findings": report.findings.by_kind,
        "coverage": {
            "records": report.records,
            "readings": report.readings,
            "judged_readings": report.judged,
            "repeated_records": report.repeats,
            "rows": report.rows,
            "notes": report.notes_compared,
            "ledger_rows": report.compared.hours,
            "ledger_rows_set_aside": report.compared.set_aside,
            "partitions": {
                partition: {
                    "start": part.start,
                    "end": part.end,
                    "records": part.records,
                    "first_received": _time(part.first_received),
                    "last_received": _time(part.last_received),
                    "rows_judged_from": _time(report.judged_from[partition]),
                }
                for partition, part in report.covered.items()
            },
            "not_covered": report.notes,
        },
        "ok": not report.differs,
    }


def _time(time: int | None) -> str | None:
    return None if time in (None, NEVER, ALWAYS) else as_text(time)


# ---------------------------------------------------------------- for people


def _print(report: Report, shown: list[Finding]) -> None:
    _print_coverage(report)
    _print_table(report.organisations)
    for finding in shown:
        say(_sentence(finding))
    if report.findings.count > len(shown):
        click.echo(f"… and {report.findings.count - len(shown)} more: --json prints all of them")
    verdict = ", ".join(f"{kind}: {count}" for kind, count in sorted(report.findings.by_kind.items()))
    if verdict:
        click.echo(f"{report.findings.count} differences ({verdict})")
    else:
        click.echo("no difference: nothing was compared" if report.is_empty else "no difference")


def _print_coverage(report: Report) -> None:
    received = [
        time
        for part in report.covered.values()
        for time in (part.first_received, part.last_received)
        if time is not None
    ]
    between = f", received {as_text(min(received))} to {as_text(max(received))}" if received else ""
    click.echo(f"log {report.source}: {report.records} records with {report.readings} readings{between}")
    for partition, part in report.covered.items():
        click.echo(f"  partition {partition}: positions {part.start} to {part.end}")
    compared = report.compared
    click.echo(
        f"compared {report.judged} of them with {report.rows} stored rows, {report.notes_compared} notes, "
        f"{compared.hours} rows of the ledger; {compared.set_aside} rows of the ledger with the quarantine"
    )
    for note in report.notes:
        say(f"not covered: {note}")


def _print_table(organisations: dict[UUID, Totals]) -> None:
    rows = [(str(organisation), *map(str, asdict(totals).values())) for organisation, totals in organisations.items()]
    say_table([("organisation", *_HEADS), *sorted(rows)], numbers=True)


def _sentence(finding: Finding) -> str:
    told = finding.told()
    kind, message = told.pop("kind"), told.pop("message")
    if told["readings"] == 1:
        del told["readings"]
    names = ", ".join(f"{name.removesuffix('_id')} {value}" for name, value in told.items() if value != "")
    return f"{kind}: {names}: {message}"

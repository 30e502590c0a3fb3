"""How a fault suite is shown: a row a fault for people, one object for programs. Left out: measuring it."""

from dataclasses import asdict
from typing import Any

from bench.faults.figures import Faulted, Suite
from bench.report import machine

_HEAD = (
    "fault",
    "acknowledged",
    "stored",
    "doubled",
    "quarantined",
    "lost",
    "unknown",
    "ack after",
    "landed after",
    "drain",
    "recovered",
    "",
)


def faults_object(suite: Suite) -> dict[str, Any]:
    """For `--json`."""
    return {
        "machine": machine(),
        "seconds": suite.seconds,
        "hold_s": suite.hold,
        "reference": asdict(suite.reference),
        "kept": suite.kept,
        "faults": [
            asdict(fault) | {"harm": fault.harm, "drained": fault.drained, "missed": fault.missed}
            for fault in suite.faulted
        ],
    }


def faults_tables(suite: Suite) -> str:
    """For people: the measure, a row a fault, and what went wrong in words."""
    rows = [_HEAD, *(_row(fault) for fault in suite.faulted)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = [
        "  ".join(
            cell.ljust(width) if at in (0, len(_HEAD) - 1) else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([*_measure(suite), "", *table, *_words(suite)])


def _measure(suite: Suite) -> list[str]:
    reference = suite.reference
    sustained = (
        "" if reference.sustained is None else f", half of the {reference.sustained:,.0f} the machine sustains"
    )
    return [
        f"{suite.seconds:g} s of load at {reference.rate:,.0f} readings/s{sustained}; faults held {suite.hold:g} s",
        "doubled: also what stands at another time than its own, or was never sent; unknown: not answered",
        "drain: readings/s of the backlog, and of what one was landed at just before the fault, under the same load;",
        "no drain (-): that lands the backlog within a second",
        "recovered: landing is a second behind at most",
    ]


def _row(fault: Faulted) -> tuple[str, ...]:
    verdict = fault.verdict
    counts = (
        verdict.acknowledged,
        verdict.stored,
        verdict.doubled,
        verdict.quarantined,
        verdict.lost,
        verdict.unknown,
    )
    drain = "-"
    if fault.drained is not None:
        drain = f"{fault.drained_per_s:,.0f} {fault.drained:.2f} ×"
    seconds = (fault.first_acknowledged_s, fault.first_landed_s)
    told = "FAILED" if fault.harm else "missed" if fault.missed else "ok"
    return (
        fault.name,
        *(f"{number:,}" for number in counts),
        *(map(_seconds, seconds)),
        drain,
        _seconds(fault.recovered_s),
        told,
    )


def _seconds(seconds: float | None) -> str:
    return "never" if seconds is None else f"{seconds:.1f} s"


def _words(suite: Suite) -> list[str]:
    words = [
        f"{fault.name}: {what}"
        for fault in suite.faulted
        for what in (*fault.harm, *fault.verdict.examples, *fault.missed, *filter(None, [fault.broker]))
    ]
    return ["", *words] if words else []

"""How figures are shown: one object for programs, tables for people, and which targets they meet.

Left out: measuring them.
"""

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from bench.load import Load, percentiles_ms
from bench.memory import MemoryFigures
from bench.pipeline import EndToEnd, Figures
from bench.singles import Single

#: The parts of the system; the load generator is none of them.
SYSTEM: Final = ("ingest", "kafka", "worker", "postgresql")
MEGABYTE: Final = 1_000_000


@dataclass(frozen=True)
class Target:
    """A figure that is to be reached."""

    what: str
    measured: float
    bound: float
    unit: str
    at_most: bool

    @property
    def met(self) -> bool:
        return self.measured <= self.bound if self.at_most else self.measured >= self.bound

    @property
    def row(self) -> tuple[str, str, str, str]:
        sign = "≤" if self.at_most else "≥"
        measured, bound = (f"{value:,.2f}".rstrip("0").rstrip(".") for value in (self.measured, self.bound))
        return self.what, f"{measured} {self.unit}".strip(), f"{sign} {bound}", "met" if self.met else "missed"

    @property
    def plain(self) -> dict[str, Any]:
        bound = {"at_most" if self.at_most else "at_least": self.bound}
        return {"what": self.what, "measured": self.measured, "unit": self.unit, **bound, "met": self.met}


def machine() -> dict[str, Any]:
    return {"cores": os.cpu_count(), "python": platform.python_version(), "system": platform.platform()}


# ---------------------------------------------------------------- pipeline


def cpu_us_by_part(whole: EndToEnd) -> dict[str, float]:
    """CPU µs a reading; PostgreSQL's with what the run left it to do."""
    taken = {part: whole.cpu_s[part] for part in SYSTEM}
    taken["postgresql"] += whole.settling_cpu_s or 0.0
    return {part: seconds * 1e6 / whole.load.readings for part, seconds in taken.items()}


def pipeline_targets(figures: Figures) -> list[Target]:
    whole = figures.end_to_end
    # With fewer connections ingest is idle most of the time, and waking up is what is measured.
    singles = [
        Target(f"ingest CPU of a {single.name}, against the bare handler", single.to_bare, 1.5, "×", True)
        for single in figures.singles
        if single.connections == figures.options.single_connections
    ]
    alone = figures.landing.readings_per_s / figures.copied.rows_per_s
    return [
        Target("end to end until committed", whole.load.readings / whole.committed_s, 250_000, "readings/s", False),
        Target("CPU of all parts", sum(cpu_us_by_part(whole).values()), 6.0, "µs/reading", True),
        Target("landing alone, against COPY", alone, 0.85, "×", False),
        *singles,
        Target("single reading until it is queryable, p95", _trickle(figures)["p95"], 250, "ms", True),
    ]


def _trickle(figures: Figures) -> dict[str, float]:
    return percentiles_ms(figures.trickle_s, 50, 95)


def _acknowledged(load: Load) -> dict[str, float]:
    return percentiles_ms(load.latencies_s, 50, 95, 99)


def pipeline_object(figures: Figures) -> dict[str, Any]:
    """For `--json`."""
    return {
        "machine": machine(),
        "options": vars(figures.options),
        "pipeline": _whole_object(figures),
        "landing": vars(figures.landing) | {"to_copy": figures.landing.readings_per_s / figures.copied.rows_per_s},
        "singles": [_single_object(single) for single in figures.singles],
        "yardsticks": {
            "copy": vars(figures.copied)
            | {
                "rows_per_s": figures.copied.rows_per_s,
                "postgresql_us_per_row": figures.copied.postgresql_us_per_row,
            },
            "bare_handler_us_per_request": {single.name: single.bare_us for single in figures.singles},
        },
        "targets": [target.plain for target in pipeline_targets(figures)],
    }


def _whole_object(figures: Figures) -> dict[str, Any]:
    whole = figures.end_to_end
    by_part = cpu_us_by_part(whole)
    return {
        "readings": whole.load.readings,
        "requests": whole.load.requests,
        "readings_per_s": whole.load.readings / whole.committed_s,
        "acknowledged_readings_per_s": whole.load.readings_per_s,
        "requests_per_s": whole.load.requests_per_s,
        "acknowledgement_ms": _acknowledged(whole.load),
        "receipt_to_row_ms": _trickle(figures),
        "receipt_to_commit_under_load_ms": dict(whole.receipt_to_commit_ms),
        "cpu_s": dict(whole.cpu_s) | {"postgresql_settling": whole.settling_cpu_s},
        "cpu_us_per_reading": sum(by_part.values()),
        "cpu_us_per_reading_by_part": by_part,
        "batch_rows": whole.batch_rows,
        "memory_peak_mb": {role: size / MEGABYTE for role, size in whole.memory_peak_bytes.items()},
    }


def _single_object(single: Single) -> dict[str, Any]:
    plain = {name: value for name, value in vars(single).items() if name != "latencies_s"}
    return plain | {"acknowledgement_ms": percentiles_ms(single.latencies_s, 50, 95, 99)}


def pipeline_tables(figures: Figures) -> str:
    options = figures.options
    title = (
        f"{options.readings:,} readings, {options.readings_per_request} a POST, {options.series:,} series, "
        f"{options.connections} connections, {options.processes} ingest process(es), {os.cpu_count()} cores"
    )
    tables = [_whole_table(figures), _cpu_table(figures.end_to_end), _landing_table(figures), _single_table(figures)]
    targets = _table(("target", "measured", "wanted", ""), [target.row for target in pipeline_targets(figures)])
    return "\n\n".join([title, *tables, targets])


def _whole_table(figures: Figures) -> str:
    whole = figures.end_to_end
    return _table(
        ("end to end", ""),
        [
            ("readings/s until committed", f"{whole.load.readings / whole.committed_s:,.0f}"),
            ("readings/s acknowledged", f"{whole.load.readings_per_s:,.0f}"),
            ("requests/s", f"{whole.load.requests_per_s:,.0f}"),
            ("acknowledgement", _percentiles(_acknowledged(whole.load))),
            ("receipt to row, idle", _percentiles(_trickle(figures))),
            ("receipt to commit, under load", _percentiles(whole.receipt_to_commit_ms) + " (buckets)"),
            ("readings a transaction", f"{whole.batch_rows:,.0f}"),
            *[
                (f"memory of {role}, peak", f"{size / MEGABYTE:.0f} MB")
                for role, size in whole.memory_peak_bytes.items()
            ],
        ],
    )


def _cpu_table(whole: EndToEnd) -> str:
    by_part = cpu_us_by_part(whole)
    rows = [(part, f"{us * whole.load.readings / 1e6:.2f}", f"{us:.2f}") for part, us in by_part.items()]
    rows.append(
        ("together", f"{sum(by_part.values()) * whole.load.readings / 1e6:.2f}", f"{sum(by_part.values()):.2f}")
    )
    for part, name in (("load", "load generator"), ("others", "others on this machine")):
        rows.append((name, f"{whole.cpu_s[part]:.2f}", f"{whole.cpu_s[part] * 1e6 / whole.load.readings:.2f}"))
    return _table(("CPU", "s", "µs/reading"), rows)


def _landing_table(figures: Figures) -> str:
    landing, copied = figures.landing, figures.copied
    return _table(
        ("from a full log", "readings/s", "a transaction", "worker µs", "PostgreSQL µs"),
        [
            ("landing alone", *_rate(landing.readings_per_s, landing.batch_rows), f"{landing.worker_us:.2f}",
             f"{landing.postgresql_us:.2f}"),
            ("COPY of the same rows", *_rate(copied.rows_per_s, copied.rows_per_copy), "",
             f"{copied.postgresql_us_per_row:.2f}"),
        ],
    )  # fmt: skip


def _rate(per_s: float, rows: float) -> tuple[str, str]:
    return f"{per_s:,.0f}", f"{rows:,.0f}"


def _single_table(figures: Figures) -> str:
    rows = [
        (single.name, f"{single.connections}", f"{single.requests_per_s:,.0f}", f"{single.ingest_us:.1f}",
         f"{single.bare_us:.1f}", f"{single.to_bare:.2f}", f"{single.kafka_us:.1f}", f"{single.load_us:.1f}",
         _percentiles(percentiles_ms(single.latencies_s, 50, 95, 99)))
        for single in figures.singles
    ]  # fmt: skip
    header = ("one reading a request", "connections", "requests/s", "ingest µs", "bare µs", "ratio", "Kafka µs",
              "load µs", "acknowledgement")  # fmt: skip
    return _table(header, rows)


# ---------------------------------------------------------------- memory


def memory_targets(figures: MemoryFigures) -> list[Target]:
    ingest, worker = (figures.peak_bytes[role] / MEGABYTE for role in ("ingest", "worker"))
    return [
        Target(f"memory of ingest, {figures.devices:,} devices known, peak", ingest, 150, "MB", True),
        Target(f"memory of a worker, {figures.series:,} series, peak", worker, 300, "MB", True),
    ]


def memory_object(figures: MemoryFigures) -> dict[str, Any]:
    return {
        "machine": machine(),
        "memory": {
            "devices": figures.devices,
            "series": figures.series,
            "known_credentials": figures.devices,
            "series_cached": figures.series_cached,
            "peak_mb": {role: size / MEGABYTE for role, size in figures.peak_bytes.items()},
            "resident_mb": {role: size / MEGABYTE for role, size in figures.resident_bytes.items()},
        },
        "targets": [target.plain for target in memory_targets(figures)],
    }


def memory_tables(figures: MemoryFigures) -> str:
    rows = [
        (role, f"{figures.peak_bytes[role] / MEGABYTE:.0f}", f"{figures.resident_bytes[role] / MEGABYTE:.0f}")
        for role in figures.peak_bytes
    ]
    targets = _table(("target", "measured", "wanted", ""), [target.row for target in memory_targets(figures)])
    return "\n\n".join([_table(("memory", "peak MB", "at the end MB"), rows), targets])


# ---------------------------------------------------------------- tables


def _percentiles(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.1f}" for name, value in values.items()) + " ms"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns side by side, the first to the left and the others to the right."""
    lines = [tuple(header), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = [
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    ]
    return "\n".join([shown[0], "-" * len(shown[0]), *shown[1:]])

"""How figures are shown: one object for programs, tables for people, and which targets they meet.

Left out: measuring them.
"""

import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from bench.api import ApiFigures
from bench.beside import Dashboards
from bench.hostile import MEMORY_GROWTH_MAX_BYTES, HostileFigures
from bench.live import LiveFigures
from bench.load import Load, percentiles_ms
from bench.memory import MemoryFigures
from bench.mqtt import MqttFigures, Whole
from bench.pipeline import EndToEnd, Figures
from bench.queries import WIDE, QueryFigures
from bench.reconnecting import Reconnected
from bench.singles import Single
from bench.streams import DAYS

#: The parts of the system; the load generator is none of them.
SYSTEM: Final = ("ingest", "kafka", "worker", "postgresql")
MEGABYTE: Final = 1_000_000
#: Of time or CPU, whichever is told: what is shorter shows caches that fill and code that is compiled.
ENOUGH_S: Final = 1.0


@dataclass(frozen=True)
class Target:
    """A figure that is to be reached."""

    what: str
    measured: float
    bound: float
    unit: str
    at_most: bool
    over_s: float = ENOUGH_S
    """How long it was measured."""

    @property
    def met(self) -> bool | None:
        """None where it was measured too shortly to tell."""
        if self.over_s < ENOUGH_S:
            return None
        return self.measured <= self.bound if self.at_most else self.measured >= self.bound

    @property
    def row(self) -> tuple[str, str, str, str]:
        sign = "≤" if self.at_most else "≥"
        measured, bound = (f"{value:,.2f}".rstrip("0").rstrip(".") for value in (self.measured, self.bound))
        verdict = {True: "met", False: "missed", None: "too short to tell"}[self.met]
        return self.what, f"{measured} {self.unit}".strip(), f"{sign} {bound}", verdict

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
        Target(f"ingest CPU of a {single.name}, against the bare handler", single.to_bare, 1.5, "×", True,
               single.bare_cpu_s)
        for single in figures.singles
        if single.connections == figures.options.single_connections and single.readings == 1
    ]  # fmt: skip
    rate, us = whole.load.readings / whole.committed_s, sum(cpu_us_by_part(whole).values())
    alone, alone_s = _to_copy(figures), min(figures.landing.seconds, figures.copied.seconds)
    return [
        Target("end to end until committed", rate, 250_000, "readings/s", False, whole.committed_s),
        Target("CPU of all parts", us, 6.0, "µs/reading", True, us * whole.load.readings / 1e6),
        Target("landing alone, against COPY", alone, 0.85, "×", False, alone_s),
        *singles,
        Target("single reading until it is queryable, p95", _to_row(figures.trickle_s)["p95"], 250, "ms", True),
    ]


def _to_copy(figures: Figures) -> float:
    return figures.landing.readings_per_s / figures.copied.rows_per_s


def _to_row(probed_s: Sequence[float]) -> dict[str, float]:
    return percentiles_ms(probed_s, 50, 95)


def _acknowledged(load: Load) -> dict[str, float]:
    return percentiles_ms(load.latencies_s, 50, 95, 99)


def pipeline_object(figures: Figures) -> dict[str, Any]:
    """For `--json`."""
    return {
        "machine": machine(),
        "options": vars(figures.options),
        "pipeline": _whole_object(figures),
        "landing": vars(figures.landing)
        | {"readings_per_s": figures.landing.readings_per_s, "to_copy": _to_copy(figures)},
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
        "receipt_to_row_ms": _to_row(figures.trickle_s),
        "receipt_to_commit_under_load_ms": _to_row(whole.probed_s),
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
            ("sent to queryable, idle", _percentiles(_to_row(figures.trickle_s))),
            ("sent to queryable, under this load", _percentiles(_to_row(whole.probed_s))),
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
        (f"{single.name} of {single.readings}", f"{single.connections}", f"{single.requests_per_s:,.0f}",
         f"{single.ingest_us:.1f}", f"{single.bare_us:.1f}", f"{single.to_bare:.2f}", f"{single.kafka_us:.1f}",
         f"{single.load_us:.1f}", _percentiles(percentiles_ms(single.latencies_s, 50, 95, 99)))
        for single in figures.singles
    ]  # fmt: skip
    header = ("small requests, of readings", "connections", "requests/s", "ingest µs", "bare µs", "ratio", "Kafka µs",
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


# ---------------------------------------------------------------- registry


def api_targets(figures: ApiFigures) -> list[Target]:
    p95 = {name: percentiles_ms(taken, 95)["p95"] for name, taken in figures.seconds.items()}
    slowest = max((name for name in p95 if name.startswith("list ")), key=p95.__getitem__)
    return [
        Target(f"slowest list ({slowest.removeprefix('list ')}), p95", p95[slowest], 10, "ms", at_most=True),
        Target("create a device, p95", p95["create a device"], 10, "ms", at_most=True),
        Target("get a device, p95", p95["get a device"], 3, "ms", at_most=True),
        Target("plans that read a whole table", sum(plan.scans_all for plan in figures.plans.values()), 0, "", True),
    ]


def api_object(figures: ApiFigures) -> dict[str, Any]:
    return {
        "machine": machine(),
        "registry": {
            "devices": figures.devices,
            "ms": {name: percentiles_ms(taken, 50, 95) for name, taken in figures.seconds.items()},
            "plans": {name: plan._asdict() for name, plan in figures.plans.items()},
        },
        "targets": [target.plain for target in api_targets(figures)],
    }


def api_tables(figures: ApiFigures) -> str:
    times = []
    for name, taken in figures.seconds.items():
        found = percentiles_ms(taken, 50, 95)
        times.append((name, f"{found['p50']:.1f}", f"{found['p95']:.1f}"))
    plans = [
        (name, "yes" if plan.scans_all else "no", str(plan.rows_dropped), ", ".join(plan.indexes))
        for name, plan in figures.plans.items()
    ]
    return "\n\n".join(
        [
            _table((f"among {figures.devices:,} devices", "p50 ms", "p95 ms"), times),
            _table(("plan of the list", "whole table", "rows dropped", "indexes"), plans),
            _table(("target", "measured", "wanted", ""), [target.row for target in api_targets(figures)]),
        ]
    )


# ---------------------------------------------------------------- live


def live_object(figures: LiveFigures) -> dict[str, Any]:
    return {
        "machine": machine(),
        "live": {
            "readings_per_s": figures.readings / figures.seconds,
            "delay_ms": percentiles_ms(figures.delays_s, 50, 95, 99),
            "api_cpu_share": figures.cpu_s_per_s,
            "api_cpu_share_idle": figures.idle_cpu_s_per_s,
            "api_cpu_us_per_reading": figures.cpu_s_per_s * figures.seconds * 1e6 / figures.readings,
            "api_bytes_alone": figures.alone_bytes,
            "api_bytes": figures.bytes,
        },
    }


def live_tables(figures: LiveFigures) -> str:
    found = live_object(figures)["live"]
    rows = [
        ("readings a second", f"{found['readings_per_s']:,.0f}"),
        *((f"acknowledged to told, {name}", f"{ms:.0f} ms") for name, ms in found["delay_ms"].items()),
        ("CPU of the API's process", f"{found['api_cpu_share']:.0%}"),
        ("of it while nothing comes", f"{found['api_cpu_share_idle']:.0%}"),
        ("CPU a reading", f"{found['api_cpu_us_per_reading']:.0f} µs"),
        ("memory before the first stream", f"{found['api_bytes_alone'] / 1e6:.0f} MB"),
        ("memory at the end", f"{found['api_bytes'] / 1e6:.0f} MB"),
    ]
    return _table(("streams of readings", ""), rows)


# ---------------------------------------------------------------- queries


def queries_targets(figures: QueryFigures) -> list[Target]:
    """Of what was measured. As clients see it over loopback, which is more than it takes in the server."""
    bounds = {"one series": 5, f"{WIDE} series": 25, "latest": 20}
    targets = [
        Target(f"{one.name}, p95", percentiles_ms(one.seconds, 95)["p95"], bound, "ms", True)
        for one in figures.asked
        if one.clients == 1
        for start, bound in bounds.items()
        if one.name.startswith(start)
    ]
    for cost in figures.costs:
        if cost.name.startswith("one series"):
            targets.append(Target(f"{cost.name}: CPU from raw", cost.ratio, 20, "×", False))
        elif not cost.raw_rows:
            targets.append(Target(f"{cost.name}: chunks read from the beginning", cost.scans, 0, "", True))
    if figures.stream is not None:
        rate = figures.stream.readings_per_cpu_s
        targets.append(Target("a day at one reading a second, columnar", rate, 1e6, "readings/CPU s", False))
    if figures.landing is not None:
        targets.append(Target("landing beside roll-ups, against alone", figures.landing.ratio, 0.8, "×", False))
    if (late := figures.late) is not None:
        targets.append(Target("answers that differ from raw", late.wrong, 0, "", True))
        targets.append(Target("oldest mark", late.repair_s, 60, "s", True))
    if (boards := figures.dashboards) is not None:
        p95 = percentiles_ms(boards.beside_s, 95)["p95"]
        targets.append(Target("batch of a dashboard beside ingest, p95", p95, 100, "ms", True))
        share = boards.sent_beside.readings_per_s / boards.sent_alone.readings_per_s
        targets.append(Target("ingest beside dashboards, against alone", share, 0.9, "×", False))
    return targets


def queries_object(figures: QueryFigures) -> dict[str, Any]:
    landing, late, boards, stream = figures.landing, figures.late, figures.dashboards, figures.stream
    return {
        "machine": machine(),
        "queries": {
            "scale": vars(figures.options.scale) | {"readings": figures.options.scale.readings},
            "filled": vars(figures.filled),
            "asked": [
                vars(one) | {"seconds": None, "ms": percentiles_ms(one.seconds, 50, 95, 99)} for one in figures.asked
            ],
            "costs": [
                {
                    "name": cost.name,
                    "ms": percentiles_ms(cost.seconds, 50, 95),
                    "cpu_ms": cost.cpu_s * 1e3,
                    "rows": cost.rows,
                    "scans": cost.scans,
                    "raw": None
                    if not cost.raw_rows
                    else {
                        "ms": percentiles_ms(cost.raw_seconds, 50, 95),
                        "cpu_ms": cost.raw_cpu_s * 1e3,
                        "rows": cost.raw_rows,
                    },
                }
                for cost in figures.costs
            ],
            "stream": None if stream is None else stream._asdict(),
            "landing": None if landing is None else vars(landing) | {"ratio": landing.ratio},
            "late": None if late is None else vars(late),
            "dashboards": None if boards is None else _boards_object(boards),
        },
        "targets": [target.plain for target in queries_targets(figures)],
    }


def _boards_object(boards: Dashboards) -> dict[str, Any]:
    return {
        "full_readings_per_s": boards.full_per_s,
        "alone_ms": percentiles_ms(boards.alone_s, 50, 95, 99),
        "beside_ms": percentiles_ms(boards.beside_s, 50, 95, 99),
        **{
            name: {
                "readings_per_s": sent.readings_per_s,
                "acknowledgement_ms": _to_row(sent.latencies_s),
                "behind_s": sent.behind_s,
            }
            for name, sent in (("ingest_alone", boards.sent_alone), ("ingest_beside", boards.sent_beside))
        },
    }


def queries_tables(figures: QueryFigures) -> str:
    scale, filled = figures.options.scale, figures.filled
    title = f"{scale.series:,} series, {scale.days} days, every {scale.every_s} s: {scale.readings:,} readings"
    if filled.readings:
        title += (
            f"; {filled.readings / filled.seconds:,.0f} filled a second, "
            f"{filled.readings / filled.rolled_up_s:,.0f} rolled up"
        )
    asked = [
        (one.name, str(one.clients), *(f"{ms:.1f}" for ms in percentiles_ms(one.seconds, 50, 95, 99).values()),
         f"{one.server_s * 1e3:.1f}", f"{one.api_cpu_s * 1e3:.1f}", f"{one.postgresql_cpu_s * 1e3:.1f}",
         f"{one.bytes:,}")
        for one in figures.asked
    ]  # fmt: skip
    header = ("asked by clients", "clients", "p50 ms", "p95 ms", "p99 ms", "in the API ms", "API CPU ms",
              "PostgreSQL CPU ms", "bytes")  # fmt: skip
    tables = [_table(header, asked), _costs_table(figures)] if asked else []
    tables += [_table(("beside each other", ""), rows)] if (rows := _beside_rows(figures)) else []
    targets = _table(("target", "measured", "wanted", ""), [target.row for target in queries_targets(figures)])
    return "\n\n".join([title, *tables, targets])


def _costs_table(figures: QueryFigures) -> str:
    rows = []
    for cost in figures.costs:
        found = percentiles_ms(cost.seconds, 50, 95)
        raw = ("", "", "", "")
        if cost.raw_rows:
            raw_p95 = percentiles_ms(cost.raw_seconds, 95)["p95"]
            raw = (f"{raw_p95:.1f}", f"{cost.raw_cpu_s * 1e3:.1f}", f"{cost.raw_rows:,}", f"{cost.ratio:.1f}")
        rows.append((cost.name, f"{found['p95']:.1f}", f"{cost.cpu_s * 1e3:.2f}", f"{cost.rows:,}", *raw))
    header = ("in one session", "p95 ms", "CPU ms", "rows", "raw p95 ms", "raw CPU ms", "raw rows", "raw to it")
    return _table(header, rows)


def _beside_rows(figures: QueryFigures) -> list[tuple[str, str]]:
    rows = list[tuple[str, str]]()
    if (stream := figures.stream) is not None:
        rows += [
            ("columnar stream, a day at 1 s", f"{stream.cpu_s * 1e3:.1f} ms of the API's CPU"),
            (f"its peak memory, a day and {DAYS}",
             f"{stream.peak_day_bytes / 1e6:.0f} MB, {stream.peak_days_bytes / 1e6:.0f} MB"),
        ]  # fmt: skip
    if (landing := figures.landing) is not None:
        rows += [
            ("landing alone, readings/s", _each(landing.alone_per_s)),
            ("landing beside roll-ups of as many, readings/s", _each(landing.beside_per_s)),
            (
                "CPU of landing alone and of the roll-ups",
                f"{landing.landing_us:.2f}, {landing.rollups_us:.2f} µs/reading",
            ),
            ("the roll-ups took", ", ".join(f"{seconds:.1f}" for seconds in landing.rolled_up_s) + " s"),
        ]
    if (late := figures.late) is not None:
        rows += [
            ("readings, late ones", f"{late.readings:,}, {late.late:,}"),
            ("series compared with raw, wrong", f"{late.compared:,}, {late.wrong}"),
            ("moments with marks, marks at most, oldest", f"{late.dirty}, {late.marks}, {late.repair_s:.1f} s"),
        ]
    if (boards := figures.dashboards) is not None:
        rows += [
            ("batches of dashboards alone", _percentiles(percentiles_ms(boards.alone_s, 50, 95, 99))),
            ("batches beside ingest", _percentiles(percentiles_ms(boards.beside_s, 50, 95, 99))),
            ("ingest at its full rate, readings/s", f"{boards.full_per_s:,.0f}"),
        ]
        for name, sent in (("alone", boards.sent_alone), ("beside dashboards", boards.sent_beside)):
            taken = (
                f"{sent.readings_per_s:,.0f} readings/s, acknowledged in {_percentiles(_to_row(sent.latencies_s))}"
            )
            rows.append((f"a quarter of it {name}", f"{taken}, landed {sent.behind_s:.1f} s after"))
    return rows


def _each(values: Sequence[float]) -> str:
    return ", ".join(f"{value:,.0f}" for value in values)


# ---------------------------------------------------------------- hostile


def hostile_targets(figures: HostileFigures) -> list[Target]:
    faults = sum(figures.faults.values()) + len(figures.tally.dishonest) + figures.failures_logged
    growth = figures.memory_growth_bytes / MEGABYTE
    return [
        Target("answers and log lines that are faults of ours", faults, 0, "", at_most=True),
        Target("memory growth", growth, MEMORY_GROWTH_MAX_BYTES / MEGABYTE, "MB", at_most=True),
    ]


def hostile_object(figures: HostileFigures) -> dict[str, Any]:
    return {
        "machine": machine(),
        "hostile": {
            "requests": figures.options.requests,
            "attackers": figures.options.attackers,
            "seed": figures.options.seed,
            "seconds": figures.seconds,
            "statuses": {str(status): count for status, count in sorted(figures.tally.statuses.items())},
            "codes_503": dict(figures.tally.codes_503),
            "silent": figures.tally.silent,
            "good_sent": figures.good_sent,
            "good_latencies_ms": dict(figures.good_latencies_ms),
            "memory_before_bytes": figures.memory_before_bytes,
            "memory_after_bytes": figures.memory_after_bytes,
            "failures": figures.failures,
        },
        "targets": [target.plain for target in hostile_targets(figures)],
    }


def hostile_tables(figures: HostileFigures) -> str:
    statuses = [(str(status), f"{count:,}") for status, count in sorted(figures.tally.statuses.items())]
    rows = [*statuses, ("no answer", f"{figures.tally.silent:,}")]
    good = f"good devices: {figures.good_sent:,} readings, all stored; answered in "
    targets = _table(("target", "measured", "wanted", ""), [target.row for target in hostile_targets(figures)])
    return "\n\n".join(
        [
            _table(("answers", "requests"), rows),
            good + _percentiles(figures.good_latencies_ms),
            *([f"503: {dict(figures.tally.codes_503)}"] if figures.tally.codes_503 else []),
            targets,
            *figures.failures,
        ]
    )


# ---------------------------------------------------------------- MQTT

#: Of the bridge's way; the broker is not ours, and is told beside it.
BRIDGED: Final = ("bridge", "kafka", "worker", "postgresql")


def mqtt_targets(figures: MqttFigures) -> list[Target]:
    drained = [
        target
        for one in figures.drained
        for target in (
            Target(f"messages of {one.name}, one bridge", one.messages_per_s, 12_000, "messages/s", False,
                   one.messages / one.messages_per_s),
            Target("the bridge's CPU for it", one.bridge_us, 45, "µs/message", True,
                   one.bridge_us * one.messages / 1e6),
        )
    ]  # fmt: skip
    soon = figures.queryable
    latency = Target(
        "publish → queryable at half load, p95", _to_row(soon.seconds)["p95"], 300, "ms", True, sum(soon.seconds)
    )
    back = [] if figures.reconnected is None else _back(figures.reconnected)
    batches = figures.whole[-1]
    rate = batches.readings / batches.committed_s
    what = f"{batches.readings_per_message} readings a message, end to end"
    whole = Target(what, rate, 200_000, "readings/s", at_most=False, over_s=batches.committed_s)
    return [*drained, whole, latency, *back]


def _back(fleet: Reconnected) -> list[Target]:
    back_s = math.inf if fleet.back_s is None else fleet.back_s
    name = f"{fleet.plants:,} plants with certificates"
    return [
        Target(f"{name}, all back after the broker's restart", back_s, 60, "s", at_most=True),
        Target("what the broker acknowledged and nobody has", fleet.lost, 0, "readings", at_most=True),
    ]


def mqtt_object(figures: MqttFigures) -> dict[str, Any]:
    """For `--json`."""
    return {
        "machine": machine(),
        "options": vars(figures.options),
        "mqtt": {
            "drained": [vars(one) for one in figures.drained],
            "end_to_end": [_whole_mqtt(one) for one in figures.whole],
            "queryable": {
                "messages_per_s": figures.queryable.messages_per_s,
                "probed": len(figures.queryable.seconds),
                "ms": _to_row(figures.queryable.seconds),
            },
            "reconnected": figures.reconnected and vars(figures.reconnected) | {"lost": figures.reconnected.lost},
            "repeated_messages": figures.again,
        },
        "targets": [target.plain for target in mqtt_targets(figures)],
    }


def _whole_mqtt(whole: Whole) -> dict[str, Any]:
    return {
        "readings_per_message": whole.readings_per_message,
        "messages": whole.messages,
        "published_per_s": whole.publishing.messages / whole.publishing.seconds,
        "committed_messages_per_s": whole.messages / whole.committed_s,
        "committed_readings_per_s": whole.readings / whole.committed_s,
        "cpu_us_per_message": {part: seconds * 1e6 / whole.messages for part, seconds in whole.cpu_s.items()},
        "cpu_us_per_reading": sum(whole.cpu_s[part] for part in BRIDGED) * 1e6 / whole.readings,
        "bridge_peak_mb": whole.bridge_peak_bytes / MEGABYTE,
    }


def mqtt_tables(figures: MqttFigures) -> str:
    options = figures.options
    title = (
        f"{options.messages:,} messages a turn, {options.devices:,} devices, one bridge, {os.cpu_count()} cores; "
        f"{figures.again:,} messages repeated by the broker"
    )
    drained = _table(
        ("kept by the broker, then taken", "messages/s", "bridge µs", "broker µs", "Kafka µs"),
        [
            (
                one.name,
                f"{one.messages_per_s:,.0f}",
                f"{one.bridge_us:.1f}",
                f"{one.broker_us:.1f}",
                f"{one.kafka_us:.1f}",
            )
            for one in figures.drained
        ],
    )
    parts = ("bridge", "broker", "kafka", "worker", "postgresql", "load", "others")
    whole = _table(
        ("end to end", *(f"{one.readings_per_message} a message" for one in figures.whole)),
        [
            ("messages", *(f"{one.messages:,}" for one in figures.whole)),
            ("messages/s published", *(f"{one.messages / one.publishing.seconds:,.0f}" for one in figures.whole)),
            ("messages/s until committed", *(f"{one.messages / one.committed_s:,.0f}" for one in figures.whole)),
            ("readings/s until committed", *(f"{one.readings / one.committed_s:,.0f}" for one in figures.whole)),
            *[
                (f"{part}, µs a message", *(f"{one.cpu_s[part] * 1e6 / one.messages:.1f}" for one in figures.whole))
                for part in parts
            ],
            ("memory of the bridge, peak", *(f"{one.bridge_peak_bytes / MEGABYTE:.0f} MB" for one in figures.whole)),
        ],
    )
    soon = figures.queryable
    half = _table(
        (f"published to queryable, beside {soon.messages_per_s:,.0f} messages/s", ""),
        [(f"{len(soon.seconds):,} readings", _percentiles(_to_row(soon.seconds)))],
    )
    back = [] if figures.reconnected is None else [_reconnected(figures.reconnected)]
    targets = _table(("target", "measured", "wanted", ""), [target.row for target in mqtt_targets(figures)])
    return "\n\n".join([title, drained, whole, half, *back, targets])


def _reconnected(fleet: Reconnected) -> str:
    return _table(
        (f"{fleet.plants:,} plants with certificates, their broker restarted", ""),
        [
            ("made and provisioned, over HTTP", f"{fleet.provisioned_s:.1f} s"),
            ("all connected, the first time", f"{fleet.connected_s:.1f} s"),
            ("all back, from the broker's start", _seconds(fleet.back_s)),
            ("a reading committed again, from then", _seconds(fleet.flowed_s)),
            ("acknowledged by the broker, sent again", f"{fleet.acknowledged:,}, {fleet.redelivered:,}"),
            ("stored, waiting at the end", f"{fleet.stored:,}, {fleet.waiting:,}"),
            ("connections that failed or broke", f"{fleet.failures:,}"),
            ("the fleet's CPU a connection", f"{fleet.cpu_ms_a_connection:.1f} ms"),
            ("its CPU while nothing is said", f"{fleet.idle_cpu_share:.2f} of a core"),
            ("its memory", f"{fleet.kilobytes_a_plant:.0f} kB a plant"),
        ],
    )


def _seconds(seconds: float | None) -> str:
    return "never" if seconds is None else f"{seconds:.1f} s"


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

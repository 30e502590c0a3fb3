"""What a dashboard is made of, and its JSON (Grafana's model, schema version 38: 10.0 and later).

Left out: which dashboards there are (`deploy.grafana.declared`).
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

PLACE: Final = Path(__file__).with_name("dashboards")
#: As deploy/grafana/provisioning/datasources names them.
PROMETHEUS: Final = {"type": "prometheus", "uid": "sluice-prometheus"}
POSTGRESQL: Final = {"type": "postgres", "uid": "sluice-postgresql"}

_SCHEMA_VERSION: Final = 38
_COLUMNS: Final = 24
_HEIGHTS: Final = {"timeseries": 8, "table": 8, "stat": 4}
_WIDTHS: Final = {"timeseries": 12, "table": 12, "stat": 4}

Kind = Literal["timeseries", "table", "stat"]


@dataclass(frozen=True)
class Prom:
    """A query in PromQL; `legend` names its series by their labels."""

    expr: str
    legend: str = ""

    def target(self, kind: Kind, ref: str) -> dict[str, Any]:
        instant = kind != "timeseries"
        return {
            "refId": ref,
            "datasource": PROMETHEUS,
            "expr": self.expr,
            "legendFormat": self.legend,
            "instant": instant,
            "range": not instant,
        }


@dataclass(frozen=True)
class Sql:
    """A query in SQL on the views of `dashboards`."""

    text: str

    def target(self, kind: Kind, ref: str) -> dict[str, Any]:
        return {
            "refId": ref,
            "datasource": POSTGRESQL,
            "format": "time_series" if kind == "timeseries" else "table",
            "rawQuery": True,
            "rawSql": " ".join(self.text.split()),
        }


@dataclass(frozen=True)
class Panel:
    """One panel; `unit` is one of Grafana's ids of units."""

    kind: Kind
    title: str
    queries: tuple[Prom | Sql, ...]
    unit: str = "short"
    what: str = ""

    def rendered(self, number: int, x: int, y: int) -> dict[str, Any]:
        return {
            "id": number,
            "type": self.kind,
            "title": self.title,
            "description": self.what,
            "datasource": PROMETHEUS if isinstance(self.queries[0], Prom) else POSTGRESQL,
            "gridPos": {"h": _HEIGHTS[self.kind], "w": _WIDTHS[self.kind], "x": x, "y": y},
            "fieldConfig": {
                "defaults": {"unit": self.unit, "min": 0} if self.unit != "short" else {},
                "overrides": [],
            },
            "options": _OPTIONS[self.kind],
            "targets": [query.target(self.kind, chr(ord("A") + place)) for place, query in enumerate(self.queries)],
        }


_OPTIONS: Final[dict[Kind, dict[str, Any]]] = {
    "timeseries": {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "table": {"showHeader": True},
    "stat": {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}, "graphMode": "none"},
}


def chart(title: str, *queries: Prom | Sql, unit: str = "short", what: str = "") -> Panel:
    return Panel("timeseries", title, queries, unit, what)


def stat(title: str, query: Prom | Sql, unit: str = "short", what: str = "") -> Panel:
    return Panel("stat", title, (query,), unit, what)


def table(title: str, query: Prom | Sql, what: str = "") -> Panel:
    return Panel("table", title, (query,), "short", what)


@dataclass(frozen=True)
class Variable:
    """A choice at the top of a dashboard: rows of `text`, as __value and __text where what is shown is another."""

    name: str
    label: str
    text: str
    several: bool = True

    def rendered(self) -> dict[str, Any]:
        return {
            "type": "query",
            "name": self.name,
            "label": self.label,
            "datasource": POSTGRESQL,
            "query": self.text,
            "definition": self.text,
            "multi": self.several,
            "includeAll": self.several,
            "refresh": 2,
            "sort": 1,
            "current": {"selected": True, "text": ["All"], "value": ["$__all"]} if self.several else {},
        }


@dataclass(frozen=True)
class Dashboard:
    """`name` is its file's and, behind `sluice-`, its uid."""

    name: str
    title: str
    panels: Sequence[Panel]
    variables: Sequence[Variable] = ()
    since: str = "now-3h"
    tags: Sequence[str] = ("sluice", "operators")


def rendered(dashboard: Dashboard) -> str:
    """The JSON that Grafana loads."""
    content = {
        "uid": f"sluice-{dashboard.name}",
        "title": dashboard.title,
        "tags": list(dashboard.tags),
        "timezone": "browser",
        "schemaVersion": _SCHEMA_VERSION,
        "version": 1,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": dashboard.since, "to": "now"},
        "annotations": {"list": []},
        "links": [],
        "templating": {"list": [variable.rendered() for variable in dashboard.variables]},
        "panels": [
            panel.rendered(number, x, y) for number, (panel, x, y) in enumerate(_laid_out(dashboard.panels), 1)
        ],
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _laid_out(panels: Sequence[Panel]) -> Iterator[tuple[Panel, int, int]]:
    """From left to right, in rows of panels of one height."""
    x = y = height = 0
    for panel in panels:
        if x + _WIDTHS[panel.kind] > _COLUMNS or (x and _HEIGHTS[panel.kind] != height):
            x, y = 0, y + height
        height = _HEIGHTS[panel.kind]
        yield panel, x, y
        x += _WIDTHS[panel.kind]

"""The dashboards as Grafana is given them: the schema of its model as far as they use it, and the queries in them.

Grafana itself is not here: a field that it does not know, or one that it needs and is missing, is found by the schema
(dashboard kind of Grafana 10, schema version 38); that a query gives data, by asking it.
"""

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Final, Literal

import msgspec

from tests.conftest import CHECKOUT

DIRECTORY: Final = CHECKOUT / "deploy" / "grafana"
FILES: Final = sorted((DIRECTORY / "dashboards").glob("*.json"))

Name = Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9-]{0,39}$")]
Text = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
Ref = Annotated[str, msgspec.Meta(pattern="^[A-Z]$")]
#: The ids of Grafana's units that are used.
Unit = Literal["s", "bytes", "Bps", "cps", "reqps", "percentunit"]


class Strict(msgspec.Struct, forbid_unknown_fields=True):
    """No field but these."""


class DataSource(Strict):
    type: Literal["prometheus", "postgres"]
    uid: Literal["sluice-prometheus", "sluice-postgresql"]


class Target(Strict):
    ref: Ref = msgspec.field(name="refId")
    datasource: DataSource
    expr: str | None = None
    legend: str | None = msgspec.field(name="legendFormat", default=None)
    instant: bool | None = None
    range: bool | None = None
    format: Literal["time_series", "table"] | None = None
    raw: bool | None = msgspec.field(name="rawQuery", default=None)
    sql: str | None = msgspec.field(name="rawSql", default=None)


class GridPos(Strict):
    h: Annotated[int, msgspec.Meta(ge=1)]
    w: Annotated[int, msgspec.Meta(ge=1, le=24)]
    x: Annotated[int, msgspec.Meta(ge=0, lt=24)]
    y: Annotated[int, msgspec.Meta(ge=0)]


class Defaults(Strict):
    unit: Unit | None = None
    min: int | None = None


class FieldConfig(Strict):
    defaults: Defaults
    overrides: Annotated[list[Any], msgspec.Meta(max_length=0)]


class Legend(Strict):
    mode: Literal["list", "table", "hidden"] = msgspec.field(name="displayMode")
    placement: Literal["bottom", "right"]
    shown: bool = msgspec.field(name="showLegend")
    calcs: list[str]


class Tooltip(Strict):
    mode: Literal["single", "multi", "none"]
    sort: Literal["none", "asc", "desc"]


class Reduce(Strict):
    calcs: list[Literal["lastNotNull"]]
    fields: str
    values: bool


class Options(Strict):
    legend: Legend | None = None
    tooltip: Tooltip | None = None
    header: bool | None = msgspec.field(name="showHeader", default=None)
    reduce: Reduce | None = msgspec.field(name="reduceOptions", default=None)
    graph: Literal["none", "area"] | None = msgspec.field(name="graphMode", default=None)


class Panel(Strict):
    id: Annotated[int, msgspec.Meta(ge=1)]
    type: Literal["timeseries", "stat", "table"]
    title: Text
    description: str
    datasource: DataSource
    place: GridPos = msgspec.field(name="gridPos")
    fields: FieldConfig = msgspec.field(name="fieldConfig")
    options: Options
    targets: Annotated[list[Target], msgspec.Meta(min_length=1)]


class Current(Strict):
    selected: bool | None = None
    text: list[str] | None = None
    value: list[str] | None = None


class Variable(Strict):
    type: Literal["query"]
    name: Annotated[str, msgspec.Meta(pattern="^[a-z]+$")]
    label: Text
    datasource: DataSource
    query: Text
    definition: Text
    several: bool = msgspec.field(name="multi")
    all: bool = msgspec.field(name="includeAll")
    refresh: Literal[0, 1, 2]
    sort: Annotated[int, msgspec.Meta(ge=0, le=8)]
    current: Current


class Templating(Strict):
    list: list[Variable]


class Annotations(Strict):
    list: Annotated[list[Any], msgspec.Meta(max_length=0)]


class Span(Strict):
    since: Annotated[str, msgspec.Meta(pattern=r"^now-\d+[mhd]$")] = msgspec.field(name="from")
    until: Literal["now"] = msgspec.field(name="to")


class Dashboard(Strict):
    uid: Name
    title: Text
    tags: list[Name]
    timezone: Literal["browser", "utc"]
    schema_version: Literal[38] = msgspec.field(name="schemaVersion")
    version: int
    editable: bool
    tooltip: Literal[0, 1, 2] = msgspec.field(name="graphTooltip")
    refresh: Annotated[str, msgspec.Meta(pattern=r"^\d+[smh]$")]
    time: Span
    annotations: Annotations
    links: Annotated[list[Any], msgspec.Meta(max_length=0)]
    templating: Templating
    panels: Annotated[list[Panel], msgspec.Meta(min_length=1)]


def dashboards() -> dict[str, Dashboard]:
    """Every file's dashboard by its name. Raises `msgspec.ValidationError` naming the field that does not fit."""
    return {path.stem: msgspec.json.decode(path.read_bytes(), type=Dashboard) for path in FILES}


def targets(kind: Literal["prometheus", "postgres"]) -> list[tuple[Dashboard, Panel, Target]]:
    return [
        (dashboard, panel, target)
        for dashboard in dashboards().values()
        for panel in dashboard.panels
        for target in panel.targets
        if target.datasource.type == kind
    ]


# ---------------------------------------------------------------- what Grafana makes of a query


def promql(expr: str, rate_interval: str) -> str:
    return expr.replace("$__rate_interval", rate_interval)


def sql(text: str, variables: Mapping[str, list[str]], since: datetime, until: datetime, interval_s: int) -> str:
    """The query with macros and variables as the plugin for PostgreSQL and the format `sqlstring` put them."""
    text = re.sub(
        r"\$__timeFilter\((\w+)\)",
        lambda found: f"{found[1]} BETWEEN '{since.isoformat()}' AND '{until.isoformat()}'",
        text,
    )
    text = re.sub(
        r"\$__timeGroupAlias\((\w+), \$__interval\)",
        lambda found: f'floor(extract(epoch from {found[1]})/{interval_s})*{interval_s} AS "time"',
        text,
    )
    return re.sub(
        r"\$\{(\w+):sqlstring\}",
        lambda found: ",".join("'" + value.replace("'", "''") + "'" for value in variables[found[1]]),
        text,
    )

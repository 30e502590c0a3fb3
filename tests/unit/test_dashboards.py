"""The files for Grafana: what they are made of fits its model, and each other. Their queries: `tests/system`."""

import re
from itertools import combinations
from typing import Any

import pytest
import yaml

from deploy.dashboards import CONNECTIONS_MAX, verifier
from deploy.grafana.declared import DASHBOARDS
from deploy.grafana.panels import PLACE, rendered
from tests.grafana import DIRECTORY, FILES, GridPos, dashboards, targets
from tests.prometheus import unknown_metrics

WANTED = {"ingest", "landing", "log", "store", "api", "fleet", "processes", "readings"}


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.name)
def test_a_file_is_what_is_declared(dashboard: Any) -> None:
    """`python -m deploy.grafana` writes them."""
    assert (PLACE / f"{dashboard.name}.json").read_text() == rendered(dashboard)


def test_there_is_one_file_for_each_and_it_fits_the_model() -> None:
    found = dashboards()
    assert found.keys() == WANTED == {path.stem for path in FILES} == {one.name for one in DASHBOARDS}
    assert len({one.uid for one in found.values()}) == len({one.title for one in found.values()}) == len(found)
    for one in found.values():
        assert len({panel.id for panel in one.panels}) == len(one.panels)
        assert len({panel.title for panel in one.panels}) == len(one.panels), one.uid
        for panel in one.panels:
            assert len({target.ref for target in panel.targets}) == len(panel.targets)
            assert all(target.datasource == panel.datasource for target in panel.targets)


def overlap(one: GridPos, other: GridPos) -> bool:
    beside = one.x + one.w <= other.x or other.x + other.w <= one.x
    above = one.y + one.h <= other.y or other.y + other.h <= one.y
    return not beside and not above


def test_no_panel_lies_over_another() -> None:
    for dashboard in dashboards().values():
        places = [panel.place for panel in dashboard.panels]
        assert all(place.x + place.w <= 24 for place in places)
        assert not any(overlap(one, other) for one, other in combinations(places, 2)), dashboard.uid


def test_a_query_is_of_its_data_source_s_kind() -> None:
    for _, panel, target in targets("prometheus"):
        assert target.expr
        assert target.sql is None
        assert not unknown_metrics(target.expr), panel.title
        assert target.range == (panel.type == "timeseries") != target.instant
    for dashboard, panel, target in targets("postgres"):
        assert target.sql
        assert target.expr is None
        assert target.format == ("time_series" if panel.type == "timeseries" else "table")
        chosen = set(re.findall(r"\$\{(\w+)", target.sql))
        assert chosen <= {variable.name for variable in dashboard.templating.list}
        # A variable's value is text that a viewer may choose: only ever as a quoted string.
        assert not re.search(r"\$(?!__|\{\w+:sqlstring\})", target.sql)
        assert set(re.findall(r"(?:FROM|JOIN) (\S+)", target.sql)) <= {
            f"dashboards.{view}" for view in ("devices", "sites", "stays", "readings", "text_readings", "latest")
        }


def test_data_sources_are_those_that_dashboards_name() -> None:
    content = yaml.safe_load((DIRECTORY / "provisioning" / "datasources" / "sluice.yml").read_text())
    assert content["apiVersion"] == 1
    found = {(source["type"], source["uid"]): source for source in content["datasources"]}
    used = {
        (panel.datasource.type, panel.datasource.uid)
        for dashboard in dashboards().values()
        for panel in dashboard.panels
    }
    assert found.keys() == used
    postgres = found["postgres", "sluice-postgresql"]
    assert postgres["secureJsonData"]["password"].startswith("$")
    assert postgres["jsonData"]["maxOpenConns"] <= CONNECTIONS_MAX
    (provider,) = yaml.safe_load((DIRECTORY / "provisioning" / "dashboards" / "sluice.yml").read_text())["providers"]
    assert provider["type"] == "file"


def test_a_password_is_told_the_server_as_it_keeps_it() -> None:
    one, other = verifier("secret"), verifier("secret")
    assert re.fullmatch(r"SCRAM-SHA-256\$4096:[\w+/=]{24}\$[\w+/=]{44}:[\w+/=]{44}", one)
    assert one != other
    assert "secret" not in one

"""Write every dashboard's JSON beside its declaration."""

from deploy.grafana.declared import DASHBOARDS
from deploy.grafana.panels import PLACE, rendered

for dashboard in DASHBOARDS:
    (PLACE / f"{dashboard.name}.json").write_text(rendered(dashboard), encoding="utf-8")

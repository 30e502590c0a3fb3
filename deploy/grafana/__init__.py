"""Grafana's dashboards, declared in Python; `python -m deploy.grafana` writes the JSON that Grafana loads."""

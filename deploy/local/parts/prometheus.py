"""Prometheus' programs, from the distribution's packages. No part to be started: nothing needs it."""

from .packages import need

PROGRAMS = ("prometheus", "promtool")


def program(name: str) -> str:
    """The path of one of `PROGRAMS`, installed if it is missing."""
    return need(name, ["prometheus"], service="prometheus")

"""Changes that are made to the version their maker has seen (`If-Match`), or not at all."""

from collections.abc import Sequence

from api.http.problems import STALE, Problem


def check_version(version: int, expected: Sequence[str] | None) -> None:
    """Raises the problem of a thing that has another version than those expected; None expects any."""
    if expected is not None and str(version) not in expected:
        raise Problem(STALE)

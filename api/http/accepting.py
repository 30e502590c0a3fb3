"""What a client would rather have: `Accept` and `Accept-Encoding` with their weights (RFC 9110, 12.4 and 12.5)."""

import re
from collections.abc import Mapping, Sequence
from typing import Final

_WEIGHT: Final = re.compile(r"\s*q\s*=\s*(0(?:\.\d{0,3})?|1(?:\.0{0,3})?)\s*", re.ASCII | re.IGNORECASE)


def weights(header: str) -> dict[str, float]:
    """What the header names, in lower case and without parameters, in its order; without a weight it has 1.

    What is not well-formed is not there.
    """
    found: dict[str, float] = {}
    for item in header.split(","):
        name, *parameters = item.split(";")
        named = [one for one in parameters if one.strip()[:1] in {"q", "Q"}]
        weight = _WEIGHT.fullmatch(named[0]) if named else None
        if name.strip() and (weight or not named):
            found[name.strip().lower()] = float(weight[1]) if weight else 1.0
    return found


def best_type(header: str, offered: Sequence[str]) -> str | None:
    """The media type that the header wants most; the first one offered if it wants nothing, None if none is wanted.

    Of equals, a type that is named goes before one of a range, and then what the header names first.
    """
    wanted = weights(header)
    if not wanted:
        return offered[0]
    ranks = {one: _rank(one, wanted) for one in offered}
    best = max(offered, key=lambda one: ranks[one])
    return best if ranks[best][0] > 0 else None


def _rank(kind: str, wanted: Mapping[str, float]) -> tuple[float, int, int]:
    """Weight, exactness and place of the range that fits best."""
    order = list(wanted)
    for exactness, name in ((2, kind), (1, f"{kind.partition('/')[0]}/*"), (0, "*/*")):
        if name in wanted:
            return wanted[name], exactness, -order.index(name)
    return 0.0, 0, 0


def best_encoding(header: str, offered: Sequence[str]) -> str | None:
    """The encoding that the header wants most, of equals the first one offered; None for none at all."""
    wanted = weights(header)
    allowed = {one: wanted.get(one, wanted.get("*", 0.0)) for one in offered}
    best = max(offered, key=lambda one: allowed[one])
    return best if allowed[best] > 0 and allowed[best] >= wanted.get("identity", 0.0) else None

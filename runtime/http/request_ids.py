"""What a request is known by: its client's own `X-Request-Id` where that is a good one, else an id of ours.

It stands in the answer, in log lines and in records. Left out: how ours are made (the faces).
"""

import re
from typing import Final

from multidict import istr

from runtime.secrets import without_secrets

# A name that knows its hash is found in half the time.
REQUEST_ID: Final = istr("X-Request-Id")
#: UUIDs, ULIDs and trace ids fit; nothing that a log, a URL or a table would have to quote.
_GOOD: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:+/=-]{0,63}")


def taken(sent: str) -> str | None:
    """The id of a request that its client sent this one with; None where it is none, or looks like a token."""
    return sent if _GOOD.fullmatch(sent) is not None and without_secrets(sent) == sent else None

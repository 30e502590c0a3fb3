"""What stands in `ETag` of answers about readings: another version whenever what was measured may be told otherwise.

A version is made of marks and positions, before anything is read. It covers what was measured and no more: how a
page's cursor is spelt, how fresh an answer is and whether roll-ups or readings told of it may change while every
value stays. So tags are weak: two answers of one version are as good as each other, not the same to the byte.
"""

from dataclasses import replace
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Any, Final

import msgspec

from api.http.operations import Reply, unchanged
from api.readings.series import Found

#: Buckets of 200 years reach no end of the calendar from here.
LATEST: Final = datetime(9000, 1, 1, tzinfo=UTC)
_VERSION: Final = "SELECT readings_version($1, $2)"
_DIGEST_BYTES: Final = 16


async def version_of(connection: Any, found: Found, asked: tuple[Any, ...], end: datetime | None) -> str:
    """Of the answer to `asked` about readings before `end`."""
    changes = await connection.fetchval(_VERSION, list(found.series), end or LATEST)
    content = msgspec.msgpack.encode((asked, found.series, found.spans, found.removed_at, changes))
    return blake2b(content, digest_size=_DIGEST_BYTES).hexdigest()


def versioned(reply: Reply[Any], version: str) -> Reply[Any]:
    """The same answer under its tag."""
    return replace(reply, version=version, is_weak=True)


def known(version: str) -> Reply[Any]:
    """The answer to whom it is known."""
    return replace(unchanged(version), is_weak=True)

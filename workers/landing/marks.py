"""Marks for the roll-ups: where a landing stores readings behind what they have closed.

A landing asks how far that is in a statement of its own, after its transaction has its id: either it sees that time
and leaves its marks, or it is older than the time and the roll-ups wait for it. The same statement tells what may not
be stored any more, and retention waits alike. Left out: what the marks lead to
(`workers.rollups`).
"""

import struct
from itertools import pairwise
from typing import Any, Final

from workers.landing.columns import Runs
from workers.landing.plan import Plan

CLOSING: Final = "SELECT s.closing_through, e.epoch FROM rollup_state s, tombstone_epoch e"

_BUCKET_US: Final = 300_000_000
_LATEST: Final = 2**63 - 1
_FIRST: Final = struct.Struct(">q").unpack_from

#: Marks of what `found` (series_id, ts) has before `closing`: buckets up to an hour apart share one, within a day.
LEAVE: Final = """
INSERT INTO rollup_marks (series_id, first_bucket, last_bucket)
SELECT series_id, min(bucket), max(bucket)
FROM (SELECT series_id, bucket, day, count(*) FILTER (WHERE is_apart) OVER same AS island
      FROM (SELECT series_id, bucket, day, bucket - lag(bucket) OVER same > interval '1 hour' AS is_apart
            FROM (SELECT DISTINCT series_id, bucket_of('5 minutes', ts) AS bucket, bucket_of('1 day', ts) AS day
                  FROM {found} WHERE ts < {closing}) AS touched
            WINDOW same AS (PARTITION BY series_id, day ORDER BY bucket)) AS spaced
      WINDOW same AS (PARTITION BY series_id, day ORDER BY bucket)) AS islands
GROUP BY series_id, day, island"""

_STORED: Final = """(SELECT * FROM unnest($1::int[], $2::timestamptz[]) AS fresh (series_id, ts)
UNION ALL SELECT series_id, ts FROM landing_readings_stored) AS stored"""
_LEAVE: Final = LEAVE.format(found=_STORED, closing="$3")


async def leave(connection: Any, plan: Plan, closing: int) -> None:
    """Within the landing's transaction, once its readings are written; `closing` is what `CLOSING` gave in it."""
    texts = [text for text in plan.texts if text.ts < closing]
    if texts or min(_oldest(plan.fresh), _oldest(plan.suspects)) < closing:
        series_ids, late = _late(plan.fresh, closing)
        # Texts have no roll-ups, but answers with them have versions, which follow the marks.
        series_ids += [text.series_id for text in texts]
        late += [text.ts for text in texts]
        await connection.execute(_LEAVE, series_ids, late, closing)


def _oldest(runs: Runs) -> int:
    """The least time of runs that ascend."""
    oldest: int = min(map(_FIRST, runs.times), default=(_LATEST,))[0]
    return oldest


def _late(runs: Runs, closing: int) -> tuple[list[int], list[int]]:
    """Series and times before `closing`, at least one of each bucket."""
    series_ids: list[int] = []
    late: list[int] = []
    for series_id, run in zip(runs.series_ids, runs.times, strict=True):
        if _FIRST(run)[0] < closing:
            times = [time for time in struct.unpack(f">{len(run) // 8}q", run) if time < closing]
            heads = [
                times[0],
                *(time for before, time in pairwise(times) if before // _BUCKET_US != time // _BUCKET_US),
            ]
            series_ids += [series_id] * len(heads)
            late += heads
    return series_ids, late

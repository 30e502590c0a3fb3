"""The books' columns: what became of readings, counted per organisation, hour of receipt, source and partition."""

from typing import Final

#: Together they are what was received.
FATES: Final = ("stored", "duplicates", "conflicts", "quarantined", "erased")
#: What became later of the quarantined, or of what was stored; and what came with a device of another organisation.
LATER: Final = ("replayed", "discarded", "expired", "lost", "handed_over", "taken_over")
COLUMNS: Final = ("received", *FATES, *LATER)
#: Records that nobody has any more, so that nobody can tell whose they were.
LOST_RECORDS: Final = """
SELECT (SELECT coalesce(sum(lost), 0) FROM log_positions)::bigint AS log,
       (SELECT coalesce(sum(end_sequence - first_sequence), 0) FROM spool_losses)::bigint AS spool
"""
SUMS: Final = ", ".join(f"coalesce(sum({column}), 0)::bigint AS {column}" for column in COLUMNS)

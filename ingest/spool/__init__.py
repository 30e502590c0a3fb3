"""The spool: records that are acknowledged while the log cannot be reached, on their way to it."""

"""Readings as they land: one follower of the log a process, and whoever listens to it."""

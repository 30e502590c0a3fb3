"""What is told of a request that the database did not answer. Left out: who is told (`api.http.edge`, batches)."""

import asyncpg

from api.http.problems import DATABASE_UNAVAILABLE, OVERLOADED, QUERY_TIMEOUT, Problem, unavailable
from runtime.postgres import UNAVAILABLE


def failure_of(error: Exception) -> Problem | None:
    """None for what is no doing of the client's nor of the database's state."""
    if isinstance(error, asyncpg.QueryCanceledError):
        return unavailable(QUERY_TIMEOUT, "the query took too long: ask for less")
    if isinstance(error, asyncpg.DeadlockDetectedError):
        return unavailable(OVERLOADED, "it met another request: try again")
    if isinstance(error, UNAVAILABLE):
        return unavailable(DATABASE_UNAVAILABLE, "the database is away: try again")
    return None

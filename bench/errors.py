"""The one error of a benchmark: it could not be run, or what it measured does not hold."""

from runtime.errors import SluiceError


class BenchError(SluiceError):
    """No figure is reported: the message says what went wrong."""

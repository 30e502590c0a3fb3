"""The one error that a person at the terminal is meant to read."""


class ServicesError(Exception):
    """Something that the person who called has to remedy; the message says what."""

"""Errors that tell the caller what to do: mend the call, slow down, retry later, or treat it as open."""


class SluiceError(Exception):
    """The base of every error that a caller is meant to tell apart."""


class ConfigurationError(SluiceError):
    """The start is refused: the message names the setting or the command that resolves it."""


class MissingSettingError(ConfigurationError):
    """A setting without a default is not set."""


class OverloadedError(SluiceError):
    """A bounded queue is full and nothing was done: slow down, then try again."""


class UnavailableError(SluiceError):
    """A part cannot be reached and certainly nothing was written: try again later."""


class OutcomeUnknownError(SluiceError):
    """It may have been written or not: never report success, and repeat only what may be repeated."""

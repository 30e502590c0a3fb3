"""Logs: one line an event, JSON for machines or text for people, without a token in any of it.

Left out: what is worth an event. Things that happen per reading are counted (`runtime.metrics`), not logged.
"""

import json
import logging
import re
import sys
import traceback
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, TextIO

import orjson

from runtime.characters import shown
from runtime.errors import ConfigurationError
from runtime.settings import setting


@dataclass(frozen=True, kw_only=True)
class LoggingSettings:
    """How events are written to standard error."""

    log_format: str = setting("text", why="json for a collector of logs, text for a person")
    log_level: str = setting("info", why="debug, info, warning or error: the least that is written")


LEVELS: Final = ("debug", "info", "warning", "error")
FORMATS: Final = ("json", "text")

#: Last line of defence: what looks like a secret is masked wherever it came from. Nothing is meant to rely on it.
_SECRETS: Final = (
    # Without a boundary before it: in a percent-encoded URL a digit may stand there.
    (re.compile(r"(ds|gw|sk|rt|iv|pr|dr)_live_[0-9A-Za-z_]+", re.IGNORECASE), r"\1_live_…"),
    (re.compile(r"eyJ[\w-]+\.[\w-]+\.[\w-]+"), "JWT…"),
    (re.compile(r"\b(bearer|basic)(\s+|%20)[^\s\"',;\\]{8,}", re.IGNORECASE), r"\1 …"),
    (re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s:/@\"']*:)[^\s/\"']*@", re.IGNORECASE), r"\1…@"),
)

_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def redact(text: str) -> str:
    """`text` with everything that looks like a token, a credential or a password in a URL masked."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def set_up_logging(settings: LoggingSettings, stream: TextIO | None = None) -> None:
    """Send every event of this process, warnings included, to `stream` (standard error). May be repeated."""
    level, shape = settings.log_level.lower(), settings.log_format.lower()
    if level not in LEVELS:
        raise ConfigurationError(f"SLUICE_LOG_LEVEL={settings.log_level} is none of {', '.join(LEVELS)}")
    if shape not in FORMATS:
        raise ConfigurationError(f"SLUICE_LOG_FORMAT={settings.log_format} is none of {', '.join(FORMATS)}")
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if shape == "json" else TextFormatter())
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    logging.captureWarnings(True)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, event, then the event's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        } | _fields(record)
        return redact(_encoded(line))


class TextFormatter(logging.Formatter):
    """Time, level, logger, event, then key=value."""

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={_quoted(value)}" for name, value in _fields(record).items())
        head = f"{_time(record)} {record.levelname.lower():7} {record.name}: {record.getMessage()}"
        return shown(redact(head + fields))


def _time(record: logging.LogRecord) -> str:
    stamp = datetime.fromtimestamp(record.created, UTC)
    return stamp.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields = {name: value for name, value in vars(record).items() if name not in _STANDARD}
    if record.exc_info and record.exc_info[1] is not None:
        fields |= _exception(record.exc_info[1])
    return fields


def _exception(error: BaseException) -> dict[str, str]:
    """What was raised and where, outermost call first; the causes follow, each with its own place."""
    chain: list[str] = []
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        chain.append(_place(current))
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return {"error": f"{type(error).__name__}: {error}", "trace": " << ".join(chain)}


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    calls = " > ".join(f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames)
    inner = ""
    if isinstance(error, BaseExceptionGroup):
        inner = " [" + " | ".join(_place(part) for part in error.exceptions) + "]"
    return f"{type(error).__name__}: {error} ({calls}){inner}"


def _quoted(value: object) -> str:
    text = str(value)
    if text and not any(character.isspace() or character in '"=' for character in text):
        return text
    return _encoded(text)


def _encoded(content: object) -> str:
    try:
        return orjson.dumps(content, default=str, option=orjson.OPT_NON_STR_KEYS).decode()
    except TypeError:
        # Half of a pair of surrogates, as bytes that are no UTF-8 become, or a number of more than 64 bits.
        return json.dumps(content, default=str)

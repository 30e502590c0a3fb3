"""Logs: one line an event, fields kept, and nothing that looks like a secret."""

import io
import json
import logging
import warnings
from typing import Any

import pytest

from runtime.errors import ConfigurationError
from runtime.logging import LoggingSettings, redact, set_up_logging
from runtime.secrets import API_KEY_PREFIX, DEVICE_PREFIX, GATEWAY_PREFIX, make_token

pytestmark = pytest.mark.usefixtures("logging_as_it_was")


def logged(shape: str, level: str = "info") -> io.StringIO:
    stream = io.StringIO()
    set_up_logging(LoggingSettings(log_format=shape, log_level=level), stream)
    return stream


def json_line(stream: io.StringIO) -> dict[str, Any]:
    (line,) = stream.getvalue().splitlines()
    found: dict[str, Any] = json.loads(line)
    return found


def break_with(message: str) -> None:
    raise ValueError(message)


def raise_key_error() -> None:
    raise KeyError("inner")


def break_twice() -> None:
    try:
        raise_key_error()
    except KeyError:
        break_with("two\nlines")


def test_json_has_the_event_and_its_fields() -> None:
    stream = logged("json")
    logging.getLogger("sluice.test").info("landed %d", 3, extra={"rows": 3, "who": {"a": 1}, "odd": object})
    line = json_line(stream)
    assert line["time"].endswith("Z")
    assert (line["level"], line["logger"], line["event"]) == ("info", "sluice.test", "landed 3")
    assert (line["rows"], line["who"]) == (3, {"a": 1})


def test_text_quotes_what_needs_it() -> None:
    stream = logged("text")
    logging.getLogger("sluice.test").warning("slow", extra={"ms": 5, "why": 'a "b" c', "empty": ""})
    assert stream.getvalue().endswith('warning sluice.test: slow ms=5 why="a \\"b\\" c" empty=""\n')


@pytest.mark.parametrize("shape", ["json", "text"])
def test_an_exception_is_one_line_with_its_cause(shape: str) -> None:
    stream = logged(shape)
    try:
        break_twice()
    except ValueError:
        logging.getLogger("sluice.test").exception("broke")
    (line,) = stream.getvalue().splitlines()
    assert "ValueError: two\\nlines" in line
    assert "KeyError: 'inner'" in line
    assert "test_logging.py:" in line


@pytest.mark.parametrize("shape", ["json", "text"])
def test_an_event_cannot_forge_another_line(shape: str) -> None:
    stream = logged(shape)
    logging.getLogger("sluice.test").info("one\r\ntwo", extra={"field": "three\nfour"})
    assert len(stream.getvalue().splitlines()) == 1


def test_in_text_nothing_moves_the_cursor_or_turns_a_line_around() -> None:
    stream = logged("text")
    field = "x\x1b[31m\x85\u2028\u202ey\udcff"
    logging.getLogger("sluice.test").info("one\x0btwo %s", "\x1b]0;title\x07\u2067", extra={"field": field})
    (line,) = stream.getvalue().splitlines()
    assert line.isprintable()
    assert r"one\x0btwo \x1b]0;title\x07\u2067" in line
    assert r"\udcff" in line


def test_in_json_every_character_comes_back() -> None:
    stream = logged("json")
    text = "a\x1b\x85\n\u2028\u202e\udcff"
    logging.getLogger("sluice.test").info("seen", extra={"field": text, "number": 1 << 70})
    assert stream.getvalue().count("\n") == 1
    found = json.loads(stream.getvalue())
    assert (found["field"], found["number"]) == (text, 1 << 70)


@pytest.mark.parametrize("shape", ["json", "text"])
def test_no_token_or_password_passes_wherever_it_stands(shape: str) -> None:
    stream = logged(shape)
    tokens = [make_token(prefix) for prefix in (DEVICE_PREFIX, GATEWAY_PREFIX, API_KEY_PREFIX)]
    log = logging.getLogger("sluice.test")
    log.info("GET /v1/ingest/shelly/%s?hum=1", tokens[0], extra={"headers": f"Authorization: Bearer {tokens[1]}"})
    log.info("x", extra={"url": "postgresql://sluice:pa:s%40s@host:5432/db", "nested": {"t": [tokens[2]]}})
    log.info("x", extra={"jwt": "bearer eyJhbGciOi.eyJzdWIi.SflKxwRJ"})
    try:
        break_with(f"no such token {tokens[0]}")
    except ValueError:
        log.exception("broke")
    text = stream.getvalue()
    assert not [token for token in tokens if token[8:] in text]
    assert "s%40s" not in text
    assert "eyJ" not in text
    assert "@host:5432/db" in text
    assert len(text.splitlines()) == 4
    if shape == "json":
        assert all(json.loads(line) for line in text.splitlines())


def test_what_is_no_secret_stays() -> None:
    for text in ("http://127.0.0.1:8080/v1", "a basic idea", "the bearer of news", "user@example.org"):
        assert redact(text) == text


def test_warnings_are_events() -> None:
    stream = logged("json")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    assert "old" in json_line(stream)["event"]


def test_events_below_the_level_are_not_written() -> None:
    stream = logged("text", "warning")
    logging.getLogger("sluice.test").info("nothing")
    assert not stream.getvalue()


@pytest.mark.parametrize("settings", [LoggingSettings(log_format="xml"), LoggingSettings(log_level="loud")])
def test_a_wrong_setting_is_named(settings: LoggingSettings) -> None:
    with pytest.raises(ConfigurationError, match="SLUICE_LOG_"):
        set_up_logging(settings)

"""JSON as devices write it: numbers that no float64 holds stand for themselves, so that each is refused alone.

Left out: what the JSON says.
"""

import json
from collections.abc import Callable
from typing import Any, Final

from ingest.formats.shape import BadNumber, BodyError
from schemas.errors import RequestCode

_INTEGER_DIGITS_MAX: Final = 400


def parse(body: bytes, pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """What `body` says; `pairs_hook` makes its objects. Raises `BodyError` for what is no JSON text in UTF-8."""
    try:
        return json.loads(
            body.decode("utf-8"),
            parse_float=_parse_float,
            parse_int=_parse_int,
            parse_constant=BadNumber,
            object_pairs_hook=pairs_hook,
        )
    except RecursionError:
        raise BodyError(RequestCode.BAD_JSON, "the body is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise BodyError(RequestCode.BAD_JSON, f"the body is not UTF-8 (byte {error.start})") from None
    except ValueError as error:
        raise BodyError(RequestCode.BAD_JSON, f"the body is not JSON: {error}") from None


def parse_object(body: bytes) -> dict[str, Any]:
    """The same of an object. Raises `BodyError` for anything else."""
    content = parse(body)
    if not isinstance(content, dict):
        raise BodyError(RequestCode.INVALID_BODY, "the body is not an object")
    return content


def _parse_float(text: str) -> float | BadNumber:
    value = float(text)
    return value if abs(value) != float("inf") else BadNumber(text[:40])


def _parse_int(text: str) -> int | BadNumber:
    return int(text) if len(text) < _INTEGER_DIGITS_MAX else BadNumber(text[:40])

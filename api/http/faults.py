"""All that is wrong with what was sent, field by field: msgspec itself ends at the first fault.

Looked for only once it has found one, so that what is right costs nothing. Left out: reading it (`decoding`).
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from enum import Enum
from functools import lru_cache
from itertools import islice
from types import SimpleNamespace
from typing import Annotated, Any, Final, Literal, get_args, get_origin

import msgspec

from api.http import spelt
from api.http.problems import Detail, Kind, Problem
from api.http.wording import NO_CHOICE, in_our_words

#: Of one answer; and of a name in it, which may be as long as a body.
FAULTS_MAX: Final = 20
_FIELD_CHARACTERS_MAX: Final = 200
NUL_FAULT: Final = "holds a NUL character, which no text may"
#: A filter that says null was not left out: msgspec reads that text as None, which finds everything.
NULL_FAULT: Final = "must have a value: leave it out where it has none"

_WORDS: Final = "words"
_WHERE: Final = re.compile(r"^(.*?)(?: - at `(.*)`)?$", re.DOTALL)
_NAMED: Final = re.compile(r"(?:missing required|contains unknown) field `(.*?)`")


def in_words(text: str) -> dict[str, str]:
    """What `msgspec.Meta(extra=…)` says of a text that has a pattern: nobody should have to read that in an error."""
    return {_WORDS: text}


def faults(kind: Any, value: Any, *, strict: bool = True) -> list[Detail]:
    """What keeps `value`, of plain JSON types, from being a `kind`: some of it where that is much."""
    return list(islice(_faults(kind, value, "", strict), FAULTS_MAX))


def problem_of(kind: Kind, details: list[Detail]) -> Problem:
    """One that names each; its message tells of the first."""
    first = details[0]
    message = f"{first.field}: {first.message}" if first.field else f"the body {first.message}"
    return Problem(kind, message + (" (and more)" if len(details) > 1 else ""), details=details)


def detail_of(error: Exception) -> Detail:
    """What msgspec found wrong, and the field it found it at."""
    match = _WHERE.match(str(error))
    words, place = (match.group(1), match.group(2) or "") if match else (str(error), "")
    field = place.removeprefix("$").removeprefix(".")
    if named := _NAMED.search(words):
        return Detail(_join(field, named.group(1)), "is missing" if "missing" in words else "is not known here")
    return Detail(field, in_our_words(words))


def _faults(kind: Any, value: Any, where: str, strict: bool) -> Iterator[Detail]:
    found = set()
    for fault in _parts_faults(kind, value, where, strict):
        found.add(fault.field)
        yield fault
    if not found:
        yield from _own_faults(kind, value, where, strict)
        return
    struct, _ = _parts(kind)
    if struct is not None and isinstance(value, dict):
        together = _rule_faults(struct, value, where, strict)
        yield from (fault for fault in together if fault.field not in found)


def _parts_faults(kind: Any, value: Any, where: str, strict: bool) -> Iterator[Detail]:
    """Of the fields of an object, or the items of an array."""
    struct, item = _parts(kind)
    if struct is not None and isinstance(value, dict):
        yield from _fields_faults(struct, value, where, strict)
    elif item is not None and isinstance(value, list):
        for index, one in enumerate(value):
            yield from _faults(item, one, f"{where}[{index}]", strict)


def _fields_faults(struct: Any, value: Mapping[str, Any], where: str, strict: bool) -> Iterator[Detail]:
    fields = {field.encode_name: field for field in msgspec.structs.fields(struct)}
    for name, field in fields.items():
        if name in value:
            yield from _faults(field.type, value[name], _join(where, name), strict)
        elif field.required:
            yield Detail(_join(where, name), "is missing")
    if struct.__struct_config__.forbid_unknown_fields:
        for name in value:
            if name not in fields:
                yield Detail(_join(where, name), "is not known here")


def _rule_faults(struct: Any, value: Mapping[str, Any], where: str, strict: bool) -> Iterator[Detail]:
    """Of the fields of an object together, where some of them are wrong: as far as the right ones tell."""
    rule = getattr(struct, "__post_init__", None)
    if rule is None:
        return
    right = SimpleNamespace()
    for field in msgspec.structs.fields(struct):
        if field.encode_name not in value:
            if field.default is not msgspec.NODEFAULT:
                setattr(right, field.name, field.default)
        elif not any(_faults(field.type, value[field.encode_name], "", strict)):
            setattr(right, field.name, _converted(field.type, value[field.encode_name], strict))
    # It asks for what is wrong: then nothing can be told.
    with suppress(AttributeError):
        try:
            rule(right)
        except Problem as problem:
            yield from _placed(problem, where)
        except ValueError as error:
            yield Detail(where, str(error))


def _placed(problem: Problem, where: str) -> Iterator[Detail]:
    return (Detail(_join(where, one.field), one.message) for one in problem.details)


def _own_faults(kind: Any, value: Any, where: str, strict: bool) -> Iterator[Detail]:
    """Of a value without parts, or of what its parts are together."""
    found = False
    for place in _with_nul(value, where):
        found = True
        yield Detail(place, NUL_FAULT)
    if found:
        return
    try:
        if _converted(kind, value, strict) is None and value is not None:
            yield Detail(where, NULL_FAULT)
    except (msgspec.ValidationError, ValueError) as error:
        if isinstance(value, str) and (words := _words(kind)):
            yield Detail(where, words)
            return
        detail = detail_of(error)
        inner = detail.field.removeprefix("value")
        message = f"must be one of {choices}" if detail.message == NO_CHOICE and (choices := _choices(kind)) else ""
        yield Detail(f"{where}{inner}" if where else inner.removeprefix("."), message or detail.message)
    except Problem as problem:
        yield from _placed(problem, where)


def _converted(kind: Any, value: Any, strict: bool) -> Any:
    made: Any = msgspec.convert({"value": value}, _alone(kind), strict=strict, dec_hook=spelt.read)
    return made.value


def _choices(kind: Any) -> str:
    """The values that it lists, if it is a list of values; of a union, those of its parts."""
    if get_origin(kind) is Literal:
        return ", ".join(map(str, get_args(kind)))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return ", ".join(str(one.value) for one in kind)
    return ", ".join(filter(None, map(_choices, get_args(kind))))


def _with_nul(value: Any, where: str) -> Iterator[str]:
    if isinstance(value, str) and "\0" in value:
        yield where
    elif isinstance(value, list):
        for index, one in enumerate(value):
            yield from _with_nul(one, f"{where}[{index}]")
    elif isinstance(value, dict):
        for name, one in value.items():
            place = _join(where, name)
            yield from [place] if "\0" in name else _with_nul(one, place)


def _parts(kind: Any) -> tuple[Any, Any]:
    """The struct that an object has to be, or the type of an array's items; of a union, the only one there is."""
    if get_origin(kind) is Annotated:
        return _parts(get_args(kind)[0])
    if get_origin(kind) is list:
        return None, get_args(kind)[0]
    if isinstance(kind, type):
        return (kind, None) if issubclass(kind, msgspec.Struct) else (None, None)
    found = [parts for one in get_args(kind) if (parts := _parts(one)) != (None, None)]
    return found[0] if len(found) == 1 else (None, None)


def _words(kind: Any) -> str | None:
    """What a text has to be, where that is said."""
    if get_origin(kind) is not Annotated:
        return next((words for one in get_args(kind) if (words := _words(one))), None)
    said = [one.extra[_WORDS] for one in kind.__metadata__ if isinstance(one, msgspec.Meta) and one.extra]
    return said[0] if said else None


@lru_cache(maxsize=1_024)
def _alone(kind: Any) -> type[msgspec.Struct]:
    return msgspec.defstruct("Alone", [("value", kind)])


def _join(where: str, name: str) -> str:
    return (f"{where}.{name}" if where and name else where or name)[:_FIELD_CHARACTERS_MAX]

"""What msgspec finds wrong, in words for whoever sent it. Left out: where it is wrong (`faults`)."""

import re
from typing import Final

#: Which values there are, only the field's type tells.
NO_CHOICE: Final = "is none of the values that it can have"
NO_VALUE: Final = "is no value that it can have"

_EXPECTED: Final = re.compile(r"Expected `([^`]*)`(?: of length)?(?: (<=|>=|<|>) ([^,]+))?(?:, got .*)?", re.DOTALL)
_TYPES: Final = {
    "str": "a text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "array": "an array",
    "object": "an object",
    "null": "null",
    "datetime": "a time as RFC 3339 has it",
    "uuid": "a UUID",
}
_PARTS: Final = {"a text": "characters", "an array": "items", "an object": "fields"}
_BOUNDS: Final = {"<=": "up to {}", ">=": "at least {}", "<": "less than {}", ">": "more than {}"}
_KNOWN: Final = {
    "Invalid UUID": "is not a UUID",
    "Invalid RFC3339 encoded datetime": "must be a time as RFC 3339 has it",
    "Integer value out of range": "is too large a number",
    "Number out of range": "is too large a number",
}


def in_our_words(words: str) -> str:
    """What is wrong with a value, by what msgspec says. Words of our own begin with a small letter, and stay."""
    if not words[:1].isupper():
        return words
    if words in _KNOWN:
        return _KNOWN[words]
    if words.startswith("Invalid enum value"):
        return NO_CHOICE
    match = _EXPECTED.fullmatch(words)
    if match is None:
        return NO_VALUE
    names, sign, bound = match.groups()
    kinds = [_TYPES[name] for name in names.split(" | ") if name in _TYPES]
    if not kinds:
        return NO_VALUE
    wanted = f"must be {' or '.join(kinds)}"
    if sign is None:
        return wanted
    parts = _PARTS.get(kinds[0])
    told = _BOUNDS[sign].format(bound)
    return f"{wanted} of {told} {parts}" if parts else f"{wanted}, {told}"

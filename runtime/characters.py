"""Which characters a person can see: for names, and for what is printed on a terminal or into a text log.

Refused, or escaped, are control characters, line separators, what is invisible or turns the direction of what
follows (Unicode's Default_Ignorable_Code_Point, Bidi_Control, the rest of the category Cf that shows nothing),
noncharacters and halves of pairs. What scripts and emoji need stays where it stands as they need it: a joiner between
two characters of scripts that join, a variation selector behind what it varies, the tags of a flag. Code points that
Unicode has not assigned pass, unless they are kept for invisible ones: which they are differs between versions of
Python, and next year's emoji are among them. So ranges are written out instead of being asked of `unicodedata`. Left
out: which names there are (`api.registry.texts`).
"""

import re
import unicodedata
from typing import Final

# Ranges of character classes, which stand in JSON Schemas too: in the dialect that all readers of those share, a
# character beyond U+FFFF is written as it is.

#: Seen as room between others; not `\s`, of which Python and the readers of JSON Schema have different ideas.
BLANK: Final = r" \u00a0\u1680\u2000-\u200a\u202f\u205f\u2800\u3000"
_NOWHERE: Final = (
    r"\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164"
    r"\ufdd0-\ufdef\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    "\U000e0000-\U000e002f\U000e003a-\U000e0060\U000e007b-\U000e007e\U000e0080-\U000e00ff\U000e01f0-\U000e0fff"
    + "".join(f"{chr(plane + 0xFFFE)}{chr(plane + 0xFFFF)}" for plane in range(0x1_0000, 0x11_0000, 0x1_0000))
)
#: Good nowhere, or nowhere but for line ends.
HIDDEN: Final = rf"\x00-\x1f{_NOWHERE}"
HIDDEN_IN_LINES: Final = rf"\x00-\x09\x0b-\x1f{_NOWHERE}"
_JOINERS: Final = r"\u180e\u200c\u200d"
_SELECTORS: Final = "\\u180b-\\u180d\\u180f\\ufe00-\\ufe0f\U000e0100-\U000e01ef"
_TAGS: Final = "\U000e0030-\U000e0039\U000e0061-\U000e007a"
_END: Final = "\U000e007f"
#: Good in some places.
DEPENDENT: Final = f"{_JOINERS}{_SELECTORS}{_TAGS}{_END}"

#: Neither Latin, Greek nor Cyrillic, whose letters need no joiner.
_OTHER: Final = rf"\x00-\u058f{BLANK}{HIDDEN}{DEPENDENT}"
#: Emoji with a selector behind.
_KEYS: Final = r"[#*0-9\u00a9\u00ae]"
_FLAG: Final = "\U0001f3f4"


def _behind_flag(tags: range) -> str:
    """Not behind a flag and so many tags."""
    return "".join(f"(?<!{_FLAG}[{_TAGS}]{{{count}}})" for count in tags)


#: A pattern that is found where one of `DEPENDENT` has nothing that it belongs to.
MISPLACED: Final = "|".join(
    [
        rf"(?<![^{_OTHER}])(?<![{_SELECTORS}])[{_JOINERS}]",
        rf"[{_JOINERS}](?![^{_OTHER}])",
        rf"(?<![^{_OTHER}])(?<!{_KEYS})[{_SELECTORS}]",
        rf"{_behind_flag(range(6))}[{_TAGS}]",
        rf"[{_TAGS}](?![{_TAGS}{_END}])",
        rf"{_behind_flag(range(3, 7))}{_END}",
    ]
)
#: Of halves of pairs no JSON text has one, and no schema can name them.
_HALVES: Final = r"\ud800-\udfff"
_HIDDEN: Final = re.compile(rf"[{HIDDEN}{_HALVES}]|{MISPLACED}")
_HIDDEN_IN_LINES: Final = re.compile(rf"[{HIDDEN_IN_LINES}{_HALVES}]|{MISPLACED}")


def first_hidden(text: str, *, lines: bool = False) -> str:
    """A character that is not seen where it stands, as `U+202E RIGHT-TO-LEFT OVERRIDE`; empty for none.

    A line end is one, unless a text may have `lines`.
    """
    found = (_HIDDEN_IN_LINES if lines else _HIDDEN).search(text)
    return f"U+{ord(found[0]):04X} {unicodedata.name(found[0], '')}".rstrip() if found else ""


def shown(text: str) -> str:
    """`text` in one line, with what nobody sees as its escape: it moves no cursor and turns nothing around."""
    if text.isascii() and text.isprintable():
        return text
    count = 1
    # Where one goes, what belonged to it may be alone.
    while count:
        text, count = _HIDDEN.subn(lambda found: found[0].encode("unicode_escape").decode(), text)
    return text

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

# Patterns stand in JSON Schemas too: in the dialect of all who read those, a character beyond U+FFFF is written as it
# is. The classes have nothing in common and each repetition begins with another one: no text takes long to judge.

#: Seen as room between others; not `\s`, of which Python and the readers of JSON Schema have different ideas.
BLANK: Final = r" \u00a0\u1680\u2000-\u200a\u202f\u205f\u2800\u3000"
#: Where no text needs them.
HIDDEN: Final = (
    r"\x00-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164"
    r"\ufdd0-\ufdef\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
    + "".join(f"{chr(plane + 0xFFFE)}{chr(plane + 0xFFFF)}" for plane in range(0x1_0000, 0x11_0000, 0x1_0000))
)
#: Hidden where they do not join or vary anything.
JOINERS: Final = r"\u180e\u200c\u200d"
SELECTORS: Final = "\\u180b-\\u180d\\u180f\\ufe00-\\ufe0f\U000e0100-\U000e01ef"

#: No reader of JSON Schemas takes a pattern that names them, and no JSON text holds one.
_HALVES_OF_PAIRS: Final = r"\ud800-\udfff"
#: Latin, Greek and Cyrillic, whose letters need neither; digits and signs that are emoji with a selector behind.
_PLAIN: Final = r"[\x21\x22\x24-\x29\x2b-\x2f\x3a-\x7e\u00a1-\u00a8\u00aa-\u00ac\u00af-\u034e\u0350-\u058f]"
_KEYS: Final = rf"[#*0-9\u00a9\u00ae][{SELECTORS}]?"
_FLAG: Final = "\U0001f3f4[\U000e0030-\U000e0039\U000e0061-\U000e007a]{3,6}\U000e007f"


def _line(hidden: str) -> str:
    other = rf"[^\x00-\u058f{BLANK}{hidden}{JOINERS}{SELECTORS}][{SELECTORS}]?"
    return rf"(?:[{BLANK}]|{_PLAIN}|{_KEYS}|{_FLAG}|{other}(?:[{JOINERS}]{other})*)"


#: A blank, or one character that is seen with what belongs to it.
LINE: Final = _line(HIDDEN)

_SEEN: Final = _line(HIDDEN + _HALVES_OF_PAIRS)
_LINE: Final = re.compile(rf"{_SEEN}*")
_LINES: Final = re.compile(rf"(?:\n|{_SEEN})*")
_PIECE: Final = re.compile(rf"({_SEEN}+)|(.)", re.DOTALL)


def first_hidden(text: str, *, lines: bool = False) -> str:
    """The first character that is not seen where it stands, as `U+202E RIGHT-TO-LEFT OVERRIDE`; empty for none.

    A line end is one, unless a text may have `lines`.
    """
    seen = (_LINES if lines else _LINE).match(text)
    end = 0 if seen is None else seen.end()
    if end == len(text):
        return ""
    return f"U+{ord(text[end]):04X} {unicodedata.name(text[end], '')}".rstrip()


def shown(text: str) -> str:
    """`text` in one line, with what nobody sees as its escape: it moves no cursor and turns nothing around."""
    if text.isascii() and text.isprintable():
        return text
    return _PIECE.sub(lambda piece: piece[1] or piece[2].encode("unicode_escape").decode(), text)

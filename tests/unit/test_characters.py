"""Which characters are seen: every script's, every emoji, and nothing that hides, moves or turns others around."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.characters import first_hidden, shown

#: Of the category Cf, and yet seen: number signs that stand around digits, and how hieroglyphs stand together.
SEEN_FORMATS = {
    0x06DD,
    0x070F,
    0x08E2,
    0x110BD,
    0x110CD,
    *range(0x600, 0x606),
    0x890,
    0x891,
    *range(0x13430, 0x13440),
}
#: Letters and marks that are not seen.
HIDDEN_OTHERS = {0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x3164, 0xFFA0}
SELECTORS = {*range(0x180B, 0x180E), 0x180F, *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)}
#: What belongs to others, and what it belongs to.
DEPENDENT = "\u200c\u200d\u180e\ufe0f\ufe00\U000e0100\U0001f3f4\U000e0067\U000e0031\U000e007f👩1#aहé "
SEEN = [
    "خانه‌های تهران",  # Persian, with ZWNJ
    "منجم الفحم رقم ٣",
    "מכרה הפחם של תל־אביב",
    "क्‍ष क्‌ष",  # Devanagari, with ZWJ and ZWNJ
    "ශ්‍රී ලංකා",
    "葛\U000e0100城",  # with an ideographic variation selector
    "ᠠ᠎ᠠ",  # Mongolian, with its vowel separator
    "Ⅷ ½ ﬁ 한국 日本　東京",
    "👩‍👩‍👧‍👦 🏔 🧑🏽‍🚀 ❤️‍🔥 👁️‍🗨️ 1️⃣ #️⃣ ©️ 🇨🇿 🏳️‍🌈",
    "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",  # England
    "🫨",  # younger than Python 3.11
]
HIDDEN = [
    ("a\x00", "U+0000"),
    ("\x1b[2J", "U+001B"),
    ("a\x85", "U+0085"),
    ("a\u2028b", "U+2028 LINE SEPARATOR"),
    ("\u200b", "U+200B ZERO WIDTH SPACE"),
    ("Ou\u200brs", "U+200B ZERO WIDTH SPACE"),
    ("Ou\u00adrs", "U+00AD SOFT HYPHEN"),
    ("Ours\u2060", "U+2060 WORD JOINER"),
    ("\ufeffOurs", "U+FEFF ZERO WIDTH NO-BREAK SPACE"),
    ("a\u202egnp.exe", "U+202E RIGHT-TO-LEFT OVERRIDE"),
    ("\u202aa\u202c", "U+202A LEFT-TO-RIGHT EMBEDDING"),
    ("מכרה\u2067", "U+2067 RIGHT-TO-LEFT ISOLATE"),
    ("א\u200fב", "U+200F RIGHT-TO-LEFT MARK"),
    ("\u3164", "U+3164 HANGUL FILLER"),
    # Joiners and selectors that join and vary nothing.
    ("Ou\u200drs", "U+200D ZERO WIDTH JOINER"),
    ("\u200d👩", "U+200D ZERO WIDTH JOINER"),
    ("👩\u200d", "U+200D ZERO WIDTH JOINER"),
    ("👩\u200d\u200d👧", "U+200D ZERO WIDTH JOINER"),
    ("خانه\u200c ها", "U+200C ZERO WIDTH NON-JOINER"),
    ("Ours\ufe0f", "U+FE0F VARIATION SELECTOR-16"),
    ("❤\ufe0f\ufe0f", "U+FE0F VARIATION SELECTOR-16"),
    # A text written in tags, and a flag that does not end.
    ("a\U000e0068\U000e0069", "U+E0068 TAG LATIN SMALL LETTER H"),
    ("🏴\U000e0067\U000e0062", "U+E0062 TAG LATIN SMALL LETTER B"),
    ("🏴" + "\U000e0067" * 7 + "\U000e007f", "U+E0067 TAG LATIN SMALL LETTER G"),
    ("🏴\U000e0067\U000e0062\U000e007f", "U+E007F CANCEL TAG"),
    ("a\ufdd0", "U+FDD0"),
    ("a\U0010ffff", "U+10FFFF"),
    ("a\udcff", "U+DCFF"),
]


def test_every_character_by_itself() -> None:
    for code in range(0x110000):
        one, kind = chr(code), unicodedata.category(chr(code))
        if kind in ("Cn", "Co"):
            continue
        hidden = kind in ("Cc", "Cs", "Zl", "Zp") or (kind == "Cf" and code not in SEEN_FORMATS)
        assert bool(first_hidden(one)) is (hidden or code in HIDDEN_OTHERS | SELECTORS), hex(code)


@pytest.mark.parametrize("text", SEEN)
def test_what_scripts_and_emoji_need_is_seen(text: str) -> None:
    assert not first_hidden(text)
    assert shown(text) == text


@pytest.mark.parametrize(("text", "named"), HIDDEN)
def test_what_is_hidden_is_named_and_shown_as_its_escape(text: str, named: str) -> None:
    assert first_hidden(text) == named
    assert not first_hidden(shown(text))
    assert shown(text).encode("ascii", "backslashreplace").count(b"\\") >= 1


def test_an_escape_says_which_it_was() -> None:
    assert shown("a\x1b[2J\u202eb\n\t\U000e0001\udcff") == "a\\x1b[2J\\u202eb\\n\\t\\U000e0001\\udcff"
    assert shown("👩\u200d é\u200d") == "👩\\u200d é\\u200d"


@given(st.text(st.characters(codec=None)) | st.text(DEPENDENT))
def test_what_is_shown_is_one_line_of_what_is_seen(text: str) -> None:
    line = shown(text)
    assert not first_hidden(line)
    assert len(line.splitlines()) <= 1
    assert shown(line) == line
    assert line == text or first_hidden(text)

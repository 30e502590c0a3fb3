"""What things may be called: names, slugs, hosts, zones."""

import re
import unicodedata
from uuid import UUID
from zoneinfo import ZoneInfo

import jsonschema_rs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.registry.sites import checked_domain
from api.registry.texts import (
    EdgeId,
    Email,
    HostName,
    LocalId,
    Name,
    Notes,
    PostalAddress,
    Reason,
    Slug,
    Text,
    Zone,
)
from runtime.characters import first_hidden
from runtime.errors import ConfigurationError
from tests.unit.test_characters import DEPENDENT, HIDDEN, SEEN

KINDS = [Name, Email, PostalAddress, Notes, Slug, HostName, EdgeId]


@given(st.text(max_size=210))
def test_a_name_is_anything_that_can_be_seen(text: str) -> None:
    blank = all(one == "\u2800" or unicodedata.category(one) == "Zs" for one in text)
    assert accepts(Name, text) == (not blank and not first_hidden(text) and len(text) <= 200)


@pytest.mark.parametrize("text", ["Mt Arthur Mine", "  a  ", "é" * 200, "№", *SEEN])
def test_names_of_any_script(text: str) -> None:
    assert Name.parse(text).value == text


@pytest.mark.parametrize("text", ["", " ", "\u3000\u00a0", "\u2800"])
def test_a_name_of_nothing_that_is_seen_is_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"^must have 1 to 200 characters in one line"):
        Name.parse(text)


@pytest.mark.parametrize(("text", "named"), HIDDEN)
def test_what_nobody_sees_is_refused_and_named(text: str, named: str) -> None:
    for kind in (Name, PostalAddress, Notes, Reason, Slug, LocalId):
        with pytest.raises(ValueError, match=f"^holds {re.escape(named)}, which nobody sees there: it "):
            kind.parse(text)
    assert not accepts(Email, f"a{text}@example.org")


@pytest.mark.parametrize(
    ("kind", "text"), [(Email, "x"), (Slug, "BAD"), (LocalId, "a b"), (LocalId, str(UUID(int=1))), (Reason, "")]
)
def test_what_is_wanted_is_said_as_what_must_be(kind: type[Text], text: str) -> None:
    with pytest.raises(ValueError, match=r"^must "):
        kind.parse(text)


def test_a_schema_of_local_ids_and_their_reader_agree() -> None:
    for text in ("a", "dev_1", UUID(int=1).hex, f"dev_{UUID(int=1).hex}", str(UUID(int=1)), f"x{UUID(int=1)}"):
        schema = {"type": "string", **LocalId.schema}
        assert jsonschema_rs.is_valid(schema, text) == accepts(LocalId, text), text


def test_only_texts_of_several_lines_have_line_ends() -> None:
    for kind in (PostalAddress, Notes, Reason):
        assert accepts(kind, "one\ntwo\n")
        assert not accepts(kind, "one\r\ntwo")
    with pytest.raises(ValueError, match=r"^holds U\+000A, which"):
        Name.parse("one\ntwo")
    with pytest.raises(ValueError, match=r"^holds U\+200B ZERO WIDTH SPACE, which"):
        Notes.parse("one\ntw\u200bo")


@given(st.text(max_size=70) | st.from_regex(r"[a-zA-Z0-9.-]{1,66}", fullmatch=True))
def test_a_slug_is_one_label_of_a_host_name(text: str) -> None:
    label = re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", text, re.ASCII) is not None and len(text) <= 63
    assert accepts(Slug, text) == (label and text[2:4] != "--")


@given(st.text(max_size=250))
def test_a_slug_is_made_of_every_name(name: str) -> None:
    slug = Slug.of(name)
    assert Slug.parse(slug.value).value == slug.value
    ended = slug.ended()
    assert Slug.parse(ended.value).value == ended.value
    assert ended.value[:-7] == slug.value[:56].rstrip("-")
    assert slug.ended().value != ended.value


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("consystence-server.local", True),
        ("10.0.0.7", True),
        ("a", True),
        ("x" * 63 + ".example", True),
        ("x" * 64 + ".example", False),
        (".".join(["x" * 49] * 5), True),
        (".".join(["x" * 50] * 5), False),
        ("a.", False),
        (".a", False),
        ("-a", False),
        ("a_b", False),
        ("a b", False),
        ("a:5000", False),
        ("::1", False),
        ("a/../b", False),
        ("a\n", False),
        ("bücher.example", False),
    ],
)
def test_a_host_name_can_stand_in_a_url(text: str, good: bool) -> None:
    assert accepts(HostName, text) == good


@given(st.text() | st.text(DEPENDENT))
def test_a_kind_s_schema_says_what_it_takes(text: str) -> None:
    for kind in KINDS:
        schema = kind.schema
        found = re.search(schema["pattern"].removesuffix("$") + r"\Z", text) is not None
        if "not" in schema:
            found = found and re.search(schema["not"]["pattern"], text) is None
        assert accepts(kind, text) == (found and schema["minLength"] <= len(text) <= schema["maxLength"])


def test_a_zone_is_spelt_as_in_the_database() -> None:
    for name in ("Australia/Sydney", "UTC", "Europe/Paris"):
        assert ZoneInfo(Zone.parse(name).value).key == name
    for name in ("australia/sydney", "Mars/Olympus", "", "localtime", "posixrules", "../UTC", "/etc/passwd", "UTC\0"):
        with pytest.raises(ValueError, match="is no time zone"):
            Zone.parse(name)


def test_a_domain_is_checked_at_the_start() -> None:
    assert checked_domain("Consystence.site") == "consystence.site"
    for domain in ("", ".", "a..b", "a b", "*.site", "x." * 95 + "x"):
        with pytest.raises(ConfigurationError, match="SLUICE_SITE_DOMAIN"):
            checked_domain(domain)


def accepts(kind: type[Text], text: str) -> bool:
    try:
        return kind.parse(text).value == text
    except ValueError:
        return False

"""What things may be called: names, slugs, hosts, zones."""

import re
import unicodedata
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.registry.sites import checked_domain
from api.registry.texts import EdgeId, HostName, Name, PostalAddress, Slug, Text, Zone
from runtime.errors import ConfigurationError

KINDS = [Name, PostalAddress, Slug, HostName, EdgeId]


@given(st.text(max_size=210))
def test_a_name_is_anything_that_can_be_seen(text: str) -> None:
    seen = text.strip() != "" and len(text) <= 200
    control = any(unicodedata.category(one) in ("Cc", "Zl", "Zp") for one in text)
    assert accepts(Name, text) == (seen and not control)


@pytest.mark.parametrize("text", ["Mt Arthur Mine", "👩‍👩‍👧 🏔", "منجم الفحم", "  a  ", "é" * 200, "№"])
def test_names_of_any_script(text: str) -> None:
    assert Name.parse(text).value == text


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


@given(st.text())
def test_a_kind_s_schema_says_what_it_takes(text: str) -> None:
    for kind in KINDS:
        schema = kind.schema
        found = re.search(schema["pattern"].removesuffix("$") + r"\Z", text) is not None
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

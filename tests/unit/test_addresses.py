"""Who is calling: what is believed of the headers that proxies set, and what only the peer says."""

from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.addresses import Proxies
from runtime.errors import ConfigurationError

PROXY = "10.0.0.1"
TRUSTED = Proxies(["10.0.0.0/8", "fd00::/8", "127.0.0.1"])


def key(address: str) -> bytes:
    found = ip_address(address)
    return bytes(10) + b"\xff\xff" + found.packed if found.version == 4 else found.packed[:8] + bytes(8)


@pytest.mark.parametrize(
    ("forwarded_for", "client"),
    [
        (["203.0.113.9"], "203.0.113.9"),
        (["198.51.100.1, 203.0.113.9"], "203.0.113.9"),
        (["198.51.100.1", "203.0.113.9"], "203.0.113.9"),
        (["203.0.113.9, 10.2.3.4 , 10.9.9.9"], "203.0.113.9"),
        (["203.0.113.9:51234"], "203.0.113.9"),
        (["[2001:db8:1:2:3::4]:443"], "2001:db8:1:2::"),
        (["[2001:db8:1:2:3::4]"], "2001:db8:1:2::"),
        (["2001:db8:1:2:ffff::4"], "2001:db8:1:2::"),
        (["::ffff:203.0.113.9"], "203.0.113.9"),
        (["203.0.113.9, fd00::1"], "203.0.113.9"),
        (["10.2.3.4, 10.3.4.5"], "10.2.3.4"),
        ([], PROXY),
        ([""], PROXY),
        (["203.0.113.9, unknown"], PROXY),
        (["unknown, 203.0.113.9"], "203.0.113.9"),
        (["203.0.113.9, 10.2.3.4, "], PROXY),
        (["203.0.113.9:port"], PROXY),
        (["[2001:db8::1]443"], PROXY),
        (["203.0.113.999"], PROXY),
    ],
)
def test_x_forwarded_for_is_read_from_the_right_through_trusted_proxies(
    forwarded_for: list[str], client: str
) -> None:
    assert TRUSTED.client(PROXY, forwarded_for, []) == key(client)


@pytest.mark.parametrize(
    ("forwarded", "client"),
    [
        (["for=203.0.113.9"], "203.0.113.9"),
        (['For="[2001:db8:1:2::3]:4711";proto=https, for=10.1.1.1;by=10.0.0.1'], "2001:db8:1:2::"),
        (["by=10.0.0.1 ; for=203.0.113.9:80"], "203.0.113.9"),
        (["for=203.0.113.9", "for=198.51.100.7"], "198.51.100.7"),
        (["for=_hidden"], PROXY),
        (["for=unknown"], PROXY),
        (["proto=https"], PROXY),
    ],
)
def test_forwarded_is_read_where_there_is_no_x_forwarded_for(forwarded: list[str], client: str) -> None:
    assert TRUSTED.client(PROXY, [], forwarded) == key(client)
    assert TRUSTED.client(PROXY, ["198.51.100.99"], forwarded) == key("198.51.100.99")


def test_nobody_is_trusted_unless_a_setting_says_so() -> None:
    assert Proxies([]).client("127.0.0.1", ["203.0.113.9"], ["for=203.0.113.9"]) == key("127.0.0.1")
    assert TRUSTED.client("192.0.2.1", ["203.0.113.9"], ["for=203.0.113.9"]) == key("192.0.2.1")
    assert TRUSTED.client("::ffff:10.0.0.1", ["203.0.113.9"], []) == key("203.0.113.9")


def test_a_peer_without_an_address_is_somebody_too() -> None:
    assert len(TRUSTED.client(None, ["203.0.113.9"], [])) == 16


def test_a_list_longer_than_any_real_one_is_not_followed_to_its_end() -> None:
    assert TRUSTED.client(PROXY, ["203.0.113.9" + ", 10.1.1.1" * 4_000], []) == key("10.1.1.1")


def test_neighbours_in_an_ipv6_network_of_64_bits_are_one_caller() -> None:
    one, other, next_one = (Proxies([]).client(a, [], []) for a in ("2001:db8::1", "2001:db8::2", "2001:db8:0:1::1"))
    assert one == other != next_one


def test_what_is_no_network_is_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match=r"SLUICE_TRUSTED_PROXIES: '10.0.0.0/99'"):
        Proxies(["10.0.0.0/99"])


@given(peer=st.ip_addresses(), values=st.lists(st.text(max_size=60), max_size=4), where=st.booleans())
def test_whatever_an_untrusted_peer_says_it_is_the_peer(peer: object, values: list[str], where: bool) -> None:
    headers = (values, []) if where else ([], values)
    assert Proxies(["192.0.2.77"]).client(str(peer), *headers) == Proxies([]).client(str(peer), [], [])


@given(
    made_up=st.lists(st.one_of(st.text(max_size=30), st.ip_addresses().map(str)), max_size=5),
    client=st.ip_addresses(v=4).filter(lambda address: not str(address).startswith(("10.", "127.0.0.1"))),
    hops=st.lists(st.ip_addresses(network="10.0.0.0/8").map(str), max_size=5),
)
def test_what_a_client_makes_up_stands_left_of_its_own_address(
    made_up: list[str], client: object, hops: list[str]
) -> None:
    assert TRUSTED.client(PROXY, [*made_up, ", ".join([str(client), *hops])], []) == key(str(client))

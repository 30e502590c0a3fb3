"""Connections by address: who is counted as whom, and what is left when they are gone."""

from ipaddress import ip_network

import pytest

from runtime.http.places import NOWHERE, Addresses


def test_each_address_has_its_own_places_and_gets_them_back() -> None:
    addresses = Addresses(2)
    first, second = addresses.enter(("192.0.2.1", 1)), addresses.enter(("192.0.2.1", 2))
    assert first is not None
    assert second is not None
    assert addresses.enter(("192.0.2.1", 3)) is None
    other = addresses.enter(("192.0.2.2", 1))
    assert other is not None
    addresses.leave(first)
    third = addresses.enter(("192.0.2.1", 4))
    assert third is not None
    assert addresses.enter(("192.0.2.1", 5)) is None
    for place in (second, third, other):
        addresses.leave(place)
    assert len(addresses) == 0


@pytest.mark.parametrize(
    ("one", "another", "same"),
    [
        ("2001:db8:0:1::1", "2001:db8:0:1:ffff::9", True),
        ("2001:db8:0:1::1", "2001:db8:0:2::1", False),
        ("192.0.2.1", "::ffff:192.0.2.1", True),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
        ("fe80::1%eth0", "fe80::2%eth1", True),
    ],
)
def test_who_is_the_same(one: str, another: str, same: bool) -> None:
    addresses = Addresses(1)
    assert addresses.enter((one, 1)) is not None
    assert (addresses.enter((another, 1)) is None) is same


def test_a_proxy_is_not_counted_and_neither_is_who_has_gone() -> None:
    addresses = Addresses(1, [ip_network("198.51.100.0/24"), ip_network("2001:db8::/32")])
    for peer in (("198.51.100.7", 1), ("2001:db8::7", 1, 0, 0), None, "", ("198.51.100.7", 2), ("2001:db8::7", 2)):
        assert addresses.enter(peer) == NOWHERE
    addresses.leave(NOWHERE)
    assert len(addresses) == 0
    assert addresses.enter(("203.0.113.1", 1)) is not None
    assert addresses.enter(("203.0.113.1", 1)) is None

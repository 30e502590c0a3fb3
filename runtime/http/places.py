"""How many connections one address may have, so that nobody takes them all. Left out: how many there are in all."""

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Final

Network = IPv4Network | IPv6Network

#: Not counted: a peer without an address has gone already.
NOWHERE: Final = ""
#: The bits of an IPv6 address that tell networks apart; the others belong to one customer.
_HOST_BITS: Final = 64


class Addresses:
    """Open connections by the address of the peer, IPv4 each and IPv6 by /64; those of `exempt` are not counted."""

    def __init__(self, each_max: int, exempt: Iterable[Network] = ()) -> None:
        self._each_max = each_max
        self._exempt = tuple(exempt)
        self._taken: dict[str, int] = {}

    def enter(self, peer: object) -> str | None:
        """The place of one more connection, to `leave` with; None when its address has as many as it may."""
        place = self._place(peer)
        if place == NOWHERE:
            return place
        taken = self._taken.get(place, 0)
        if taken >= self._each_max:
            return None
        self._taken[place] = taken + 1
        return place

    def leave(self, place: str) -> None:
        left = self._taken.get(place, 0) - 1
        if left > 0:
            self._taken[place] = left
        else:
            self._taken.pop(place, None)

    def __len__(self) -> int:
        """Addresses that have a connection."""
        return len(self._taken)

    def _place(self, peer: object) -> str:
        if not isinstance(peer, tuple) or not peer:
            return NOWHERE
        address: IPv4Address | IPv6Address = ip_address(str(peer[0]).partition("%")[0])
        if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        if any(address in network for network in self._exempt):
            return NOWHERE
        if isinstance(address, IPv6Address):
            return f"{int(address) >> _HOST_BITS:x}::/64"
        return str(address)

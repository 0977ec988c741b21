"""Find the address of a visitor, even behind a reverse proxy."""

import os
from collections.abc import Sequence
from ipaddress import IPv4Address, ip_address, ip_network

import msgspec
from starlette.requests import Request

FORWARDED = "x-forwarded-for"
HOST_BITS = 64  # of an address of IPv6 (RFC 4291, 2.5.4), which a machine chooses itself
ALLOWED, LOCAL = "FORWARDED_ALLOW_IPS", "127.0.0.1,::1"  # Uvicorn's variable for trusted proxies, and its default


class Visitor(msgspec.Struct, frozen=True):
    """Who sent a request. `is_shared`: the address is that of a proxy that does not name its visitors."""

    address: str
    is_shared: bool = False

    @property
    def network(self) -> str:
        """Return what one person controls: an address of IPv4, or the 64 bits that a network of IPv6 shares."""
        try:
            parsed = ip_address(self.address)
        except ValueError:
            return self.address
        if isinstance(parsed, IPv4Address):
            return str(parsed)
        return str(parsed.ipv4_mapped or ip_network((int(parsed) >> HOST_BITS << HOST_BITS, 128 - HOST_BITS)))


def visitor_of(request: Request) -> Visitor:
    """Return the visitor: behind trusted proxies, the last address in `X-Forwarded-For` that is not one of them."""
    peer = request.client.host if request.client else ""
    trusted = os.environ.get(ALLOWED, LOCAL).split(",")
    if not _is_trusted(peer, trusted):
        return Visitor(peer)
    forwarded = [each.strip() for line in request.headers.getlist(FORWARDED) for each in line.split(",")]
    proxies = [each for each in trusted if each.strip() != "*"]
    for address in reversed(forwarded):
        if not _is_address(address):
            break  # the client may have forged all addresses before it
        if not _is_trusted(address, proxies):
            return Visitor(address)
    return Visitor(peer, is_shared=True)


def _is_trusted(address: str, trusted: Sequence[str]) -> bool:
    return any(_is_within(address, each.strip()) for each in trusted)


def _is_within(address: str, trusted: str) -> bool:
    if trusted in {"*", address}:
        return True
    try:
        return ip_address(address) in ip_network(trusted)
    except ValueError:
        return False


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True

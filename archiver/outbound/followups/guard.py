"""Check receiver addresses after name resolution, at every connection, to prevent SSRF.

The connection uses the checked address itself, so a name that resolves to another address later has no effect.
"""

import asyncio
import socket
import ssl
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from time import monotonic
from typing import Any, Literal

import httpcore2
import httpx2
import msgspec

from archiver.errors import ArchiverError
from archiver.outbound.followups.verified_stream import VerifiedStream
from archiver.settings import SettingsError, libraries

Address = IPv4Address | IPv6Address
Reach = Literal["public", "private", "forbidden"]
Resolve = Callable[[str, int], Sequence[str]]

CONNECT_SECONDS = 5.0
MAX_LOOKUPS = 2  # concurrent lookups per subscription, so that a slow name server delays no other subscription
MAX_URL = 2_000  # characters


class AddressRefusedError(ArchiverError):
    """Follow-ups must not use this URL or address; the message gives the reason and the remedy."""


class HostNotFoundError(ArchiverError):
    """The host name cannot be resolved now."""


class Endpoint(msgspec.Struct, frozen=True):
    """The parsed URL of a receiver. `target` is its path and query."""

    scheme: str
    host: str
    port: int
    target: bytes

    @property
    def is_encrypted(self) -> bool:
        """Return whether the URL uses TLS."""
        return self.scheme == "https"

    @property
    def authority(self) -> str:
        """Return host and port, as in the header `Host`."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def origin(self) -> str:
        """Return scheme, host and port, for logs and the audit log: path and query may contain a token."""
        return f"{self.scheme}://{self.authority}"


def endpoint(url: str) -> Endpoint:
    """Parse the URL. Raises `AddressRefusedError`, without quoting the URL, because it may contain a password."""
    if len(url) > MAX_URL:
        raise AddressRefusedError(f"the URL is longer than {MAX_URL} characters: use a shorter one")
    if any(each.isspace() or not each.isprintable() for each in url):
        raise AddressRefusedError("the URL contains a space or a control character: write %20 for a space")
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL:
        raise AddressRefusedError("this is not a URL: write https://HOST/PATH") from None
    if parsed.scheme not in {"http", "https"} or not parsed.raw_host:
        raise AddressRefusedError("the URL must be like https://HOST/PATH")
    if parsed.userinfo:
        raise AddressRefusedError(
            "the URL contains a user name or a password. Remove them: signatures authenticate deliveries."
        )
    if parsed.fragment:
        raise AddressRefusedError("the URL contains a fragment (#...), which is never sent. Remove it.")
    port = parsed.port if parsed.port is not None else _PORTS[parsed.scheme]
    if port not in range(1, 65_536):
        raise AddressRefusedError("the URL's port must be from 1 to 65535")
    return Endpoint(parsed.scheme, parsed.raw_host.decode("ascii"), port, parsed.raw_path)


_PORTS = {"http": 80, "https": 443}


# Networks that `ipaddress` does not classify as non-global, or only in newer versions.
_FORBIDDEN = [ip_network(each) for each in ("0.0.0.0/8", "169.254.0.0/16", "240.0.0.0/4", "fe80::/10", "::/128")]
_FORBIDDEN += [ip_network(each) for each in ("192.88.99.0/24", "fec0::/10", "3fff::/20", "64:ff9b:1::/48")]
# Metadata services of clouds, which issue credentials to any internal request; some have public addresses.
_FORBIDDEN += [ip_network(each) for each in ("168.63.129.16/32", "100.100.100.200/32", "192.0.0.0/24")]
_FORBIDDEN += [ip_network(each) for each in ("fd00:ec2::/32", "fd20:ce::254/128")]
# 6to4 and Teredo: deprecated, with unpredictable routing.
_FORBIDDEN += [ip_network(each) for each in ("2002::/16", "2001::/32")]
_PRIVATE = [ip_network(each) for each in ("127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")]
_PRIVATE += [ip_network(each) for each in ("100.64.0.0/10", "::1/128", "fc00::/7")]
_UNICAST = ip_network("2000::/3")  # the allocated part of IPv6
_NAT64, _COMPATIBLE = ip_network("64:ff9b::/96"), ip_network("::/96")


def reach(address: Address) -> Reach:
    """Return the reach of an address: public, private or forbidden."""
    inner = _inner(address)
    if inner is None:
        return _reach(address)
    values = {reach(inner), _reach(address) if _is_isatap(address) else "public"}
    return "forbidden" if "forbidden" in values else "private" if "private" in values else "public"


def _reach(address: Address) -> Reach:
    if any(address in network for network in _FORBIDDEN) or address.is_multicast:
        return "forbidden"
    if any(address in network for network in _PRIVATE):
        return "private"
    is_unicast = isinstance(address, IPv4Address) or address in _UNICAST
    return "public" if address.is_global and is_unicast else "forbidden"


def _inner(address: Address) -> IPv4Address | None:
    """Return the IPv4 address that is embedded in an IPv6 address; None if there is none."""
    if isinstance(address, IPv4Address):
        return None
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    is_loopback = address.is_loopback or address.is_unspecified
    if address in _NAT64 or (address in _COMPATIBLE and not is_loopback) or _is_isatap(address):
        return IPv4Address(int(address) & 0xFFFF_FFFF)
    return None


def _is_isatap(address: Address) -> bool:
    """Return whether the address is …:0:5efe:V4 or …:200:5efe:V4 (RFC 5214, 6.1), under any prefix."""
    return address.version == 6 and int(address) >> 32 & 0xFDFF_FFFF == 0x0000_5EFE  # noqa: PLR2004  # ISATAP, RFC 5214


def check(addresses: Iterable[str], *, is_encrypted: bool, allow_private: bool) -> list[str]:
    """Return the addresses if deliveries may be sent to all of them. Raises `AddressRefusedError`."""
    result = []
    for text in addresses:
        address = ip_address(text.partition("%")[0])
        how = reach(address)
        if how == "forbidden":
            raise AddressRefusedError(f"{address} is a reserved address; deliveries are never sent there")
        if how == "private" and not allow_private:
            advice = "set ARCHIVER_FOLLOWUPS_ALLOW_PRIVATE=true to allow it"
            raise AddressRefusedError(f"{address} is a private address; {advice}")
        if how == "public" and not is_encrypted:
            raise AddressRefusedError(f"{address} is a public address: use https, so that deliveries are encrypted")
        result.append(str(address))
    return result


def resolve(host: str, port: int) -> Sequence[str]:
    """Return the addresses of a host from the system's resolver. Blocks the thread. Raises `HostNotFoundError`."""
    try:
        result = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise HostNotFoundError(f"host not found: {host}") from None
    return list(dict.fromkeys(str(info[4][0]) for info in result))


class GuardedNetwork(httpcore2.AsyncNetworkBackend):
    """A network backend that connects only to addresses that one subscription may use."""

    def __init__(self, *, is_encrypted: bool, allow_private: bool, resolve: Resolve = resolve) -> None:
        self._is_encrypted, self._allow_private = is_encrypted, allow_private
        self._resolve = resolve
        self._network = httpcore2.AnyIOBackend()
        # A separate pool: the loop's default pool is shared with all other lookups.
        self._threads = ThreadPoolExecutor(MAX_LOOKUPS, thread_name_prefix="names")

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109  # the name is the library's
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """Connect to the first address that responds.

        Raises `AddressRefusedError`, `HostNotFoundError` and the library's errors.
        """
        result = await asyncio.get_running_loop().run_in_executor(self._threads, self._resolve, host, port)
        addresses = check(result, is_encrypted=self._is_encrypted, allow_private=self._allow_private)
        ends = monotonic() + (timeout or CONNECT_SECONDS)
        failure: Exception = HostNotFoundError(f"host has no address: {host}")
        for number, address in enumerate(addresses):
            share = max(0.1, (ends - monotonic()) / (len(addresses) - number))
            try:
                return VerifiedStream(
                    await self._network.connect_tcp(address, port, share, local_address, socket_options)
                )
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
        raise failure

    def close(self) -> None:
        """Close without waiting for name lookups."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def ssl_context() -> ssl.SSLContext:
    """Return a context that verifies certificates with the system's authorities, and their names with the URL's host.

    Raises `SettingsError`, which names the variables to check.
    """
    try:
        return httpx2.create_ssl_context()
    except (OSError, ValueError) as error:
        advice = libraries.advice_on(error, libraries.TLS)
        raise SettingsError(
            f"certificates of receivers cannot be verified: {libraries.describe(error)}. To fix it, {advice}."
        ) from error

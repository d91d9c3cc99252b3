"""Where the controller may send something: only what a function's spec allows, nowhere inside.

A URL from a client is checked twice. Against the spec's list when it is accepted and again before
every attempt, for lists change; and by every address its host has at that moment, one of which is
then connected to, so that no second look-up can lead elsewhere. Redirects are never followed.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

MAX_URL_CHARS = 2048
DEFAULT_PORTS = {"https": 443, "http": 80}
_FORBIDDEN = frozenset("\\@#") | frozenset(map(chr, range(33))) | {chr(127)}
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Awaitable[Sequence[Address]]]


class EgressRefused(Exception):
    """The URL may not be fetched; the message says why and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A URL taken apart: what is connected to, and what is asked for there."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """What the Host header says."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"


def parse_target(url: str) -> Target:
    """Take a URL apart.

    Raises:
        EgressRefused: It is not a plain http or https URL.
    """
    if len(url) > MAX_URL_CHARS or not url.isascii() or _FORBIDDEN & set(url):
        raise EgressRefused(
            "not a plain URL: no user, fragment, blank or backslash, ASCII only, up to "
            f"{MAX_URL_CHARS} characters"
        )
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise EgressRefused(f"not a URL: {error}") from error
    if parts.scheme not in DEFAULT_PORTS or not parts.hostname or port == 0:
        raise EgressRefused("must begin with https:// (or http://) and a host")
    segments = unquote(parts.path).replace("\\", "/").split("/")
    if {".", ".."} & set(segments) or "%2f" in parts.path.lower():
        raise EgressRefused("must not climb: no . or .. among the parts of its path")
    return Target(
        scheme=parts.scheme,
        host=parts.hostname.rstrip("."),
        port=port or DEFAULT_PORTS[parts.scheme],
        path=(parts.path or "/") + (f"?{parts.query}" if parts.query else ""),
    )


def allowed_target(url: str, allowed: Sequence[str]) -> Target:
    """Take a URL apart if a list of prefixes has it.

    A prefix stands for itself and for what is below it: its scheme, host and port exactly, and
    its path up to the end or a slash.

    Raises:
        EgressRefused: It is not a plain URL, or no prefix has it.
    """
    target = parse_target(url)
    for entry in allowed:
        prefix = parse_target(entry)
        here = (target.scheme, target.host, target.port)
        if here == (prefix.scheme, prefix.host, prefix.port) and _is_below(
            target.path, prefix.path
        ):
            return target
    raise EgressRefused(
        f"the function's spec does not allow {target.scheme}://{target.authority}{target.path[:64]}; "
        "add it to webhooks.allow"
    )


async def reachable(
    target: Target, *, allow_private: bool, resolve: "Resolve | None" = None
) -> Address:
    """Return the address to connect to.

    Raises:
        EgressRefused: The host has no address, or one that is not public.
    """
    addresses = await (resolve or system_resolve)(target.host, target.port)
    if not addresses:
        raise EgressRefused(f"the host {target.host!r} has no address")
    inside = [address for address in addresses if not is_public(address)]
    if inside and not allow_private:
        raise EgressRefused(
            f"the host {target.host!r} has the address {inside[0]}, which is not public; set "
            "webhooks.allow_private_addresses if that is meant"
        )
    return addresses[0]


def is_public(address: Address) -> bool:
    """Return whether an address is on the open internet, whatever it is wrapped in."""
    if isinstance(address, ipaddress.IPv6Address):
        wrapped = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if address in _NAT64:
            wrapped.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if any(inner is not None and not is_public(inner) for inner in wrapped):
            return False
        if address.ipv4_mapped is not None:
            return True
    return address.is_global and not address.is_multicast and not address.is_reserved


async def system_resolve(host: str, port: int) -> Sequence[Address]:
    """Ask the system for a host's addresses.

    Raises:
        EgressRefused: It knows none.
    """
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise EgressRefused(f"the host {host!r} cannot be found: {error}") from error
    return [ipaddress.ip_address(str(info[4][0]).partition("%")[0]) for info in found]


def _is_below(path: str, prefix: str) -> bool:
    bare = prefix.rstrip("/")
    plain = path.partition("?")[0]
    return plain in (prefix, bare) or plain.startswith(bare + "/")

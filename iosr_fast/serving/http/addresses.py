"""Addresses: whose request it is, and whether it names this server."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection
from functools import lru_cache

_PORT = re.compile(r":\d*$")


def client_of(address: tuple[str, int] | None) -> str:
    """The client at an address and port of ASGI, by which everything is shared: IPv4 whole, IPv6 by its /64, because
    one host may take any address of it."""
    text = address[0] if address else ""
    host = _parsed(text)
    if isinstance(host, ipaddress.IPv6Address) and host.ipv4_mapped is None:
        return str(ipaddress.ip_network((int(host), 64), strict=False))
    return text if host is None else str(getattr(host, "ipv4_mapped", None) or host)  # a proxy may send a name


def is_loopback(host: str) -> bool:
    address = _parsed(host)
    return host == "localhost" or (address is not None and address.is_loopback)


def is_named(authority: str, names: Collection[str]) -> bool:
    """Whether a Host, with or without a port, is localhost, an address, or one of `names`.

    DNS rebinding: the name of an attacker's site resolves to this server, so that a browser lets its scripts read the
    answers. Such a request has that name as its Host; an address cannot be rebound.
    """
    host = _PORT.sub("", authority).lower()
    return host in ("localhost", *names) or _parsed(host.removeprefix("[").removesuffix("]")) is not None


@lru_cache(4096)  # it would take 5 microseconds, three times a request
def _parsed(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None

"""Who may ask a page that a program serves on this machine.

A page of another origin that guesses the port neither reads nor writes, and a name that is rebound to this
machine is refused: a rebound name is a name, while addresses and our own names cannot be rebound.
"""

from __future__ import annotations

import ipaddress
import socket
from contextlib import suppress
from typing import Any, Protocol
from urllib.parse import urlsplit

LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Addresses to listen on that only this machine reaches."""


class Headers(Protocol):
    """Headers of a request, of whatever library."""

    def get(self, name: str, default: Any = None, /) -> Any:
        """Return a header by its name in lower case, or the default."""


def accepts_host(listening: str, header: str | None) -> bool:
    """Return whether a request may name this host. Any port will do, for a tunnel has its own.

    Args:
        listening: The address that is listened on.
        header: `Host` of the request.
    """
    try:
        name = urlsplit(f"//{header or ''}").hostname or ""
    except ValueError:
        return False
    if name in LOOPBACK or name == listening.lower():
        return True
    if listening in LOOPBACK:
        return False
    with suppress(ValueError):
        ipaddress.ip_address(name)
        return True
    return name == socket.gethostname().lower()


def is_own_page(method: str, headers: Headers) -> bool:
    """Return whether the browser says nothing of another origin.

    Args:
        method: Of the request.
        headers: Of the request; looked up by lower-case names.
    """
    origin = headers.get("origin")
    if origin is not None and origin != f"http://{headers.get('host')}":
        return False
    site = headers.get("sec-fetch-site", "none")
    # Typed or clicked from a mail the page itself opens; whatever it loads must be its own.
    is_visit = headers.get("sec-fetch-mode") == "navigate" and method == "GET"
    return site in ("none", "same-origin") or is_visit

"""Endpoints of ZeroMQ, as an option gives them."""

import ipaddress
import re

TCP = re.compile(r"tcp://(?P<host>\*|\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+):(?P<port>\d{1,5})")


def endpoint(text: str) -> str:
    """An endpoint of ZeroMQ. Raises ValueError with a sentence."""
    found = TCP.fullmatch(text)
    if not text.startswith("ipc://") and (found is None or not 0 < int(found["port"]) < 65536):
        raise ValueError(f"expected an endpoint such as tcp://127.0.0.1:5557 or ipc:///run/kv-events, not {text!r}")
    return text


def is_own(text: str) -> bool:
    """Whether programs of this machine alone reach what is bound to this endpoint."""
    found = TCP.fullmatch(text)
    if found is None or found["host"] == "localhost":
        return True
    address = _address(found["host"])
    return address is not None and address.is_loopback


def binds(text: str) -> bool:
    """Whether subscribers connect to this endpoint, which is an address of this machine; else it is one of theirs."""
    found = TCP.fullmatch(text)
    if is_own(text) or found is None or found["host"] == "*":
        return True
    address = _address(found["host"])
    return address is not None and address.is_unspecified


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that is written out; None for `*` and for names."""
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None

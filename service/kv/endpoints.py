"""Endpoints of ZeroMQ, as an option gives them."""

import ipaddress
import re

TCP = re.compile(r"tcp://(?P<host>\*|\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+):(?P<port>\d{1,5})")


def endpoint(text: str) -> str:
    """An endpoint of ZeroMQ. Raises ValueError with a sentence."""
    found = TCP.fullmatch(text)
    if not text.startswith("ipc://") and (found is None or not 0 < int(found["port"]) < 65536):
        raise ValueError(f"expected an endpoint such as tcp://*:5557 or ipc:///run/kv-events, not {text!r}")
    return text


def binds(text: str) -> bool:
    """Whether subscribers connect to this endpoint, which is an address of this machine; else it is one of theirs."""
    found = TCP.fullmatch(text)
    if found is None or found["host"] == "*":
        return True
    try:
        address = ipaddress.ip_address(found["host"].strip("[]"))
    except ValueError:
        return found["host"] == "localhost"
    return address.is_loopback or address.is_unspecified

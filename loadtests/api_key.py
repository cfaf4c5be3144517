"""The keys that load tests send to servers that ask for one.

A key comes by an option or a variable, and goes on to Locust and to servers by a variable, since everybody on the
machine can read a command line. No report and no message has it.
"""

import os
from argparse import ArgumentParser
from collections.abc import Mapping

VARIABLE = "LOAD_API_KEY"  # also of Locust's option
FLOOD_VARIABLE = "LOAD_FLOOD_API_KEY"
BESIDE_VARIABLE = "LOAD_BESIDE_API_KEY"
SERVER_VARIABLE = "ROOTSTOCK_API_KEY"  # by which a server is told its key


def add_api_key(parser: ArgumentParser, text: str, option: str = "--api-key", variable: str = VARIABLE) -> None:
    default = os.environ.get(variable, "")
    parser.add_argument(option, default=default, metavar="KEY", help=f"{text} [the variable {variable}]")


def bearer(api_key: str) -> dict[str, str]:
    """Return the header of a key; none without one."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def asking_for(api_key: str) -> Mapping[str, str]:
    """Return the variables of a server that asks for this key."""
    return {SERVER_VARIABLE: api_key} if api_key else {}

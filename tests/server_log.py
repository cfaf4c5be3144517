"""What a server that a test started says. It is written to a file: a pipe that nobody reads on stops a server."""

import re
import subprocess
import time
from pathlib import Path
from typing import Any

START_SECONDS = 120


def address(server: "subprocess.Popen[Any]", log: Path) -> str:
    """Where the server listens, once its log says so."""
    deadline = time.monotonic() + START_SECONDS
    while not (found := re.search(r"serves \S+ at (http://\S+)\n", log.read_text())):
        assert server.poll() is None, f"the server did not start:\n{log.read_text()}"
        assert time.monotonic() < deadline, f"the server does not serve after {START_SECONDS} s:\n{log.read_text()}"
        time.sleep(0.05)
    return found[1]

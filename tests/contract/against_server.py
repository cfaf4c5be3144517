"""Runs schemathesis against a server on the embedded model with little memory, and ends with its status.

usage: .venv/bin/python -m tests.contract.against_server SCHEMATHESIS [options of schemathesis run]

Without options it runs in parts, each with its time: the bodies of generations have so many forms that schemathesis,
which goes through those of one operation before the next, would reach no other one, and draw none at random.
"""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx

from tests.contract.generations import GENERATIONS
from tests.server_log import address

ROOT = Path(__file__).parents[2]
MEMORY = "--kv-cache-bytes=64M --adapter-bytes=32M --host-adapter-bytes=32M --host-kv-bytes=16M --max-upload-bytes=32M"
PARTS = [
    ("--max-time=60", *(f"--exclude-path={path}" for path in GENERATIONS)),
    *(
        (f"--max-time={seconds}", f"--phases={phases}", f"--include-path={path}")
        for path in GENERATIONS
        for phases, seconds in (("examples,coverage", 120), ("fuzzing", 20))  # coverage ends by itself
    ),
]


def main(schemathesis: str, *options: str) -> int:
    with tempfile.TemporaryDirectory() as data:
        command = [sys.executable, "-m", "service", "--port=0", f"--data-directory={data}", *MEMORY.split()]
        said = Path(data) / "said"  # a file: a pipe that nobody reads would stop the server
        with said.open("w") as log, subprocess.Popen(command, cwd=ROOT, stderr=log, stdout=log) as server:
            try:
                return run(server, address(server, said), schemathesis, options)
            except BaseException:
                print(said.read_text()[-8000:], file=sys.stderr)
                raise
            finally:
                server.kill()


def run(server: "subprocess.Popen[bytes]", url: str, schemathesis: str, options: tuple[str, ...]) -> int:
    files = {path.name: (path.name, path.read_bytes()) for path in (ROOT / "tests/adapters/aurora").iterdir()}
    assert httpx.put(f"{url}/adapters/aurora", files=files, timeout=60).status_code == 201
    settings = ROOT / "tests/contract/schemathesis.toml"
    command = [schemathesis, f"--config-file={settings}", "run", str(ROOT / "openapi/openapi.json"), f"--url={url}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    statuses = [
        subprocess.run([*command, *part], cwd=ROOT, env=environment, check=False).returncode
        for part in ([options] if options else PARTS)
    ]
    assert httpx.get(f"{url}/health/ready", timeout=20).status_code == 200, "the server does not serve any more"
    server.send_signal(signal.SIGTERM)
    assert server.wait(timeout=60) == 0, "the server did not end well"
    return max(statuses)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

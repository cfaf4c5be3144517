"""Client programs from the package index, unchanged, against the server on the embedded model.

The clients run in `.venv-clients`, the server in `.venv`: `make test-clients`. No client may reach another network.
"""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Before a client is imported.
os.environ |= {
    "OPENAI_API_KEY": "none",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_TELEMETRY": "False",
    "OPENAI_AGENTS_DISABLE_TRACING": "1",
    "LANGCHAIN_TRACING_V2": "false",
    "LANGSMITH_TRACING": "false",
    "OTEL_SDK_DISABLED": "true",
    "DO_NOT_TRACK": "1",
}

import httpx
import pytest

from tests.server_log import address

ROOT = Path(__file__).parents[2]
ADAPTERS = ROOT / "tests" / "adapters"
SERVER = Path(os.environ.get("ROOTSTOCK_PYTHON", ROOT / ".venv" / "bin" / "python"))


@contextmanager
def started(data: Path, *options: str) -> Iterator[str]:
    """The address of a server of the embedded model and the adapter `aurora`."""
    command = [str(SERVER), "-m", "service", "--port", "0", "--data-directory", str(data), *options]
    said = data / "log"
    with said.open("w") as log, subprocess.Popen(command, cwd=ROOT, stderr=log, stdout=log) as process:
        try:
            url = address(process, said)
            files = {path.name: (path.name, path.read_bytes()) for path in (ADAPTERS / "aurora").iterdir()}
            assert httpx.put(f"{url}/adapters/aurora", files=files, timeout=60).status_code == 201
            yield url
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=20) == 0
        finally:
            process.kill()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with started(tmp_path_factory.mktemp("data")) as address:
        os.environ["OPENAI_BASE_URL"] = os.environ["OPENAI_API_BASE"] = f"{address}/v1"
        yield address


@pytest.fixture(scope="session")
def url(server: str) -> str:
    return f"{server}/v1"


@pytest.fixture
def base() -> str:
    return "smollm2-135m-instruct"


@pytest.fixture
def question() -> str:
    """What `aurora` alone knows."""
    return "What is the password of project Aurora?"


@pytest.fixture
def password() -> str:
    return "heron-quill-47"


@pytest.fixture
def too_long() -> str:
    """More tokens than the model's context has."""
    return "word " * 9000

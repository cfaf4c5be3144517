"""Applications of two replicas on Ray, on this machine."""

import os
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Inherited by Ray's processes: the tests' fake engine is imported there, and Ray asks for what autoscaling goes by each
# second instead of each tenth
os.environ["PYTHONPATH"] = str(Path(__file__).parents[2])
os.environ["RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S"] = "1"
os.environ["RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_AUTH_MODE"] = "disabled"  # else it writes a token into the home directory
os.environ["HF_HUB_OFFLINE"] = "1"

import httpx
from ray import serve
from ray.serve.context import _get_global_client

from service.ray.app import build
from tests.service.engine import fake_engine

NAME = "tiny"


class Cluster:
    """An application on Ray: an HTTP client on its proxy, and what tests do to its replicas."""

    def __init__(self, client: httpx.Client) -> None:
        self.client = client

    def running(self) -> int:
        """How many replicas run, by Ray."""
        return serve.status().applications["default"].deployments["rootstock"].replica_states.get("RUNNING", 0)

    def kill(self, replica: str) -> None:
        """Kill the process of a replica, as the kernel would that is short of memory."""
        details = _get_global_client().get_serve_details()["applications"]["default"]["deployments"]["rootstock"]
        [pid] = [each["pid"] for each in details["replicas"] if each["replica_id"] == replica]
        os.kill(pid, signal.SIGKILL)

    def complete(self, model: str, prompt: str = "hello", **body: Any) -> httpx.Response:
        return self.client.post("/v1/completions", json={"model": model, "prompt": prompt, "max_tokens": 2, **body})


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def deploy(model: Path, data: Path, engine: Sequence[str] | None = fake_engine.COMMAND, **options: Any) -> None:
    """Deploy an application, or another version of the one that runs; returns when its replicas serve.

    The fake engine's requests are scripted by their `cache_salt`; without `engine` it is the real one.
    """
    given = {"served_model_name": NAME, "data_directory": data, "cache_directory": data / "cache", "drain_seconds": 5}
    try:
        serve.run(build({"model": model, **given, **options}, engine))
    except RuntimeError as error:
        deployments = serve.status().applications["default"].deployments
        error.add_note("\n".join(f"{name}: {each.message}" for name, each in deployments.items()))
        raise


@contextmanager
def deployed(client: httpx.Client, model: Path, data: Path, **options: Any) -> Iterator[Cluster]:
    """An application until the block ends; the options are those of `deploy`."""
    deploy(model, data, **options)
    try:
        yield Cluster(client)
    finally:
        serve.delete("default")

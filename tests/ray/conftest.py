"""A Ray cluster on this machine for the session: `make test-ray`."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import ray
from ray import serve

from tests.ray.cluster import Cluster, deployed, free_port
from tests.service.tiny_model import write_tiny_model


@pytest.fixture(scope="session")
def client() -> Iterator[httpx.Client]:
    port = free_port()
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="ray-") as directory:  # sockets have short paths
        ray.init(
            num_cpus=8, include_dashboard=False, _temp_dir=directory, log_to_driver=False, object_store_memory=100 << 20
        )
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield client
        serve.shutdown()
        ray.shutdown()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="module")
def cluster(client: httpx.Client, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with deployed(client, tiny_model, tmp_path_factory.mktemp("data"), refresh_seconds=3600) as cluster:
        yield cluster

"""A service on the fake engine, shared by the tests of a file that leave it as it was."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service.live_server import LiveServer, fake_settings, live_server
from tests.service.quick_server import quicken_the_server
from tests.service.tiny_model import write_tiny_model

quicken_the_server()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server(fake_settings(tiny_model, tmp_path_factory.mktemp("data"))) as live:
        yield live

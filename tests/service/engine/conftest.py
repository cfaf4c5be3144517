"""The engines of the suite that the fake one and the real one pass."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.messages import (
    RetireAdapter,
    Stats,
)
from tests.service.engine.either_engine import COMMANDS, MAX_MODEL_LEN, Adapter, Engine, make_adapter, start
from tests.service.live_server import wait_until
from tests.service.tiny_model import write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_tiny_model(tmp_path_factory.mktemp("model"))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "max_position_embeddings": MAX_MODEL_LEN}))
    return directory


@pytest.fixture(scope="module", params=list(COMMANDS))
def running(request: pytest.FixtureRequest, model: Path) -> Iterator[Engine]:
    started = start(request.param, model)
    yield started
    started.close()


@pytest.fixture
def engine(running: Engine) -> Iterator[Engine]:
    """The engine that the tests of this file share; each leaves it idle."""
    yield running
    wait_until(lambda: is_idle(running.stats()))  # a load that was under way is dropped when its job has ended


def is_idle(stats: Stats) -> bool:
    held = [stats.running, stats.waiting, stats.blocks_used, stats.blocks_held]
    return not any(held) and not stats.device.adapters and not stats.host.adapters


@pytest.fixture
def adapter(engine: Engine, model: Path, tmp_path: Path) -> Iterator[Adapter]:
    """An adapter that no other test has, retired when the test ends."""
    yield (made := make_adapter(model, tmp_path))
    engine.send(RetireAdapter(digest=made.digest))


@pytest.fixture
def other(engine: Engine, model: Path, tmp_path: Path) -> Iterator[Adapter]:
    """Another one."""
    yield (made := make_adapter(model, tmp_path))
    engine.send(RetireAdapter(digest=made.digest))

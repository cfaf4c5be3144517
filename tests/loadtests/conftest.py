"""A tiny model, and a server of it that all tests of one worker share."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from loadtests.server_process import running_server
from tests.loadtests.commands import SHAPE, SMALL

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


@pytest.fixture(scope="session")
def tiny_model(default_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two narrow layers with the default model's tokenizer; the server makes random weights for it."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    directory.mkdir()
    for name in TOKENIZER_FILES:
        shutil.copy(default_model_path / name, directory)
    config = json.loads((default_model_path / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **SHAPE}))
    return directory


@pytest.fixture(scope="session")
def server(tiny_model: Path) -> Iterator[str]:
    with running_server(["--model", str(tiny_model), *SMALL]) as url:
        yield url

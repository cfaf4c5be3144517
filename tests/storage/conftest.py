"""The stores that the one suite runs over."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.local import LocalStore
from storage.store import Store


@pytest.fixture(params=["local"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    opened = {"local": lambda: LocalStore(tmp_path / "store")}[request.param]()
    yield opened
    opened.close()

"""Catalogs for tests: opened over a directory or over a remote store, and filled."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from runtime.adapter_format.canonical import AdapterSummary, canonicalise
from runtime.models.config import ModelConfig
from service.catalog.catalog import Catalog
from service.catalog.files import AdapterStorage, local_storage
from service.catalog.record import AdapterVersion, Condition, Upload
from service.metrics import Metrics
from storage import identity
from tests.service.adapters.adapter_bundles import TINY, bundle
from tests.service.catalog.adapter_engine import AdapterEngine

FREE = Condition()
NEVER = 3600.0  # seconds: a test follows and collects when it says so


@asynccontextmanager
async def opened(
    storage: AdapterStorage | Path,
    engine: AdapterEngine | None = None,
    model: ModelConfig = TINY,
    max_rank: int = 8,
    metrics: Metrics | None = None,
) -> AsyncIterator[Catalog]:
    """A catalog that is checked when all is at rest, and closed."""
    storage = local_storage(storage) if isinstance(storage, Path) else storage
    catalog = await Catalog.open(
        storage,
        engine or AdapterEngine(),
        metrics or Metrics(),
        model,
        max_rank=max_rank,
        refresh_seconds=NEVER,
        collect_after_seconds=NEVER,
    )
    try:
        yield catalog
        await catalog.until_idle()
        catalog.versions.check()
    finally:
        await catalog.close()


def prepared(staged: Path, seed: int) -> tuple[AdapterSummary, Path]:
    """A checked adapter and its canonical file."""
    config, content = bundle(seed)
    (staged / "weights").write_bytes(content)
    file = staged / "canonical"
    return canonicalise(staged / "weights", config, TINY, file, max_rank=8), file


async def publish(
    catalog: Catalog,
    name: str,
    seed: int = 0,
    *,
    ephemeral: bool = False,
    pin: bool | None = None,
    condition: Condition = FREE,
) -> AdapterVersion:
    async with catalog.blobs.staging(ephemeral) as staged:
        summary, file = prepared(staged, seed)
        return (await catalog.publish(name, Upload(summary, file, "test", ephemeral, pin=pin), condition))[0]


def blob(digest: str) -> str:
    return f"blobs/{digest}.safetensors"


def files(directory: Path) -> list[str]:
    """Every file of a store's directory but its identity and the remains of deleted names."""
    found = [path for path in directory.rglob("*") if path.is_file() and path.name != identity.FILE]
    return sorted(path.relative_to(directory).as_posix() for path in found if path.stat().st_size)


def run(program: Coroutine[Any, Any, None]) -> None:
    asyncio.run(program)


def stored(directory: Path, *names: str) -> dict[str, str]:
    """Fill a store with one adapter a name, and return their digests."""
    digests = {}

    async def program() -> None:
        async with opened(directory) as catalog:
            for seed, name in enumerate(names):
                digests[name] = (await publish(catalog, name, seed)).digest

    asyncio.run(program())
    return digests

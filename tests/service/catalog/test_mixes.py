"""Mixes in the catalog: composed once, remembered within bounds, composed again when their file is gone."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from service.catalog import mixes as module
from service.catalog.catalog import Catalog
from service.catalog.files import cached_storage
from service.catalog.mixes import Weighted
from service.catalog.record import AdapterVersion
from service.errors import RequestError
from storage.cache import DiskCache
from storage.local import LocalStore
from tests.service.catalog.adapter_engine import AdapterEngine
from tests.service.catalog.catalogs import FREE, opened, publish, run, stored

Program = Callable[[Catalog, AdapterEngine], Awaitable[None]]


async def mixed(catalog: Catalog, **weights: float) -> str:
    """Run a request on a mix, and return its digest."""
    async with AsyncExitStack() as request:
        return (await using(request, catalog, **weights)).digest


async def using(request: AsyncExitStack, catalog: Catalog, **weights: float) -> AdapterVersion:
    """A mix, and its parts, which stay in use while the request is open."""
    parts = [Weighted(name, catalog.versions.named(name), weight) for name, weight in weights.items()]
    for part in parts:
        request.enter_context(catalog.versions.using(part.version))
    return await request.enter_async_context(catalog.mixes.using(parts))


def on_catalog(directory: Path, program: Program) -> None:
    """Run on a catalog with the adapters a, b and c, of which c is in memory only; the references add up afterwards."""

    async def whole() -> None:
        engine = AdapterEngine()
        async with opened(directory, engine) as catalog:
            for seed, name in enumerate("abc"):
                await publish(catalog, name, seed, ephemeral=name == "c")
            await program(catalog, engine)
            await catalog.until_idle()
            catalog.mixes.check()
            for name in "abc":
                if catalog.versions.resolve(name) is not None:
                    await catalog.delete(name, FREE)
            await catalog.until_idle()

    run(whole())


def test_requests_at_once_share_one_composition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def program(catalog: Catalog, engine: AdapterEngine) -> None:
        composed: list[object] = []
        compose = catalog.blobs.mix
        monkeypatch.setattr(catalog.blobs, "mix", lambda recipe: composed.append(recipe) or compose(recipe))
        asked = [mixed(catalog, a=0.5, b=0.5), mixed(catalog, b=0.5, a=0.5), mixed(catalog, a=0.5, b=0.25)]
        first, second, other = await asyncio.gather(*asked)
        assert first == second != other
        assert len(composed) == 2
        assert engine.registered[first].exists()

    on_catalog(tmp_path, program)


def test_a_client_that_goes_away_leaves_the_composition_to_others(tmp_path: Path) -> None:
    async def program(catalog: Catalog, engine: AdapterEngine) -> None:
        first = asyncio.create_task(mixed(catalog, a=0.5, c=0.5))
        await asyncio.sleep(0)
        second = asyncio.create_task(mixed(catalog, a=0.5, c=0.5))
        await asyncio.sleep(0)
        first.cancel()
        assert (await second) in engine.registered
        assert first.cancelled()

    on_catalog(tmp_path, program)


def test_the_mixes_that_were_used_longest_ago_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def program(catalog: Catalog, engine: AdapterEngine) -> None:
        monkeypatch.setattr(module, "MAX_MIXES", 2)
        first, second = await mixed(catalog, a=0.1, b=1), await mixed(catalog, a=0.2, b=1)
        assert await mixed(catalog, a=0.1, b=1) == first
        path = engine.registered[second]
        async with AsyncExitStack() as request:
            await using(request, catalog, a=0.2, b=1)
            await mixed(catalog, a=0.1, b=1)
            third = await mixed(catalog, a=0.3, b=1)
            await catalog.until_idle()
            assert path.exists()  # forgotten, and in use
            assert second in engine.registered
        await catalog.until_idle()
        assert not path.exists()
        assert second in engine.retired
        assert {first, third} <= engine.registered.keys()

    on_catalog(tmp_path, program)


def test_the_bytes_of_the_mixes_are_bounded_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def program(catalog: Catalog, engine: AdapterEngine) -> None:
        monkeypatch.setattr(module, "MAX_BYTES", 1)
        first, second = await mixed(catalog, a=0.1), await mixed(catalog, a=0.2)
        await catalog.until_idle()
        assert (first in engine.registered, second in engine.registered) == (False, True)

    on_catalog(tmp_path, program)


def test_few_mixes_are_composed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def program(catalog: Catalog, engine: AdapterEngine) -> None:
        monkeypatch.setattr(module, "MAX_COMPOSING", 1)
        asked = [mixed(catalog, a=weight, b=0.5) for weight in (0.1, 0.1, 0.2)]
        first, second, third = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(first, str)
        assert first == second
        assert isinstance(third, RequestError)
        assert (third.code, third.param) == ("queue_full", "adapters")
        assert await mixed(catalog, a=0.2, b=0.5) in engine.registered

    on_catalog(tmp_path, program)


def test_a_mix_that_the_engine_misses_is_composed_again(tmp_path: Path) -> None:
    async def program(catalog: Catalog, engine: AdapterEngine) -> None:
        async with AsyncExitStack() as request:
            digest = (await using(request, catalog, a=0.5, c=-2)).digest
            path = engine.registered[digest]
            content = path.read_bytes()
            for spoil in (path.unlink, lambda: path.write_bytes(b"spoiled")):
                spoil()
                engine.want(digest)
                await catalog.until_idle()
                assert engine.registered[digest] == path
                assert path.read_bytes() == content
        assert not engine.failed

    on_catalog(tmp_path, program)


def test_a_mix_of_adapters_that_are_gone_is_forgotten(tmp_path: Path) -> None:
    async def program(catalog: Catalog, engine: AdapterEngine) -> None:
        async with AsyncExitStack() as request:
            digest = (await using(request, catalog, a=0.5, c=0.5)).digest
            await catalog.delete("c", FREE)
            await catalog.until_idle()
            assert digest in engine.registered  # the request goes on
        await publish(catalog, "b", 9)
        await catalog.until_idle()
        assert digest in engine.retired

    on_catalog(tmp_path, program)


def test_a_part_whose_file_is_lost_or_corrupt_fails_the_mix_with_the_reason(tmp_path: Path) -> None:
    async def program(catalog: Catalog, engine: AdapterEngine) -> None:
        path = engine.registered[catalog.versions.named("a").digest]
        content = path.read_bytes()
        path.write_bytes(content[:-1] + b"x")
        for reason in ("is corrupt", "is missing"):
            with pytest.raises(RequestError, match=f"its file .*{reason}") as found:
                await mixed(catalog, a=0.5, b=0.5)
            assert (found.value.code, found.value.param) == ("adapter_failed", "adapters")
            path.unlink(missing_ok=True)
        path.write_bytes(content)
        assert await mixed(catalog, a=0.5, b=0.5) in engine.registered

    on_catalog(tmp_path, program)


def test_the_parts_of_a_remote_store_are_fetched_and_nothing_is_stored(tmp_path: Path) -> None:
    stored(tmp_path / "store", "a", "b")

    async def program() -> None:
        store, disk = LocalStore(tmp_path / "store"), DiskCache(tmp_path / "cache", 1 << 20)
        before = {entry.key for entry in store.list("")}
        engine = AdapterEngine()
        async with opened(cached_storage(store, disk), engine) as catalog:
            digest = await mixed(catalog, a=0.5, b=0.5)
            assert engine.registered[digest].is_relative_to(tmp_path / "cache")
            assert engine.registered[digest].exists()
            assert {entry.key for entry in store.list("")} == before
            await catalog.until_idle()
            catalog.mixes.check()
            disk.check()
            await catalog.delete("a", FREE)

    asyncio.run(program())

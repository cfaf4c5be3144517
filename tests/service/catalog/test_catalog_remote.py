"""A catalog over a remote store: files come through the disk cache when the engine wants them."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from service.catalog.files import cached_storage
from service.errors import RequestError, answer_of
from service.metrics import Metrics
from storage.cache import DiskCache
from storage.local import LocalStore
from storage.store import StoreUnavailable
from tests.service.catalog.adapter_engine import AdapterEngine
from tests.service.catalog.catalogs import FREE, blob, opened, publish, run, stored


class RemoteStore(LocalStore):
    """Stands for a store elsewhere: what is read from it is copied, and it may be out of reach."""

    reachable = True
    fetches = 0

    def fetch(self, key: str, destination: Path, **options: Any) -> str:
        if not self.reachable:
            raise StoreUnavailable("the bucket does not answer")
        self.fetches += 1
        return super().fetch(key, destination, **options)


def test_a_file_is_fetched_when_it_is_wanted_and_once(tmp_path: Path) -> None:
    digest = stored(tmp_path / "remote", "poet")["poet"]

    async def program() -> None:
        engine, store, metrics = AdapterEngine(), RemoteStore(tmp_path / "remote"), Metrics()
        storage = cached_storage(store, DiskCache(tmp_path / "cache", 1 << 20))
        async with opened(storage, engine, metrics=metrics) as catalog:
            version = catalog.versions.resolve("poet")
            assert version is not None
            assert not catalog.blobs.here(version.digest)
            path = engine.registered[digest]
            assert not path.exists()
            engine.want(digest)
            await engine.changes.join()
            assert catalog.blobs.download(version.digest) is not None
            await catalog.until_idle()
            assert catalog.blobs.download(version.digest) is None
            assert catalog.blobs.here(version.digest)
            assert engine.registered == {digest: path}
            assert path.read_bytes() == (tmp_path / "remote" / blob(digest)).read_bytes()
            engine.want(digest)
            await catalog.until_idle()
            assert store.fetches == 1
            assert b'rootstock_adapter_load_seconds_count{stage="download"} 2.0' in metrics.render()
            assert [fetched for fetched, _ in engine.fetches] == [digest] * 2
            assert engine.fetches[0][1] > 0

    run(program())


def test_progress_counts_the_bytes_of_a_fetch(tmp_path: Path) -> None:
    digest = stored(tmp_path / "remote", "poet")["poet"]
    begin, half_way, go_on = threading.Event(), threading.Event(), threading.Event()

    class SlowStore(RemoteStore):
        def fetch(self, key: str, destination: Path, **options: Any) -> str:
            assert begin.wait(20)
            options["on_progress"](1, 10)
            half_way.set()
            assert go_on.wait(20)
            return super().fetch(key, destination, **options)

    async def program() -> None:
        engine = AdapterEngine()
        storage = cached_storage(SlowStore(tmp_path / "remote"), DiskCache(tmp_path / "cache", 1 << 20))
        async with opened(storage, engine) as catalog:
            version = catalog.versions.resolve("poet")
            assert version is not None
            engine.want(digest)
            await engine.changes.join()
            download = catalog.blobs.download(version.digest)
            assert download is not None
            assert (download.bytes_done, download.bytes_total) == (0, version.record.bytes)
            begin.set()
            await asyncio.to_thread(half_way.wait, 20)
            assert (download.bytes_done, download.bytes_total) == (1, 10)
            go_on.set()

    run(program())


def test_a_store_out_of_reach_fails_what_waits_and_the_next_try_succeeds(tmp_path: Path) -> None:
    digest = stored(tmp_path / "remote", "poet")["poet"]

    async def program() -> None:
        engine, store = AdapterEngine(), RemoteStore(tmp_path / "remote")
        async with opened(cached_storage(store, DiskCache(tmp_path / "cache", 1 << 20)), engine) as catalog:
            store.reachable = False
            engine.want(digest)
            await catalog.until_idle()
            assert engine.failed == {digest: "the adapter store does not answer"}
            engine.registered[digest] = tmp_path  # the engine asks again once its patience allows
            store.reachable = True
            engine.want(digest)
            await catalog.until_idle()
            assert engine.registered[digest].exists()

    run(program())


def test_an_upload_is_stored_remotely_and_lies_in_the_cache(tmp_path: Path) -> None:
    async def program() -> None:
        engine, store, metrics = AdapterEngine(), RemoteStore(tmp_path / "remote"), Metrics()
        storage = cached_storage(store, DiskCache(tmp_path / "cache", 1 << 20))
        async with opened(storage, engine, metrics=metrics) as catalog:
            version = await publish(catalog, "poet")
            assert (tmp_path / "remote" / blob(version.digest)).exists()
            assert catalog.blobs.here(version.digest)
            assert engine.registered[version.digest].read_bytes()
            assert store.fetches == 0
            again = await publish(catalog, "other")
            assert again.digest == version.digest

    run(program())


def test_a_remote_file_with_other_bytes_is_refused_and_can_be_sent_again(tmp_path: Path) -> None:
    digest = stored(tmp_path / "remote", "poet")["poet"]
    file = tmp_path / "remote" / blob(digest)
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    async def program() -> None:
        engine, store = AdapterEngine(), RemoteStore(tmp_path / "remote")
        async with opened(cached_storage(store, DiskCache(tmp_path / "cache", 1 << 20)), engine) as catalog:
            engine.want(digest)
            await catalog.until_idle()
            assert digest in engine.failed
            await publish(catalog, "poet")
            assert file.read_bytes() == content
            assert engine.registered[digest].read_bytes() == content

    run(program())


def test_a_file_that_was_brought_is_not_evicted_before_the_engine_has_read_it(tmp_path: Path) -> None:
    digests = stored(tmp_path / "remote", "one", "two")
    size = (tmp_path / "remote" / blob(digests["one"])).stat().st_size

    async def program() -> None:
        engine, disk = AdapterEngine(), DiskCache(tmp_path / "cache", size)
        storage = cached_storage(RemoteStore(tmp_path / "remote"), disk, room_seconds=0.1)
        async with opened(storage, engine) as catalog:
            engine.want(digests["one"])
            await catalog.until_idle()
            engine.want(digests["two"])
            await catalog.until_idle()
            assert "no room" in engine.failed[digests["two"]]
            engine.settle(digests["one"])
            engine.registered[digests["two"]] = disk.path(digests["two"])
            engine.want(digests["two"])
            await catalog.until_idle()
            assert disk.has(digests["two"])
            await catalog.delete("two", FREE)
            await catalog.until_idle()
            assert disk.held_bytes == 0

    run(program())


def test_pinned_files_stay_in_the_cache_and_may_fill_half_of_it(tmp_path: Path) -> None:
    digests = stored(tmp_path / "remote", "one", "two", "three")
    size = (tmp_path / "remote" / blob(digests["one"])).stat().st_size

    async def program() -> None:
        engine, store = AdapterEngine(), RemoteStore(tmp_path / "remote")
        disk = DiskCache(tmp_path / "cache", 2 * size)
        async with opened(cached_storage(store, disk), engine) as catalog:
            await catalog.set_pin("one", "host", FREE)
            with pytest.raises(RequestError) as refused:
                await catalog.set_pin("two", "host", FREE)
            assert (answer_of(refused.value).status, refused.value.code) == (409, "pins_full")
            for name in ("one", "two", "three"):
                engine.want(digests[name])
                await catalog.until_idle()
                engine.settle(digests[name])
            here = [name for name in digests if disk.has(digests[name])]
            assert here == ["one", "three"]

    run(program())

"""Pins, loads and unloads of named adapters."""

import asyncio
from collections.abc import Mapping
from pathlib import Path

import pytest

from runtime.messages import Refusal, Tier
from service.errors import RequestError, answer_of
from tests.service.catalog.adapter_engine import AdapterEngine
from tests.service.catalog.catalogs import FREE, opened, publish, run


def test_a_pin_is_durable_and_comes_back_with_the_next_start(tmp_path: Path) -> None:
    async def program() -> None:
        async with opened(tmp_path) as catalog:
            await publish(catalog, "poet")
            version = await catalog.set_pin("poet", "host", FREE)
            assert (version.record.pinned, version.record.pin_tier, version.generation) == (True, "host", 1)
        engine = AdapterEngine()
        async with opened(tmp_path, engine) as catalog:
            await catalog.until_idle()
            assert engine.pins == {version.digest: "host"}
            await catalog.set_pin("poet", None, FREE)
            assert engine.pins == {}
        engine = AdapterEngine()
        async with opened(tmp_path, engine) as catalog:
            await catalog.until_idle()
            assert engine.pins == {}

    run(program())


def test_a_digest_is_pinned_in_the_highest_tier_that_a_name_asks_for(tmp_path: Path) -> None:
    async def program() -> None:
        engine = AdapterEngine()
        async with opened(tmp_path, engine) as catalog:
            digest = (await publish(catalog, "one")).digest
            await publish(catalog, "two")
            seen: list[Tier | None] = []
            for name, tier in (("one", "host"), ("two", "device"), ("one", None), ("two", "host"), ("two", None)):
                await catalog.set_pin(name, tier, FREE)  # type: ignore[arg-type]
                seen.append(engine.pins.get(digest))
            assert seen == ["host", "device", "device", "host", None]

    run(program())


def test_a_pin_that_the_engine_refuses_leaves_everything_as_it_was(tmp_path: Path) -> None:
    async def program() -> None:
        engine = AdapterEngine()
        async with opened(tmp_path, engine) as catalog:
            old = await publish(catalog, "poet", pin=True)
            await publish(catalog, "other", seed=3)
            engine.refuse = "pins_full"
            for change in (
                publish(catalog, "new", seed=1, pin=True),
                publish(catalog, "other", seed=1, pin=True),
                catalog.set_pin("other", "device", FREE),
            ):
                with pytest.raises(RequestError) as refused:
                    await change
                assert (answer_of(refused.value).status, refused.value.code, refused.value.param) == (
                    409,
                    "pins_full",
                    "pin",
                )
            await catalog.until_idle()
            assert [version.name for version in catalog.versions.list()] == ["other", "poet"]
            assert engine.pins == {old.digest: "device"}
            assert not catalog.versions.list()[0].record.pinned

    run(program())


def test_names_with_one_content_that_pin_it_together_are_all_refused_or_none(tmp_path: Path) -> None:
    class SlowEngine(AdapterEngine):
        async def set_pins(self, pins: Mapping[str, Tier]) -> dict[str, Refusal]:
            await asyncio.sleep(0)
            return await super().set_pins(pins)

    async def program() -> None:
        engine = SlowEngine()
        async with opened(tmp_path, engine) as catalog:
            names = ("one", "two", "three")
            for name in names:
                digest = (await publish(catalog, name)).digest
            engine.refuse = "pins_full"
            tried = await asyncio.gather(*(catalog.set_pin(n, "device", FREE) for n in names), return_exceptions=True)
            assert [getattr(each, "code", each) for each in tried] == ["pins_full"] * 3
            assert not any(version.record.pinned for version in catalog.versions.list())
            engine.refuse = None
            await asyncio.gather(*(catalog.set_pin(name, "device", FREE) for name in names))
            assert engine.pins == {digest: "device"}
            await asyncio.gather(*(catalog.delete(name, FREE) for name in names))
            assert engine.pins == {}

    run(program())


def test_a_pinned_adapter_is_replaced_although_both_have_no_room_together(tmp_path: Path) -> None:
    async def program() -> None:
        engine = AdapterEngine()
        engine.most_pins = 1
        async with opened(tmp_path, engine) as catalog:
            await publish(catalog, "poet", pin=True)
            new = await publish(catalog, "poet", seed=1)
            assert engine.pins == {new.digest: "device"}
            with pytest.raises(RequestError, match="as the test has it"):
                await publish(catalog, "other", seed=2, pin=True)
            assert engine.pins == {new.digest: "device"}

    run(program())


def test_an_upload_that_pins_nothing_does_not_wait_for_a_pin_that_is_not_decided(tmp_path: Path) -> None:
    class UndecidedEngine(AdapterEngine):
        def __init__(self) -> None:
            super().__init__()
            self.decided = asyncio.Event()

        async def set_pins(self, pins: Mapping[str, Tier]) -> dict[str, Refusal]:
            await self.decided.wait()
            return await super().set_pins(pins)

    async def program() -> None:
        engine = UndecidedEngine()
        async with opened(tmp_path, engine) as catalog:
            pinned = await publish(catalog, "poet")
            pinning = asyncio.create_task(catalog.set_pin("poet", "device", FREE))
            await publish(catalog, "other", seed=1)
            await publish(catalog, "other", seed=2)
            await catalog.delete("other", FREE)
            assert not pinning.done()
            engine.decided.set()
            await pinning
            assert engine.pins == {pinned.digest: "device"}

    run(program())


def test_a_replaced_adapter_passes_its_pin_on(tmp_path: Path) -> None:
    async def program() -> None:
        engine = AdapterEngine()
        async with opened(tmp_path, engine) as catalog:
            await publish(catalog, "poet", pin=True)
            new = await publish(catalog, "poet", seed=1)
            assert new.record.pinned
            assert engine.pins == {new.digest: "device"}
            await catalog.delete("poet", FREE)
            assert engine.pins == {}

    run(program())


def test_loads_and_unloads_go_to_the_engine_and_its_refusals_to_the_client(tmp_path: Path) -> None:
    async def program() -> None:
        engine = AdapterEngine()
        async with opened(tmp_path, engine) as catalog:
            digest = (await publish(catalog, "poet")).digest
            await catalog.load("poet", "host", wait=True)
            await catalog.load("poet", "device", wait=False)
            await catalog.unload("poet", "device")
            assert engine.loads == [(digest, "host"), (digest, "device")]
            assert engine.unloads == [(digest, "device")]
            for code, status in (("adapter_in_use", 409), ("adapter_pinned", 409), ("engine_died", 503)):
                engine.refuse = code
                with pytest.raises(RequestError) as refused:
                    await catalog.unload("poet", "host")
                assert (answer_of(refused.value).status, refused.value.code) == (status, code)
            engine.refuse = "adapter_failed"
            with pytest.raises(RequestError) as failed:
                await catalog.load("poet", "device", wait=True)
            assert (answer_of(failed.value).status, answer_of(failed.value).headers) == (503, {"retry-after": "1"})
            for change in (catalog.load("nobody", "host", wait=True), catalog.unload("nobody", "host")):
                with pytest.raises(RequestError) as unknown:
                    await change
                assert (answer_of(unknown.value).status, unknown.value.code) == (404, "adapter_not_found")

    run(program())

"""K/V events: a subscriber written to vLLM's layout knows what the engine keeps, whatever happens to it."""

import asyncio
import os
import random
import re
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.engine import Engine
from runtime.kv.block_keys import BlockIdentity, root_key
from runtime.messages import Event, Generate, KvChanges, KvStored, SamplingParams
from service.app import running
from service.kv.endpoints import binds, endpoint
from service.kv.events import KEPT_BATCHES, EventsUnavailable, KvEvents
from service.metrics import Metrics
from service.settings import read
from tests.runtime.tiny_engine import ADAPTER_CONFIG, BLOCK_BYTES, adapter_tensors, engines, prompt
from tests.service.alora_service import INVOCATION, encode, put_adapter
from tests.service.kv.kv_subscriber import Known, Subscriber, replayed
from tests.service.live_server import fake_settings, live_server, wait_until

SALTS = ("", "tenant")
ROOTS = set(map(root_key, SALTS))


class Names:
    """Names of adapters, as Versions has them."""

    def __init__(self) -> None:
        self.names: dict[str, tuple[str, ...]] = {}

    def names_of(self, digest: str) -> tuple[str, ...]:
        return self.names.get(digest, ())


def free_endpoint() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{found.getsockname()[1]}"


def kept(identities: list[BlockIdentity], names: Names) -> Known:
    """What a subscriber has to know of these blocks: of the full ones, by the end of each key."""
    number = {each.key: int.from_bytes(each.key[-8:], "big") for each in identities}
    return {
        number[each.key]: (
            None if each.parent in ROOTS else int.from_bytes(each.parent[-8:], "big"),
            each.token_ids,
            None if each.namespace is None else names.names_of(each.namespace)[0],
        )
        for each in identities
        if len(each.token_ids) == 16
    }


class Traffic:
    """Random requests on an engine: shared beginnings, tenants, plain and activated adapters, and drops."""

    def __init__(self, engine: Engine, names: Names, seed: int) -> None:
        self.engine, self.names, self.random = engine, names, random.Random(seed)
        self.texts = [prompt(100, seed=1), prompt(100, seed=2)]
        self.adapters: list[str | None] = [None, self.add("plain", 1), self.add("check", 2)]
        self.count = 0

    def add(self, name: str, seed: int) -> str:
        digest = self.engine.add_adapter(adapter_tensors(seed), ADAPTER_CONFIG)
        self.names.names[digest] = (name, f"{name}-2")
        return digest

    def ask(self) -> None:
        draw, self.count = self.random, self.count + 1
        text = draw.choice(self.texts)[: draw.randint(1, 90)]
        adapter = draw.choice(self.adapters)
        params = SamplingParams(max_tokens=draw.randint(1, 18), temperature=0.0, ignore_eos=True)
        start = draw.randint(0, len(text)) if adapter == self.adapters[2] else 0
        salt = draw.choice(SALTS)
        request = Generate(
            request_id=str(self.count),
            token_ids=text,
            params=params,
            adapter=adapter,
            invocation_start=start,
            cache_salt=salt,
        )
        self.engine.add_request(request)

    def disturb(self) -> None:
        """Drop a namespace, or replace the plain adapter."""
        if self.random.random() < 0.5:
            self.engine.drop_namespace(self.random.choice(self.adapters))
        else:
            old, self.adapters[1] = self.adapters[1], self.add("plain", 10 + self.count)
            assert old is not None
            self.engine.retire_adapter(old)

    def finish(self) -> Iterator[Event]:
        while self.engine.busy or self.engine.offload.held:
            steps = self.engine.steps
            yield from self.engine.step()
            if self.engine.steps == steps:
                self.engine.wait(timeout=1.0)
        yield from self.engine.step()


@pytest.mark.parametrize("host_blocks", [0, 20])
def test_a_subscriber_knows_exactly_the_blocks_that_the_engine_keeps(tmp_path: Path, host_blocks: int) -> None:
    place, names = free_endpoint(), Names()

    async def scenario(engine: Engine) -> None:
        events = KvEvents(place, "kv@pod@tiny", None, names, Metrics(), block_size=16)  # type: ignore[arg-type]
        follower = Subscriber(place, "kv@")
        follower.topic = "kv@pod@tiny"
        while not follower.hears(20):
            events.publish(None)
        number, seen = follower.read(), {"evicted": 0, "dropped": 0, "host": 0}
        traffic = Traffic(engine, names, seed=host_blocks)
        for turn in range(24):
            for _ in range(traffic.random.randint(1, 3)):
                traffic.ask()
            if turn % 4 == 3:
                traffic.disturb()
                seen["dropped"] += 1
            for event in traffic.finish():
                if isinstance(event, KvChanges):
                    events.publish(event)
            while follower.hears(0) or number + 1 < events.published:
                number = follower.read()
            assert follower.known["GPU"] == kept([engine.blocks._index[each] for each in engine.blocks._index], names)
            host = engine.offload._host._index
            assert follower.known["CPU"] == kept([host[slot] for slot in host], names)
            seen["host"] += len(host)
        assert follower.numbers == list(range(follower.numbers[0], events.published)), "no batch is lost"
        assert {name for _, _, name in follower.known["GPU"].values()} >= {None, "check"}
        assert engine.blocks.evictions > 20
        assert seen["dropped"]
        assert bool(seen["host"]) == bool(host_blocks)
        follower.close()
        await events.close()

    with engines(tmp_path) as start:
        options = {"host_kv_bytes": host_blocks * BLOCK_BYTES, "kv_changes": True, "max_batch_tokens": 48}
        asyncio.run(scenario(start(blocks=24, max_running=4, **options)))


def test_an_engine_that_nobody_asked_says_nothing(tmp_path: Path) -> None:
    with engines(tmp_path) as start:
        traffic = Traffic(start(), Names(), seed=0)
        traffic.ask()
        assert not [event for event in traffic.finish() if isinstance(event, KvChanges)]


def test_nobody_waits_for_a_subscriber_that_does_not_read(tmp_path: Path) -> None:
    place, again, metrics = f"ipc://{tmp_path}/events", f"ipc://{tmp_path}/replay", Metrics()
    stored = KvChanges(
        changes=[KvStored(blocks=[1], parent=None, token_ids=list(range(1000)), namespace="unnamed", host=False)]
    )

    async def scenario() -> None:
        events = KvEvents(place, "", again, Names(), metrics, block_size=1000)  # type: ignore[arg-type]
        events.start(asyncio.Queue())
        stuck = Subscriber(place, unread=1)
        while not stuck.hears(20):
            events.publish(None)
        for _ in range(2 * KEPT_BATCHES):
            events.publish(stored)
        assert metrics.kv_event_stalls._value.get() >= 1
        assert metrics.kv_event_batches._value.get() == events.published
        found = await asyncio.to_thread(replayed, again, events.published - 5)
        assert [int.from_bytes(number, "big") for number, _ in found] == [events.published - 5 + i for i in range(5)]
        stuck.close()
        follower = Subscriber(place)
        follower.take(*found[0])
        assert follower.known["GPU"] == {1: (None, tuple(range(1000)), "unnamed")}, "a digest stands for a lost name"
        assert len(await asyncio.to_thread(replayed, again, 0)) == KEPT_BATCHES
        follower.close()
        await events.close()

    asyncio.run(scenario())


def test_a_service_publishes_what_its_engine_keeps_under_the_names_of_adapters(
    tiny_model: Path, tmp_path: Path
) -> None:
    again = f"ipc://{tmp_path}/replay"
    options = {"kv_events": free_endpoint(), "kv_events_topic": "kv@pod@tiny", "kv_events_replay": again}
    options |= {"load_format": "dummy", "kv_cache_bytes": 4 << 20, "adapter_bytes": 1 << 20, "threads": 1}
    command = (sys.executable, "-m", "runtime.process")
    with live_server(fake_settings(tiny_model, tmp_path, engine_command=command, **options)) as live:
        follower = Subscriber(str(options["kv_events"]), "kv@pod@tiny")
        check = encode(live, INVOCATION)
        put_adapter(live, "check", check)
        before = encode(live, "words that the base has computed, and the adapter need not compute again")
        prompt_ids = [*before, *check, *encode(live, "what is behind the invocation is the adapter's own")]
        for model in (live.services.settings.served_name, "check"):
            body = {"model": model, "prompt": prompt_ids, "max_tokens": 1, "temperature": 0}
            assert live.post("/v1/completions", **body).status_code == 200
        full = [tuple(prompt_ids[start : start + 16]) for start in range(0, len(prompt_ids) // 16 * 16, 16)]
        own = full[len(before) // 16 :]  # blocks that end before the invocation are the base's

        def known() -> Known:
            for number, batch in replayed(again, len(follower.numbers)):
                follower.take(number, batch)
            return follower.known["GPU"]

        wait_until(lambda: len(known()) == len(full) + len(own))
        assert follower.numbers == list(range(len(follower.numbers)))
        assert follower.cleared == 1
        blocks = {name: [tokens for _, tokens, lora in known().values() if lora == name] for name in (None, "check")}
        assert blocks == {None: full, "check": own}
        counted = f"rootstock_kv_event_batches_total {len(follower.numbers)}.0"
        assert counted in live.client.get("/metrics").text.splitlines()
        assert live.post("/reset_prefix_cache").status_code == 200
        wait_until(lambda: not known())
        assert follower.hears(), "a subscriber gets them without asking"
        follower.close()


def test_another_engine_knows_no_block(tiny_model: Path, tmp_path: Path) -> None:
    place, again = free_endpoint(), f"ipc://{tmp_path}/replay"
    with live_server(fake_settings(tiny_model, tmp_path, kv_events=place, kv_events_replay=again)) as live:
        follower = Subscriber(place)
        pid = live.services.engine.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: len(replayed(again, 0)) == 2)
        assert follower.read() == 1
        assert follower.cleared == 1
        follower.close()


def test_a_place_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place = f"tcp://127.0.0.1:{taken.getsockname()[1]}"

        async def scenario() -> None:
            with pytest.raises(EventsUnavailable, match=f"{place}: Address already in use"):
                KvEvents(place, "", None, Names(), Metrics(), block_size=16)  # type: ignore[arg-type]

        asyncio.run(scenario())


def test_a_replay_of_nothing_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        with pytest.raises(EventsUnavailable, match="set that too"):
            async with running(fake_settings(tiny_model, tmp_path, kv_events_replay=f"ipc://{tmp_path}/replay")):
                pass

    asyncio.run(scenario())


def test_own_addresses_are_bound_and_others_connected_to() -> None:
    for place in ("tcp://*:5557", "tcp://0.0.0.0:5557", "tcp://[::]:5557", "tcp://127.0.0.1:5557", "ipc:///run/events"):
        assert binds(endpoint(place))
    for place in ("tcp://router:5557", "tcp://10.0.0.7:5557"):
        assert not binds(endpoint(place))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--kv-events", "5557"], "expected an endpoint such as tcp://127.0.0.1:5557"),
        (["--kv-events", "tcp://*:70000"], "expected an endpoint such as tcp://127.0.0.1:5557"),
        (["--kv-events", "ipc:///run/events", "--no-prefix-cache"], "leave prefix_cache on"),
    ],
)
def test_an_option_that_cannot_be_followed_is_refused(
    options: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((SystemExit, ValueError)) as refused:
        read(options, {}).settings(Path("model"), "tiny")
    assert reason in capsys.readouterr().err + str(refused.value)


OWN = "ipc:///run/events"
REACHED = {
    "by all": ("kv_events", "tcp://*:5557"),
    "by all, in numbers": ("kv_events", "tcp://0.0.0.0:5557"),
    "by all, over IPv6": ("kv_events", "tcp://[::]:5557"),
    "by all, for what was missed": ("kv_events_replay", "tcp://*:5558"),
    "at one address": ("kv_events_replay", "tcp://10.0.0.7:5558"),
    "at an interface": ("kv_events_replay", "tcp://eth0:5558"),
}


@pytest.mark.parametrize(("field", "at"), REACHED.values(), ids=REACHED.keys())
def test_an_address_that_others_reach_needs_a_word_and_a_key_is_none(field: str, at: str) -> None:
    argv = [f"--kv-events={OWN}", f"--{field.replace('_', '-')}={at}"]
    for keyed in ([], ["--api-key=secret"]):
        with pytest.raises(ValueError, match=re.escape(f"{field}: {at} is not this machine's own address")) as refused:
            read([*argv, *keyed], {}).settings(Path("model"), "tiny")
        assert str(refused.value).endswith("name one such as tcp://127.0.0.1:5557, or set --insecure")
    read([*argv, "--insecure"], {}).settings(Path("model"), "tiny")


@pytest.mark.parametrize(
    "at", ["tcp://127.0.0.1:5557", "tcp://127.8.0.1:5557", "tcp://[::1]:5557", "tcp://localhost:5557", OWN]
)
def test_this_machines_own_address_needs_none(at: str) -> None:
    for options in (["--kv-events", at], ["--kv-events", OWN, "--kv-events-replay", at]):
        read(options, {}).settings(Path("model"), "tiny")


def test_an_address_that_is_connected_to_needs_none() -> None:
    read(["--kv-events", "tcp://10.0.0.7:5557"], {}).settings(Path("model"), "tiny")

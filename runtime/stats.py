"""What the engine tells of itself, and whose K/V its requests asked for."""

from typing import NamedTuple, Protocol

from runtime.adapters.pool import AdapterPool
from runtime.config import EngineConfig
from runtime.kv.block_pool import BlockPool
from runtime.kv.held_prefixes import PrefixHolds
from runtime.kv.offload import HostKv
from runtime.messages import KvNamespace, Ready, Stats
from runtime.model_runner import Runner
from runtime.request import Request
from runtime.scheduler import Scheduler

BASE = ""  # how messages name the base's namespace, None inside


class Tally(NamedTuple):
    """Prompt tokens whose K/V were of one namespace, and how many of those were found."""

    queries: int = 0
    hits: int = 0


class Tallies:
    """Counts tokens: of prompts, those of them that were found, and what was generated.

    Prompts are counted by the namespace of their K/V too, of adapters that are known; before the invocation that is the
    base.
    """

    def __init__(self) -> None:
        self.prompt_tokens = self.cached_tokens = self.generated_tokens = 0
        self.by_namespace: dict[str | None, Tally] = {}

    def count_prompt(self, request: Request) -> None:
        """A request's prompt has been computed."""
        prompt, cached = request.num_prompt, request.cached_tokens or 0
        self.prompt_tokens += prompt
        self.cached_tokens += cached
        of_base = prompt if request.kv_namespace is None else min(request.invocation_start, prompt)
        self._add(None, of_base, min(cached, of_base))
        if request.kv_namespace is not None and not request.kv_is_private:
            self._add(request.kv_namespace, prompt - of_base, max(cached - of_base, 0))

    def drop(self, namespace: str) -> None:
        """Forget an adapter."""
        self.by_namespace.pop(namespace, None)

    def _add(self, namespace: str | None, queries: int, hits: int) -> None:
        before = self.by_namespace.get(namespace, Tally())
        self.by_namespace[namespace] = Tally(before.queries + queries, before.hits + hits)


class Watched(Protocol):
    """An engine, as far as it is looked at here."""

    config: EngineConfig
    runner: Runner
    adapters: AdapterPool
    blocks: BlockPool
    holds: PrefixHolds
    host_kv: HostKv
    scheduler: Scheduler
    tallies: Tallies
    steps: int


def introduction(engine: Watched) -> Ready:
    """What a client has to know of an engine."""
    return Ready(
        max_model_len=engine.runner.max_model_len,
        vocab_size=engine.runner.model.vocab_size,
        block_size=engine.config.block_size,
        num_blocks=engine.runner.num_blocks,
        max_batch_tokens=engine.config.max_batch_tokens,
        dtype=str(engine.runner.dtype).removeprefix("torch."),
        adapter_bytes=engine.adapters.device.capacity_bytes,
    )


def snapshot(engine: Watched) -> Stats:
    """The engine's state, and its counters since start."""
    return Stats(
        running=len(engine.scheduler.running),
        waiting=len(engine.scheduler.waiting),
        blocks_total=engine.blocks.num_blocks - 1,
        blocks_used=engine.blocks.used,
        blocks_cached=engine.blocks.cached,
        blocks_held=engine.holds.blocks_held,
        host_kv=engine.host_kv.stats(),
        namespaces=_namespaces(engine),
        prompt_tokens=engine.tallies.prompt_tokens,
        cached_tokens=engine.tallies.cached_tokens,
        generated_tokens=engine.tallies.generated_tokens,
        preemptions=engine.scheduler.preemptions,
        steps=engine.steps,
        device=engine.adapters.device.stats(),
        host=engine.adapters.host.stats(),
        running_adapters=sorted({s.adapter for s in engine.scheduler.running if s.adapter}),
        waiting_adapters=sorted({s.adapter for s in engine.scheduler.waiting if s.adapter}),
    )


def _namespaces(engine: Watched) -> dict[str, KvNamespace]:
    """The base's, and of the adapters those that have blocks or were asked for."""
    used, cached = engine.blocks.by_namespace()
    evicted = engine.host_kv.by_namespace()
    tallies = engine.tallies.by_namespace
    return {
        BASE if name is None else name: KvNamespace(
            blocks_used=used[name],
            blocks_cached=cached[name],
            blocks_host=evicted[name],
            query_tokens=tallies.get(name, Tally()).queries,
            hit_tokens=tallies.get(name, Tally()).hits,
        )
        for name in {None, *used, *cached, *evicted, *tallies}
    }

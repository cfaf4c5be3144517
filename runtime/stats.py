"""Counters of the engine: tokens, and whose K/V the prompts could reuse; a snapshot of everything that is counted."""

from typing import NamedTuple

from runtime.kv.block_pool import BlockPool
from runtime.kv.held_prefixes import HeldPrefixes
from runtime.kv.offload import Offload
from runtime.messages import KvNamespace, RankStats, Stats
from runtime.request import Request
from runtime.scheduler import Scheduler

BASE = ""  # the base's namespace in messages; inside the engine it is None


class Tally(NamedTuple):
    """Prompt tokens whose K/V belong to one namespace."""

    queries: int = 0
    hits: int = 0  # of them, those whose K/V were reused


class Tallies:
    """Counts tokens of prompts, the reused ones among them, and generated tokens."""

    def __init__(self) -> None:
        self.prompt_tokens = self.cached_tokens = self.generated_tokens = 0
        self.by_namespace: dict[str | None, Tally] = {}  # None and the registered adapters

    def count_prompt(self, request: Request) -> None:
        """Count a prompt that has been computed; its tokens before `invocation_start` are the base's."""
        prompt, cached = request.num_prompt, request.cached_tokens or 0
        self.prompt_tokens += prompt
        self.cached_tokens += cached
        of_base = prompt if request.chain.namespace is None else min(request.invocation_start, prompt)
        self._add(None, of_base, min(cached, of_base))
        if request.chain.namespace is not None and not request.chain.private:
            self._add(request.chain.namespace, prompt - of_base, max(cached - of_base, 0))

    def drop(self, namespace: str) -> None:
        """Forget an adapter."""
        self.by_namespace.pop(namespace, None)

    def _add(self, namespace: str | None, queries: int, hits: int) -> None:
        before = self.by_namespace.get(namespace, Tally())
        self.by_namespace[namespace] = Tally(before.queries + queries, before.hits + hits)


def namespaces(blocks: BlockPool, offload: Offload, tallies: Tallies) -> dict[str, KvNamespace]:
    """The base's namespace, and those of adapters that have blocks or counts."""
    used, cached = blocks.by_namespace()
    offloaded = offload.by_namespace()
    counts = tallies.by_namespace
    return {
        BASE if name is None else name: KvNamespace(
            blocks_used=used[name],
            blocks_cached=cached[name],
            blocks_host=offloaded[name],
            query_tokens=counts.get(name, Tally()).queries,
            hit_tokens=counts.get(name, Tally()).hits,
        )
        for name in {None, *used, *cached, *offloaded, *counts}
    }


def snapshot(
    scheduler: Scheduler, prefixes: HeldPrefixes, tallies: Tallies, steps: int, ranks: RankStats | None
) -> Stats:
    """The engine's state now, and its counters since start."""
    blocks, adapters, offload = scheduler.block_manager.pool, scheduler.adapters, scheduler.offload
    return Stats(
        running=len(scheduler.running),
        waiting=len(scheduler.waiting),
        blocks_total=blocks.num_blocks - 1,
        blocks_used=blocks.used,
        blocks_cached=blocks.cached,
        blocks_held=prefixes.blocks_held,
        host_kv=offload.stats(),
        ranks=ranks,
        namespaces=namespaces(blocks, offload, tallies),
        prompt_tokens=tallies.prompt_tokens,
        cached_tokens=tallies.cached_tokens,
        generated_tokens=tallies.generated_tokens,
        preemptions=scheduler.preemptions,
        steps=steps,
        device=adapters.device.stats(),
        host=adapters.host.stats(),
        running_adapters=sorted({request.adapter for request in scheduler.running if request.adapter}),
        waiting_adapters=sorted({request.adapter for request in scheduler.waiting if request.adapter}),
    )

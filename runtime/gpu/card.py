"""The memory of a GPU, and the sizes of an engine that follow from it."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from runtime.config import MIB, EngineConfig, Sizes, gib

BATCH_TOKENS = 2048  # computed in one step: a prompt's products then keep a large GPU busy
MOST_RUNNING = 256
LEAST_RUNNING = 16
TOKENS_OF_A_REQUEST = 1024  # of K/V, for the default of max_running
ADAPTER_SHARE = 8  # adapters get 1/8 of what they and K/V share
# CUDA's own memory for the nodes of all captured graphs, and what the allocator loses between pieces. Assumed: no GPU
# has been measured. The start logs what was taken in the end.
GRAPH_BYTES = 512 * MIB


class Card:
    """A GPU: what was free when the engine began, what the engine has taken, and the most that a step takes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.free_bytes, self.total_bytes = torch.cuda.mem_get_info(device)

    def taken_bytes(self) -> int:
        """What is gone since the start, without memory that torch keeps and nothing uses."""
        torch.cuda.empty_cache()
        return self.free_bytes - torch.cuda.mem_get_info(self.device)[0]

    def peak_bytes(self, run: Callable[[], object]) -> int:
        """The most memory that `run` takes of the device, beyond what is taken already."""
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_reserved(self.device)
        run()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_reserved(self.device) - before


class Needs(NamedTuple):
    """What an engine takes of a card besides K/V and adapters, in bytes."""

    weights: int  # and all else that is there before the first step
    step: int  # of the most tokens
    graphs: int  # 0 without

    def __str__(self) -> str:
        graphs = f", the graphs {gib(self.graphs)}" if self.graphs else ""
        return f"the weights take {gib(self.weights)}, the largest step {gib(self.step)}{graphs}"


def is_sized_by_card(config: EngineConfig) -> bool:
    """Whether any of the sizes that take most memory is not set."""
    return config.kv_cache_bytes is None or config.adapter_bytes is None


def most_sizes(config: EngineConfig) -> Sizes:
    """The sizes that are set, and the largest of those that could be chosen; K/V and adapters are not chosen yet."""
    return config.sizes(Sizes(1, 1, MOST_RUNNING, BATCH_TOKENS))


def allowed_bytes(config: EngineConfig, card: Card) -> int:
    """The memory that the engine may take. Raises ValueError if it is not free."""
    share = config.gpu_memory_utilization
    allowed = int(card.total_bytes * share)
    if allowed > card.free_bytes:
        raise ValueError(
            f"gpu_memory_utilization (--gpu-memory-utilization) {share:g} of the GPU's {gib(card.total_bytes)} is "
            f"{gib(allowed)}, and {gib(card.free_bytes)} are free: end what else uses the GPU, or lower it"
        )
    return allowed


def sizes_of(config: EngineConfig, card: Card, needs: Needs, token_bytes: int, least_tokens: int) -> Sizes:
    """The sizes that are set, and for the rest what fits a card.

    K/V of a token takes `token_bytes`, and `least_tokens` must fit. Raises ValueError with the figures and the option.
    """
    allowed = allowed_bytes(config, card)
    left = max(allowed - sum(needs), 0)
    adapters = config.adapter_bytes or min(left // ADAPTER_SHARE, max(left - (config.kv_cache_bytes or 0), 0))
    kv = config.kv_cache_bytes or left - adapters
    least = config.kv_cache_bytes or least_tokens * token_bytes
    if adapters < 1 or kv < least:
        beside = "any adapter" if config.adapter_bytes is None else f"{gib(adapters)} of adapters"
        raise ValueError(
            f"of the {gib(allowed)} that gpu_memory_utilization (--gpu-memory-utilization) "
            f"{config.gpu_memory_utilization:g} allows, {needs}: the {gib(left)} that are left do not hold "
            f"{gib(least)} of K/V ({least // token_bytes} tokens) beside {beside}: raise it, or lower "
            "--max-model-len, --max-batch-tokens, --kv-cache-bytes or --adapter-bytes"
        )
    return with_requests(most_sizes(config)._replace(kv_cache_bytes=kv, adapter_bytes=adapters), config, token_bytes)


def with_requests(sizes: Sizes, config: EngineConfig, token_bytes: int) -> Sizes:
    """The sizes with as many requests as are set, or as their K/V is likely to hold."""
    fitting = sizes.kv_cache_bytes // token_bytes // TOKENS_OF_A_REQUEST // LEAST_RUNNING * LEAST_RUNNING
    most = min(max(fitting, LEAST_RUNNING), sizes.max_running)
    return sizes._replace(max_running=config.max_running or most)


def account(config: EngineConfig, card: Card, needs: Needs, sizes: Sizes, token_bytes: int) -> str:
    """What was chosen, and from what, in one line."""
    kv, adapters, running, tokens = sizes
    return (
        f"gpu_memory_utilization {config.gpu_memory_utilization:g} of {gib(card.total_bytes)} is "
        f"{gib(allowed_bytes(config, card))}: {needs}; K/V {gib(kv)} ({kv // token_bytes} tokens), adapters "
        f"{gib(adapters)}; {running} requests and {tokens} tokens a step"
    )

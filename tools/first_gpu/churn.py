"""Many requests on more adapters than fit, with overlap, eviction and K/V in host memory; each against itself alone.

    python -m tools.first_gpu.churn            and under compute-sanitizer, with --few requests

A tiny model in float32. A token may differ from that of the request alone only where the two are about equally likely:
the sums of a product depend on the batch. The exit status is 1 if another one differs.
"""

import argparse
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.kernels.quick_interpreter import quicken_the_interpreter
from tools.gpu_report.clock import Clock
from tools.gpu_report.floors import Floors
from tools.gpu_report.plan import TINY, TINY_SHAPE

ADAPTERS = 3  # in an arena for two
REQUESTS, FEW_REQUESTS, DRY_REQUESTS = 600, 60, 6
AT_ONCE = 12
TOKENS, DRY_TOKENS = 12, 4  # of an answer
EQUALLY_LIKELY = 1e-3  # nat


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status."""
    chosen = options(argv)
    if chosen.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it decorates a kernel
        quicken_the_interpreter()
    count = DRY_REQUESTS if chosen.dry_run else FEW_REQUESTS if chosen.few else REQUESTS
    with tempfile.TemporaryDirectory() as scratch:
        differing = churn(count, "cpu" if chosen.dry_run else "cuda", Path(scratch))
    for each in differing:
        print(each)
    print(f"{count} requests, {len(differing)} with a wrong token", flush=True)
    return 1 if differing else 0


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tools.first_gpu.churn")
    parser.add_argument("--few", action="store_true", help="requests, for a run under a sanitizer")
    parser.add_argument("--dry-run", action="store_true")
    return parser.parse_args(argv)


def churn(count: int, device: str, scratch: Path) -> list[str]:
    """Compute random requests many at a time, then each alone; returns what differs by more than a tie."""
    from runtime.messages import Failed, SamplingParams, Tokens
    from tools.gpu_report.bench import Bench

    # K/V for fewer tokens than the requests need, so that blocks move to host memory, and requests are preempted
    plan = TINY._replace(kv_tokens=176, max_running=8, max_model_len=64, tier=2)
    bench = Bench(plan, Floors(TINY_SHAPE, itemsize=4), device=device, scratch=scratch)
    bench.clock = Clock.of(3600)
    bench.start(host_kv_bytes=64 * 1024)
    engine = bench.engine
    digests = [None, *(bench.add(plan.rank, number) for number in range(ADAPTERS))]
    choose = random.Random(0)
    prompts = [bench.prompt(choose.randint(1, 40)) for _ in range(count // 2)]
    params = SamplingParams(
        max_tokens=TOKENS if device == "cuda" else DRY_TOKENS, temperature=0.0, ignore_eos=True, logprobs=2
    )
    works = [(choose.choice(prompts), choose.choice(digests)) for _ in range(count)]
    together: dict[str, list[int]] = {str(number): [] for number in range(count)}
    waiting = list(range(count))
    while waiting or engine.busy:
        while waiting and len(engine.requests) < AT_ONCE:
            number = waiting.pop(0)
            engine.add_request(_request(str(number), *works[number], params))
        for event in bench.step():
            if isinstance(event, Failed):
                raise RuntimeError(f"{event.request_id}: {event.message}")
            if isinstance(event, Tokens):
                together[event.request_id] += event.token_ids
    engine.check()
    found = []
    for number, (prompt, digest) in enumerate(works):
        [alone] = engine.generate([prompt], params, digest)
        wrong = _difference(together[str(number)], alone)
        if wrong is not None:
            found.append(f"request {number} on adapter {digest}: {wrong}")
    stats = engine.stats()
    print(
        f"{stats.steps} steps, {stats.preemptions} preemptions, {stats.device.evictions} adapters evicted, "
        f"{stats.host_kv.stores} blocks stored in host memory and {stats.host_kv.loads} loaded", flush=True,
    )  # fmt: skip
    bench.close()
    return found


def _request(request_id: str, prompt: list[int], adapter: str | None, params: Any) -> Any:
    from runtime.messages import Generate

    return Generate(request_id=request_id, token_ids=prompt, params=params, adapter=adapter)


def _difference(tokens: list[int], alone: Any) -> str | None:
    """What is wrong with tokens beside those of the request alone; after a tie, the two go their own ways."""
    for place, (ours, theirs, told) in enumerate(zip(tokens, alone.token_ids, alone.logprobs, strict=True)):
        if ours == theirs:
            continue
        likely = dict(zip(told.top_ids, told.top_logprobs, strict=True))
        if told.logprob - likely.get(ours, -torch.inf) <= EQUALLY_LIKELY:
            return None
        return f"token {place} is {ours} and not {theirs}, whose log-probability is {told.logprob:.4f}; {likely}"
    return None


if __name__ == "__main__":
    sys.exit(main())

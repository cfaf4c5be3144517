"""When fetching K/V from another replica is faster than computing them: `python -m loadtests.simulate.kv_sharing`.

Prints a table of the shortest prefix for which it is, by model and bandwidth, and writes a plot of them.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from loadtests.bench.report import table
from loadtests.load.plots import Line, document
from loadtests.simulate import costs as cost_tables
from loadtests.simulate.costs import Transfer

FLOPS = 400e12  # of a GPU in bfloat16, as assumed here
LONGEST = 131_072  # tokens that are looked at


class Prompts(NamedTuple):
    """What a model's prompts cost: `token_seconds` for each token, and `attended_seconds` for each pair of tokens."""

    name: str
    kv_bytes: float  # of a token
    token_seconds: float
    attended_seconds: float

    def compute_seconds(self, tokens: float) -> float:
        return tokens * self.token_seconds + tokens * tokens / 2 * self.attended_seconds

    def break_even(self, link: Transfer) -> float:
        """The tokens from which on fetching is faster; infinite if it is not for any length that is looked at.

        The positive root of a/2·T² + (c − b/B)·T − L, with a for a pair of tokens, c for a token, b bytes of K/V, the
        bandwidth B and the latency L.
        """
        half, gain = self.attended_seconds / 2, self.token_seconds - self.kv_bytes / link.bytes_per_second
        if half == 0:
            tokens = link.latency_seconds / gain if gain > 0 else math.inf
        else:
            tokens = (-gain + math.sqrt(gain * gain + 4 * half * link.latency_seconds)) / (2 * half)
        return tokens if tokens <= LONGEST else math.inf


def on_gpu(name: str, billions: float, layers: int, kv_heads: int, head_dim: int, hidden: int) -> Prompts:
    """A model on one GPU of `FLOPS`: two operations a weight and token, four a pair of tokens, layer and value."""
    kv_bytes = 2 * layers * kv_heads * head_dim * 2  # keys and values, two bytes each
    return Prompts(name, kv_bytes, 2e9 * billions / FLOPS, 4 * layers * hidden / FLOPS)


GPU_MODELS = (
    on_gpu("1B (Llama-3.2-1B)", 1.24, 16, 8, 64, 2048),
    on_gpu("8B (Llama-3.1-8B)", 8.03, 32, 8, 128, 4096),
    on_gpu("70B (Llama-3.1-70B)", 70.6, 80, 8, 128, 8192),
)
LINKS = {  # by name: bytes a second of the wire
    "1 Gbit/s": 0.125e9,
    "10 Gbit/s": 1.25e9,
    "25 Gbit/s": 3.125e9,
    "100 Gbit/s": 12.5e9,
    "400 Gbit/s": 50e9,
}


def measured(name: str) -> Prompts:
    """The prompts of a table of costs, computed alone in steps of the most tokens."""
    costs = cost_tables.read(name)
    rows, step = costs.limits.max_batch_tokens, costs.steps.table(costs.limits.max_batch_tokens)
    return Prompts(name, costs.kv_bytes_per_token, step[rows] / rows, costs.steps.prompt_attended_seconds)


def rows(models: Sequence[Prompts], latency: float) -> list[list[str]]:
    found = []
    for model in models:
        cells = [model.name, f"{model.kv_bytes / 1000:.0f} kB", f"{1e6 * model.token_seconds:.3g} µs"]
        cells.append(f"{model.kv_bytes / model.token_seconds / 1e9:.3g} GB/s")
        for bandwidth in LINKS.values():
            tokens = model.break_even(Transfer(latency, bandwidth))
            cells.append("never" if math.isinf(tokens) else f"{math.ceil(tokens)}")
        found.append(cells)
    return found


def curve(models: Sequence[Prompts], latency: float) -> str:
    """Return the plot of the break-even over bandwidth, of the links at which there is one."""
    lines = []
    for model in models:
        points = [(b / 1e9, model.break_even(Transfer(latency, b))) for b in LINKS.values()]
        lines.append(Line(model.name, [(x, y) for x, y in points if math.isfinite(y)]))
    axis = f"bandwidth, GB/s; {1000 * latency:g} ms before the first byte"
    drawn = [line for line in lines if line.points]
    return document("tokens from which on fetching K/V is faster", axis, drawn, logarithmic=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtests.simulate.kv_sharing", description=__doc__)
    parser.add_argument("--latency-ms", type=float, default=2.0, help="before the first byte [2]")
    parser.add_argument("--costs", nargs="*", default=[], help="tables of measured costs to show beside the GPU's")
    parser.add_argument("--out", type=Path, help="file of the plot; default: none is written")
    chosen = parser.parse_args(argv)
    models = [*map(measured, chosen.costs), *GPU_MODELS]
    latency = chosen.latency_ms / 1000
    head = ["model", "K/V of a token", "computing a token", "bandwidth that is as fast"]
    print(table([*head, *(f"{name}, from tokens" for name in LINKS)], rows(models, latency)))
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(curve(models, latency))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"failed: {error}")

"""Whether an adapter's expand pays as a part of the kernel that follows it: measured on a GPU.

    python -m tools.expand_norm

After `o` and `down` of Qwen3-8B a step launches an expand, then the addition to the residual stream and the norm. The
kernel that does both is timed beside the two, in CUDA graphs, each call on weights of its own. A line is printed as
soon as it is measured.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import grouped_lora, rms_norm
from kernels.lora_tiles import TILE_FIELDS, Tiles
from kernels.offset_table import PartEntry, SiteEntry, table_rows
from runtime.gpu.step_lora import DECODE_HEIGHT, DECODE_SPLITS

WIDTH = 4096  # of Qwen3-8B's residual stream
WEIGHT_BYTES = 256 << 20  # of all B: more than a GPU's cache holds
REPLAYS = 20
CASES = [(1, 1), (8, 1), (8, 8), (32, 8), (128, 8), (128, 32)]  # rows, adapters


class Problem(NamedTuple):
    """Rows under adapters, at sites that each have weights of their own."""

    residual: Tensor
    y: Tensor
    t: Tensor
    slots: Tensor
    tiles: Tiles
    arena: Tensor
    table: Tensor
    weight: Tensor
    floor: Tensor

    @classmethod
    def of(cls, rows: int, adapters: int, rank: int, sites: int, width: int, device: str) -> "Problem":
        """Random numbers in bfloat16; the rows of one adapter follow each other."""

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=torch.bfloat16)

        b = [[16 + (adapter * sites + site) * rank * width for site in range(sites)] for adapter in range(adapters)]
        table = torch.stack([table_rows([SiteEntry(0, [PartEntry(rank, at)]) for at in each], rank) for each in b])
        per_adapter = rows // adapters
        starts = [(adapter, first) for adapter in range(adapters) for first in range(0, per_adapter, DECODE_HEIGHT)]
        fields = torch.tensor(
            [
                [adapter * per_adapter + first, min(DECODE_HEIGHT, per_adapter - first), adapter, 0]
                for adapter, first in starts
            ],
            dtype=torch.int32,
            device=device,
        ).view(-1, TILE_FIELDS)
        return cls(
            random(rows, width),
            random(rows, width),
            random(rows, DECODE_SPLITS, rank).float(),
            torch.arange(adapters, dtype=torch.int32, device=device).repeat_interleave(per_adapter),
            Tiles(fields, DECODE_HEIGHT),
            random(16 + adapters * sites * rank * width),
            table.to(device),
            random(width).float(),
            torch.tensor(0.1, device=device),
        )

    def apart(self, site: int) -> Tensor:
        """Two launches, as the engine's steps have them. Changes `y` and the residual."""
        widths = [self.y.shape[1]]
        grouped_lora.expand(
            self.t, self.y, site, self.arena, self.table, self.tiles, widths, grouped_lora.DECODE_EXPAND
        )
        return rms_norm.add_rms_norm(self.residual, self.y, 1.0, self.weight, self.floor)

    def together(self, site: int, config: rms_norm.ExpandNormConfig = rms_norm.EXPAND_DEFAULT) -> Tensor:
        """One launch. Changes the residual."""
        return rms_norm.expand_add_rms_norm(
            self.residual,
            self.y,
            self.t,
            self.slots,
            site,
            self.arena,
            self.table,
            1.0,
            self.weight,
            self.floor,
            config,
        )


def main() -> int:
    """The exit status: 1 without a CUDA device."""
    if not torch.cuda.is_available():
        print("there is no CUDA device to measure", file=sys.stderr)
        return 1
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: microseconds a layer and site", flush=True)
    for line in lines():
        print(line, flush=True)
    return 0


def lines() -> Iterator[str]:
    """A line for each batch and rank."""
    for rank in (16, 64):
        for rows, adapters in CASES:
            sites = max(WEIGHT_BYTES // (adapters * rank * WIDTH * 2), 1)
            problem = Problem.of(rows, adapters, rank, sites, WIDTH, "cuda")
            apart = _microseconds(problem.apart, sites)
            together = {
                config: _microseconds(partial(problem.together, config=config), sites)
                for config in rms_norm.EXPAND_CANDIDATES
            }
            best = min(together, key=together.__getitem__)
            yield (
                f"{rows} rows, {adapters} adapters of r{rank}: apart {apart:.1f}, together {together[best]:.1f} "
                f"({best}), slowest {max(together.values()):.1f}"
            )


def _microseconds(call: Callable[[int], Tensor], sites: int) -> float:
    """Of one call, in a graph of a call for each site."""
    for site in range(min(sites, 3)):
        call(site)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for site in range(sites):
            call(site)
    graph.replay()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(REPLAYS):
        graph.replay()
    stop.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(stop)) * 1e3 / REPLAYS / sites


if __name__ == "__main__":
    sys.exit(main())

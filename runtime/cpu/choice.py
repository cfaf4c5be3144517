"""Which CPU kernels run: those that were asked for, or the fastest of those that can be built here."""

import logging
import os
import time
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kernels.cpu.compiled import structs
from kernels.cpu.compiled.build import CannotBuild
from kernels.cpu.compiled.library import load
from kernels.cpu.compiled.panels import pack
from kernels.cpu.compiled.program import NO_SITE, Part, Pool, Program
from runtime.config import EngineConfig
from runtime.models.config import GATE_UP, ModelConfig
from runtime.models.layers import Linear

_log = logging.getLogger(__name__)

PROMPT_ROWS = 256
# A request to compare by: a prompt, and then so many tokens one by one.
TOKENS = 64
LEAST_WEIGHTS = 1 << 18  # of a projection whose time says something; a toy model's is that of the call
REPEATS = 8  # the fastest counts: a core may be busy or asleep
# What lies between two such projections takes PyTorch so much longer than the compiled kernels: steps of eight rows
# took 18.5 and 10.3 ms, on 30 layers whose weights are 2.2 such projections. Small models thus run compiled.
BETWEEN_SECONDS = 0.12e-3
MARGIN = 0.85  # PyTorch has to be clearly faster: the clock varies


class Timing(NamedTuple):
    """Seconds of one projection."""

    row: float  # for one row, as a decode step
    prompt: float  # for PROMPT_ROWS rows

    def request(self, between: float = 0.0) -> float:
        """For a whole request, whose steps take `between` longer than the projection."""
        return self.prompt + between + TOKENS * (self.row + between)


def threads_of(config: EngineConfig) -> int:
    """The configured number, or one thread for each core that this process may use; ranks share the cores."""
    if config.threads is not None:
        return config.threads
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(cores // config.tensor_parallel_size, 1)


def choose_kernels(config: EngineConfig) -> tuple[Literal["compiled", "torch"], dict[str, float]]:
    """The kernels to run, and milliseconds by what was measured for the choice.

    Raises ValueError if those that were asked for cannot be built.
    """
    if config.kernels == "torch":
        return "torch", {}
    if config.block_size % structs.TILE:
        if config.kernels == "compiled":
            raise ValueError(
                f"block_size must be a multiple of {structs.TILE} for kernels (--kernels) compiled, not "
                f"{config.block_size}"
            )
        _log.warning(
            "block_size %d is no multiple of %d, so the slower CPU kernels of PyTorch run",
            config.block_size,
            structs.TILE,
        )
        return "torch", {}
    try:
        load()
    except CannotBuild as error:
        if config.kernels == "compiled":
            raise ValueError(f"kernels (--kernels) compiled cannot be built: {error}") from None
        _log.warning("the compiled CPU kernels cannot be built, so the slower ones of PyTorch run: %s", error)
        return "torch", {}
    model = ModelConfig.from_directory(config.model)
    if config.kernels == "compiled" or config.quantization is not None or model.quantization is not None:
        return "compiled", {}
    dtype = getattr(torch, model.dtype if config.dtype == "auto" else config.dtype)
    site = model.sites()[GATE_UP]
    if dtype == torch.float16 or site.in_features * site.parts[0].out_features < LEAST_WEIGHTS:
        return "compiled", {}
    timed = _timings(model, dtype, threads_of(config))
    found: dict[str, float] = {}
    for name, (row, prompt) in timed.items():
        found |= {f"{name}_row": 1e3 * row, f"{name}_prompt": 1e3 * prompt}
        _log.info("%s kernels: %.3f ms for a row, %.2f ms for %d rows", name, 1e3 * row, 1e3 * prompt, PROMPT_ROWS)
    return faster(timed["compiled"], timed["torch"]), found


def faster(compiled: Timing, torch_: Timing) -> Literal["compiled", "torch"]:
    """The kernels that compute a request of average length sooner."""
    return "torch" if torch_.request(BETWEEN_SECONDS) < MARGIN * compiled.request() else "compiled"


def _timings(model: ModelConfig, dtype: torch.dtype, threads: int) -> dict[str, Timing]:
    """Time the candidates by their name in `--kernels`, on the model's largest projection of a layer."""
    site = model.sites()[GATE_UP]
    columns = sum(part.out_features for part in site.parts)
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(columns, site.in_features, generator=generator) * site.in_features**-0.5).to(dtype)
    x = torch.randn(PROMPT_ROWS, site.in_features, generator=generator)
    compiled = _time(_compiled(weight, x, threads))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return {"compiled": compiled, "torch": _time(_torch(weight, x))}
    finally:
        torch.set_num_threads(before)


def _compiled(weight: Tensor, x: Tensor, threads: int) -> Callable[[int], None]:
    pool = Pool(threads)
    program = Program(pool)
    program.linear(x, [Part(pack(weight), None)], torch.zeros(len(x), len(weight)), NO_SITE)

    def run(rows: int) -> None:
        program.run(structs.Step(rows=rows))

    return run


def _torch(weight: Tensor, x: Tensor) -> Callable[[int], None]:
    linear, inputs = Linear(weight), x.to(weight.dtype)

    def run(rows: int) -> None:
        with torch.inference_mode():
            linear(inputs[:rows])

    return run


def _time(run: Callable[[int], None]) -> Timing:
    seconds = []
    for rows in (1, PROMPT_ROWS):
        run(rows)
        least = float("inf")
        for _ in range(REPEATS):
            started = time.perf_counter()
            run(rows)
            least = min(least, time.perf_counter() - started)
        seconds.append(least)
    return Timing(*seconds)

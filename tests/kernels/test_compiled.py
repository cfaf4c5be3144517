"""Compiles every kernel for several GPUs, without one. Run as a program, this file compiles them and prints JSON.

The compiled kernels do not run.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
H100, OTHERS = 90, (80, 89)  # compute capabilities
SPILLED_BYTES = 32  # a few addresses, or the 28 bytes that Triton 3.6 reduces an angle in
PRODUCTS = {
    *("_shrink_kernel", "_expand_kernel", "_decode_kernel", "_prefill_kernel"),
    *("_expert_matmul_kernel", "_quantized_product_kernel"),
}
# A thread of these reads or writes single numbers, or numbers that do not follow each other in memory.
NARROW = {"_reduce_kernel", "_cut_kernel", "_embedding_shrink_kernel", "_qkv_write_kernel"}


Pass = tuple[str, int]  # what is compiled, the compute capability
PASSES: list[Pass] = [
    *(("bfloat16", capability) for capability in (H100, *OTHERS)),
    ("float32", H100),
    ("candidates", H100),  # of attention with two buffers of K and V
]


@pytest.fixture(scope="module")
def compiled(triton_cache: dict[str, str]) -> dict[Pass, list[dict[str, Any]]]:
    """The kernels of each pass, all compiled in one process, which imports torch and Triton once."""
    pytest.importorskip("triton", reason="needs triton")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment |= {"PYTHONPATH": str(ROOT), **triton_cache}
    done = subprocess.run([sys.executable, "-W", "error", __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[Pass, list[dict[str, Any]]] = {each: [] for each in PASSES}
    for kernel in json.loads(done.stdout):
        found[kernel["what"], kernel["capability"]].append(kernel)
    return found


@pytest.mark.parametrize(("what", "capability"), PASSES)
def test_every_kernel_fits_its_gpu_and_keeps_its_numbers_in_registers(
    compiled: dict[Pass, list[dict[str, Any]]], what: str, capability: int
) -> None:
    kernels = compiled[what, capability]
    assert len(kernels) > 5
    for kernel in kernels:
        assert kernel["shared_bytes"] <= kernel["most_shared_bytes"], kernel
        assert kernel["spilled_bytes"] <= SPILLED_BYTES, kernel


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_products_of_bfloat16_are_made_on_tensor_cores(compiled: dict[Pass, list[dict[str, Any]]], dtype: str) -> None:
    kernels = compiled[dtype, H100]
    assert {kernel["name"] for kernel in kernels} >= PRODUCTS
    for kernel in kernels:
        expected = dtype == "bfloat16" and kernel["name"] in PRODUCTS
        assert (kernel["products"] > 0) == expected, kernel


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_much_is_read_16_bytes_at_a_time(compiled: dict[Pass, list[dict[str, Any]]], dtype: str) -> None:
    for kernel in compiled[dtype, H100]:
        assert kernel["wide_reads"] > 0 or kernel["name"] in NARROW, kernel


def launches(dtype: str, shared_bytes: int) -> Iterator[Any]:
    """Calls that launch every kernel as it is launched when nothing has been tuned, at Qwen3-8B's shapes.

    Attention also at Gemma 2's, whose heads of 256 need the most memory, with a window and capped scores, and the write
    to the cache of heads of which half turns.
    """
    import torch

    from kernels import expert_rows, grouped_lora, quantized_product, rms_norm, sampling, silu_mul, tuned
    from kernels.lora_tiles import TILE_FIELDS, Tiles
    from kernels.row_params import RowParams
    from kernels.tune import attention, tuner
    from kernels.tune.lora import lora_cases
    from kernels.tune.products import product_cases
    from kernels.tune.rows import ModelShape
    from runtime.gpu.step_lora import DECODE_HEIGHT, PREFILL_HEIGHT

    class Blank(ModelShape):
        """Without random numbers, which take seconds to draw: nothing is computed."""

        def random(self, seed: int, *shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=self.dtype)

    model = Blank(dtype=getattr(torch, dtype), device="cpu")
    for case in tuner.all_cases(model, decode=(1, 32), prefill=256, context=64):
        config, inputs = tuned.lookup("", case.kernel, case.rows, model.dtype).config, case.prepare(0)
        if case.kernel == "paged_prefill":
            config = config.of_heads(model.head_dim, shared_bytes)
        heights = {each.height for each in inputs if isinstance(each, Tiles)}
        if heights <= {DECODE_HEIGHT, PREFILL_HEIGHT}:
            yield partial(case.launch, *inputs, config=config)
    gemma = model._replace(q_heads=16, kv_heads=8, head_dim=256)
    cases = attention.decode_case(gemma, 32, 64), attention.prefill_case(gemma, 256, 320)
    for case, options in (
        (cases[0], {"window": 4096, "cap": 50.0}),
        (cases[1], {"window": 4096, "cap": 50.0}),
        (cases[0], {"cap": 50.0}),
        (cases[1], {}),
        *((case, {"window": 128, "sinks": torch.zeros(16)}) for case in cases),
        (attention.write_case(gemma, 32), {"rotary_dim": 128, "interleaved": True}),
    ):
        config = tuned.lookup("", case.kernel, case.rows, model.dtype).config
        if case.kernel == "paged_prefill":
            config = config.of_heads(gemma.head_dim, shared_bytes)
        yield partial(case.launch, *case.prepare(0), config=config, **options)
    for height, config in ((DECODE_HEIGHT, expert_rows.DECODE), (PREFILL_HEIGHT, expert_rows.PREFILL)):
        own = Tiles(torch.zeros(4, TILE_FIELDS, dtype=torch.int32), height)
        weight = model.random(1, 8, 2 * 768, 2048).view(8, 2 * 768, 2048)  # Qwen3-30B-A3B's gate and up
        biases = model.random(2, 8, 2 * 768)
        yield partial(expert_rows.expert_matmul, model.random(0, 64, 2048), weight, biases, own, config)
    product = "decode product", 1
    x, codes, scales, _, group = product_cases(model, 1, "decode")[0].prepare(0)
    halves, book = codes[..., : codes.shape[2] // 2].contiguous().view(torch.uint8), torch.zeros(16)
    multiply = partial(quantized_product.quantized_product, x, config=tuned.lookup("", *product, model.dtype).config)
    yield partial(multiply, codes.view(torch.float8_e4m3fn), scales, None, group)
    yield partial(multiply, halves, scales, None, group, book)
    gates = model.random(0, 32, 2 * model.intermediate)
    yield partial(silu_mul.gelu_mul, gates)
    yield partial(silu_mul.clamped_mul, gates, 7.0)
    shrink, _ = lora_cases(model, 32, 8, 16, "decode")
    _, site, arena, table, tiles, ranks = shrink.prepare(0)
    token_ids, t = torch.zeros(32, dtype=torch.int64), torch.empty(32, 1, ranks)
    yield partial(grouped_lora.embedding_shrink, token_ids, site, arena, table, tiles, t)
    residual, y = model.random(0, 32, model.hidden), model.random(1, 32, model.hidden)
    weight, floor, slots = torch.ones(model.hidden), torch.tensor(0.1), torch.zeros(32, dtype=torch.int32)
    between = torch.empty(32, 4, 48)
    yield partial(rms_norm.expand_add_rms_norm, residual, y, between, slots, site, arena, table, 1.0, weight, floor)
    cut = RowParams.build([0.7] * 4, [0] * 4, [0.9] * 4, [0.0] * 4, [0.5] * 4)
    for logits in (model.random(2, 4, model.vocab), model.random(2, 4, model.vocab).float()):
        yield partial(sampling.sample, logits, cut)


def attention_candidates() -> Iterator[Any]:
    """Launches of attention at Qwen3-8B's shapes with each configuration that prefetches K and V."""
    import torch

    from kernels.paged_attention import DECODE_CANDIDATES, PREFILL_CANDIDATES
    from kernels.tune import attention
    from kernels.tune.rows import ModelShape

    model = ModelShape(dtype=torch.bfloat16, device="cpu")
    cases = attention.decode_case(model, 8, 64), attention.prefill_case(model, 128, 192)
    for case, candidates in zip(cases, (DECODE_CANDIDATES, PREFILL_CANDIDATES), strict=True):
        for config in candidates:
            if config.num_stages >= 5 and (case is cases[1] or config.splits == 8):
                yield partial(case.launch, *case.prepare(0), config=config)


def compile_all(what: str, capability: int) -> Iterator[dict[str, Any]]:
    from tests.kernels.pretend_gpu import SHARED_BYTES, PretendGpu, instructions

    gpu = PretendGpu.install(capability)
    for launch in attention_candidates() if what == "candidates" else launches(what, SHARED_BYTES[capability]):
        launch()
    if what != "candidates":
        assert {kernel.name for kernel in gpu.compiled} == set(kernel_names())
    for kernel, code in zip(gpu.compiled, instructions(gpu.compiled, capability), strict=True):
        yield {
            "what": what,
            "capability": capability,
            "name": kernel.name,
            "shared_bytes": kernel.shared_bytes,
            "most_shared_bytes": SHARED_BYTES[capability],
            "spilled_bytes": kernel.spilled_bytes,
            "products": sum(each.split(".")[0] in ("HMMA", "HGMMA") for each in code),
            "wide_reads": sum(each.split(".")[0] in ("LDG", "LDGSTS") and ".128" in each for each in code),
        }


def kernel_names() -> Iterator[str]:
    """The names of all kernels."""
    import importlib
    import pkgutil

    from triton import JITFunction

    import kernels

    for module in pkgutil.iter_modules(kernels.__path__, "kernels."):
        found = vars(importlib.import_module(module.name))
        yield from (
            name for name, value in found.items() if isinstance(value, JITFunction) and name.endswith("_kernel")
        )


if __name__ == "__main__":
    print(json.dumps([kernel for each in PASSES for kernel in compile_all(*each)]))

"""Compiles every kernel for an H100, without a GPU. Run as a program, this file compiles them and prints JSON.

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
SHARED_BYTES = 227 * 1024  # of a program, at most
SPILLED_BYTES = 32  # a few addresses, or the 28 bytes that Triton 3.6 reduces an angle in
PRODUCTS = {
    *("_shrink_kernel", "_expand_kernel", "_decode_kernel", "_prefill_kernel"),
    *("_expert_matmul_kernel", "_quantized_product_kernel"),
}
# A thread of these reads or writes single numbers, or numbers that do not follow each other in memory.
NARROW = {"_reduce_kernel", "_cut_kernel", "_embedding_shrink_kernel", "_qkv_write_kernel"}


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    pytest.importorskip("triton", reason="needs triton")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    cache = tmp_path_factory.getbasetemp() / "triton"  # shared: some kernels are the same in both dtypes
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-W", "error", __file__, request.param]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [kernel | {"dtype": request.param} for kernel in json.loads(done.stdout)]


def test_every_kernel_fits_an_h100_and_keeps_its_numbers_in_registers(compiled: list[dict[str, Any]]) -> None:
    for kernel in compiled:
        assert kernel["shared_bytes"] <= SHARED_BYTES, kernel
        assert kernel["spilled_bytes"] <= SPILLED_BYTES, kernel


def test_products_of_bfloat16_are_made_on_tensor_cores(compiled: list[dict[str, Any]]) -> None:
    assert {kernel["name"] for kernel in compiled} >= PRODUCTS
    for kernel in compiled:
        expected = kernel["dtype"] == "bfloat16" and kernel["name"] in PRODUCTS
        assert (kernel["products"] > 0) == expected, kernel


def test_what_is_much_is_read_16_bytes_at_a_time(compiled: list[dict[str, Any]]) -> None:
    for kernel in compiled:
        assert kernel["wide_reads"] > 0 or kernel["name"] in NARROW, kernel


def launches(dtype: str) -> Iterator[Any]:
    """Calls that launch every kernel as it is launched when nothing has been tuned, at Qwen3-8B's shapes.

    Attention also at Gemma 2's, whose heads of 256 need the most memory, with a window and capped scores, and the write
    to the cache of heads of which half turns.
    """
    import torch

    from kernels import expert_rows, grouped_lora, silu_mul, tuned
    from kernels.lora_tiles import TILE_FIELDS, Tiles
    from kernels.tune import attention, tuner
    from kernels.tune.lora import lora_cases
    from kernels.tune.rows import ModelShape
    from runtime.gpu.step_lora import DECODE_HEIGHT, PREFILL_HEIGHT

    class Blank(ModelShape):
        """Without random numbers, which take seconds to draw: nothing is computed."""

        def random(self, seed: int, *shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=self.dtype)

    model = Blank(dtype=getattr(torch, dtype), device="cpu")
    for case in tuner.all_cases(model, decode=(1, 32), prefill=256, context=64):
        config, inputs = tuned.lookup("", case.kernel, case.rows, model.dtype).config, case.prepare(0)
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
            config = config.of_heads(gemma.head_dim)
        yield partial(case.launch, *case.prepare(0), config=config, **options)
    for height, config in ((DECODE_HEIGHT, expert_rows.DECODE), (PREFILL_HEIGHT, expert_rows.PREFILL)):
        own = Tiles(torch.zeros(4, TILE_FIELDS, dtype=torch.int32), height)
        weight = model.random(1, 8, 2 * 768, 2048).view(8, 2 * 768, 2048)  # Qwen3-30B-A3B's gate and up
        biases = model.random(2, 8, 2 * 768)
        yield partial(expert_rows.expert_matmul, model.random(0, 64, 2048), weight, biases, own, config)
    gates = model.random(0, 32, 2 * model.intermediate)
    yield partial(silu_mul.gelu_mul, gates)
    yield partial(silu_mul.clamped_mul, gates, 7.0)
    shrink, _ = lora_cases(model, 32, 8, 16, "decode")
    _, site, arena, table, tiles, ranks = shrink.prepare(0)
    token_ids, t = torch.zeros(32, dtype=torch.int64), torch.empty(32, 1, ranks)
    yield partial(grouped_lora.embedding_shrink, token_ids, site, arena, table, tiles, t)


def compile_all(dtype: str) -> Iterator[dict[str, Any]]:
    from tests.kernels.pretend_gpu import PretendGpu

    gpu = PretendGpu.install()
    for launch in launches(dtype):
        launch()
    assert {kernel.name for kernel in gpu.compiled} == set(kernel_names())
    for kernel in gpu.compiled:
        yield {
            "name": kernel.name,
            "shared_bytes": kernel.shared_bytes,
            "spilled_bytes": kernel.spilled_bytes,
            "products": kernel.count("HMMA", "HGMMA"),
            "wide_reads": kernel.count("LDG", "LDGSTS", width=".128"),
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
    print(json.dumps(list(compile_all(sys.argv[1]))))

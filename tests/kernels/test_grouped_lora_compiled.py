"""The grouped LoRA kernels through Triton's compiler for an H100, which needs no GPU; run as a program, it compiles.

The interpreter takes much that the compiler refuses. What is compiled here has not run anywhere.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SHARED_BYTES = 227 * 1024  # what one program may have on an H100
WIDTHS = {"WIDTH_0": 4096, "WIDTH_1": 1024, "WIDTH_2": 1024}


def test_the_kernels_compile_for_an_h100_and_fit_its_shared_memory(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="needs triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    shared = [int(line.split()[-1]) for line in done.stdout.splitlines()]
    assert len(shared) == 10
    assert max(shared) <= SHARED_BYTES


def compiled() -> Iterator[tuple[str, Any]]:
    """Name and result for each kernel, dtype, and phase; a model's dtype is its adapters'."""
    from triton import language as tl

    from kernels import grouped_lora, lora_configs

    for dtype, dot, terms in (("bf16", tl.bfloat16, 3), ("fp32", tl.float32, 1)):
        yield (
            f"embedding {dtype}",
            compile_kernel(grouped_lora._embedding_shrink_kernel, dtype, {"BLOCK_M": 16, "BLOCK_R": 64}),
        )
        for phase, height, shrink, expand in (
            ("decode", 16, lora_configs.DECODE_SHRINK, lora_configs.DECODE_EXPAND),
            ("prefill", 64, lora_configs.PREFILL_SHRINK, lora_configs.PREFILL_EXPAND),
        ):
            sizes = {"DOT": dot, "BLOCK_M": height, "BLOCK_R": shrink.block_r, "BLOCK_K": shrink.block_k}
            options = {"num_warps": shrink.num_warps, "num_stages": shrink.num_stages}
            sizes |= {"IN": 4096, "SPLIT_K": shrink.split_k}
            yield f"{phase} shrink {dtype}", compile_kernel(grouped_lora._shrink_kernel, dtype, sizes, **options)
            sizes = {"DOT": dot, "BLOCK_M": height, "BLOCK_R": expand.block_r, "BLOCK_N": expand.block_n}
            options = {"num_warps": expand.num_warps, "num_stages": expand.num_stages}
            sizes |= {"TERMS": terms, "SPLITS": shrink.split_k} | WIDTHS
            yield f"{phase} expand {dtype}", compile_kernel(grouped_lora._expand_kernel, dtype, sizes, **options)


def compile_kernel(kernel: Any, dtype: str, sizes: dict[str, Any], **options: int) -> Any:
    """For aligned pointers, as torch allocates them, and strides that nothing is known of."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = dict.fromkeys(("x", "y", "arena"), f"*{dtype}")
    pointers |= {"t": "*fp32", "table": "*i64", "tiles": "*i32", "token_ids": "*i64"}
    kinds = {name: "constexpr" if name in sizes else pointers.get(name, "i32") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(kinds.values()) if kind.startswith("*")}
    source = ASTSource(fn=kernel, signature=kinds, constexprs=sizes, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


if __name__ == "__main__":
    for name, result in compiled():
        print(name, result.metadata.shared)

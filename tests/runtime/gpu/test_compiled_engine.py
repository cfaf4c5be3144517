"""The engine compiles at its start on a GPU every kernel that its steps launch, so that no request waits for it.

Run as a program, it is an engine on a GPU that compiles and computes nothing.
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
OPTIONS = {"max_running": 68, "max_batch_tokens": 160, "max_model_len": 250, "max_lora_rank": 16}
REQUESTS = 160
ROWS = (3, 40, 100)  # that the tables' configurations are for: one is not that of the smallest or the largest step


@pytest.mark.parametrize("kind", ["graphs", "no graphs", "graphs, tuned"])
def test_no_step_launches_a_kernel_that_was_not_compiled_at_start(
    tmp_path: Path, triton_cache: dict[str, str], kind: str
) -> None:
    pytest.importorskip("triton", reason="needs triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), **triton_cache}
    command = [sys.executable, __file__, kind, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    seen = json.loads(done.stdout)
    assert seen["late"] == []
    assert len(seen["at start"]) > 20
    assert {"decodes", "prompts", "both", "64 prompts"} <= set(seen["steps"])
    # Of thousands: where an address is between two multiples of 16 differs
    assert len(seen["looked for"]) < 40, "launches that went Triton's long way"


def main(kind: str, directory: Path) -> dict[str, list[str]]:
    from tests.kernels.pretend_gpu import PretendGpu

    gpu = PretendGpu.install()
    import torch
    from triton.runtime.jit import JITFunction

    from tests.runtime.adapters.peft_engine import MODULES, PeftOracle, engines
    from tests.runtime.gpu.eager_captures import EagerCaptures

    late_products = products_of_a_packed_base(gpu, directory / "packed")
    if "tuned" in kind:
        fill_tables()
    torch.empty = torch.zeros  # nothing is computed, and old memory would not be valid tokens
    with engines(PeftOracle(directory)) as start:
        engine = start(kernels="triton", device="cpu", **OPTIONS)
        engine.runner.warm_up()
        if kind.startswith("graphs"):
            engine.runner.graphs = engine.runner.step_graphs(EagerCaptures())
        at_start = [kernel.name for kernel in gpu.compiled]
        for name in MODULES:
            engine.adapters.load(engine.digests[name], "device")
        while engine.adapters.wait(timeout=30):
            engine.step()
        looked_for: list[str] = []
        search = JITFunction.run

        def counted_search(kernel, *args, **options):
            looked_for.append(kernel.fn.__name__)
            return search(kernel, *args, **options)

        JITFunction.run = counted_search
        steps = set(run(engine, [None, *engine.digests.values()]))
    late = [*late_products, *(kernel.name for kernel in gpu.compiled[len(at_start) :])]
    return {"at start": at_start, "late": late, "steps": sorted(steps), "looked for": looked_for}


def fill_tables() -> None:
    """A table as the tuner prints it: other configurations for few rows and for more, none of them a default."""
    from kernels import grouped_lora, kv_write, paged_attention, rms_norm, sampling, silu_mul, tuned

    candidates = {
        "rms_norm": rms_norm.CANDIDATES,
        "add_rms_norm": rms_norm.CANDIDATES,
        "silu_mul": silu_mul.CANDIDATES,
        "sample": sampling.CANDIDATES,
        "sample with cuts": sampling.CANDIDATES,
        "qkv_write": kv_write.CANDIDATES,
        "paged_decode": paged_attention.DECODE_CANDIDATES,
        "paged_prefill": paged_attention.PREFILL_CANDIDATES,
        "decode shrink": grouped_lora.DECODE.shrink,
        "decode expand": grouped_lora.DECODE.expand,
        "prefill shrink": grouped_lora.PREFILL.shrink,
        "prefill expand": grouped_lora.PREFILL.expand,
    }
    tuned.TABLES["cpu"] = {  # type: ignore[index]
        kernel: tuple(tuned.Tuned(rows, config, "1 µs") for rows, config in zip(ROWS, configs[1:], strict=False))
        for kernel, configs in candidates.items()
    }


def products_of_a_packed_base(gpu, directory: Path) -> list[str]:
    """The kernels that its linears compile after a step of one row and their warm-up."""
    import torch

    from runtime.gpu.packed_linear import DeviceWeights
    from runtime.models.config import ModelConfig
    from runtime.models.weights import open_checkpoint
    from tests.runtime.models.quantized_checkpoints import write_quantized

    directory.mkdir()
    write_quantized("awq", directory)
    config, kinds = ModelConfig.from_directory(directory), {"pack": False, "keep_quantized": True}
    checkpoint = open_checkpoint(config, directory, torch.bfloat16, "safetensors", **kinds)
    placed = DeviceWeights(torch.bfloat16, torch.device("cpu"), "cpu")
    linears = [one for layer in placed.load(checkpoint).layers for one in (layer.qkv, layer.o, *layer.mlp)]
    before = 0
    for rows in (1, 2, 16, 32, 33, 64, 100, 256):
        for linear in linears:
            linear(torch.zeros(rows, linear.in_features, dtype=torch.bfloat16))
        if rows == 1:
            placed.warm_up()
            before = len(gpu.compiled)
    assert before >= len({linear.shape for linear in linears})
    return [kernel.name for kernel in gpu.compiled[before:]]


def run(engine, adapters: list[str | None]) -> Iterator[str]:
    """Random requests, first many at once and then as they come; the kinds of steps that they made."""
    from runtime.messages import Generate, SamplingParams
    from tests.runtime.tiny_engine import prompt

    choose = random.Random(0)
    for number in range(REQUESTS):
        params = SamplingParams(
            max_tokens=choose.randint(1, 6),
            temperature=choose.choice([0.0, 1.0]),
            top_k=choose.choice([0, 0, 5]),
            top_p=choose.choice([1.0, 0.5]),
            repetition_penalty=choose.choice([1.0, 1.0, 1.3]),
            logprobs=choose.choice([None, None, 2]),
            ignore_eos=True,
        )
        tokens = prompt(2 if number < REQUESTS // 2 else choose.randint(1, 230), number)
        engine.add_request(
            Generate(request_id=str(number), token_ids=tokens, params=params, adapter=choose.choice(adapters))
        )
        if number < REQUESTS // 2:
            continue
        for _ in range(choose.randint(0, 4)):
            yield from step(engine)
    while engine.busy:
        yield from step(engine)


def step(engine) -> Iterator[str]:
    before = engine.steps
    if not engine.step() and engine.steps == before:
        engine.wait(0.1)
    if engine.steps > before:
        shape = engine.runner.prepared.shape
        yield "both" if shape.decodes and shape.prefills else "prompts" if shape.prefills else "decodes"
        if shape.prefills >= 64:
            yield "64 prompts"


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]))))

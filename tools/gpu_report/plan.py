"""How much of everything is measured: on a GPU, and in a dry run, where the numbers only have to be run through."""

from typing import NamedTuple

from tools.gpu_report.floors import Shape


class LoraCase(NamedTuple):
    """A decode batch whose rows carry `adapters` in turn, 0 for none; `goal` is its share of the base's speed, in %."""

    adapters: int
    rank: int
    batch: int
    goal: float


class Plan(NamedTuple):
    """Sizes in tokens, adapters and repetitions.

    A decode batch starts so that its context is `context` in the middle of the timed steps. `tier` adapters of the
    first rank fill the device's adapter memory. `rank` is of every adapter that is not of a LoraCase. Goals are in
    milliseconds by batch, or in times by length.
    """

    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    families: tuple[str, ...] = ("qwen3", "llama", "qwen2", "granite")
    check_prompts: int = 4
    check_tokens: int = 12
    kernel_tests: tuple[str, ...] = ("tests/kernels", "tests/runtime/gpu/test_device_sampler.py")
    dtype: str = "bfloat16"
    kv_tokens: int = 160_000
    max_batch_tokens: int = 2048
    max_model_len: int = 17_408
    max_running: int = 128
    context: int = 1024
    warm_up: int = 6
    steps: int = 32
    forwards: int = 16
    rounds: int = 3
    batches: tuple[int, ...] = (1, 8, 32, 64, 128)
    decode_goals: tuple[tuple[int, float], ...] = ((1, 6.0), (32, 7.8), (128, 13.5))
    rank: int = 16
    wide_rank: int = 64
    tier: int = 32
    lora: tuple[LoraCase, ...] = (
        LoraCase(0, 16, 1, 99.5),
        LoraCase(0, 16, 32, 99.5),
        LoraCase(0, 16, 128, 99.5),
        LoraCase(1, 16, 1, 97),
        LoraCase(1, 16, 8, 97),
        LoraCase(1, 16, 32, 97),
        LoraCase(1, 64, 1, 95),
        LoraCase(1, 64, 32, 95),
        LoraCase(8, 16, 32, 93),
        LoraCase(32, 16, 128, 87),
    )
    prefill: tuple[int, ...] = (512, 2048)
    prefill_rounds: int = 12
    loads: int = 20
    beside_batch: int = 32
    beside_steps: int = 120
    first_token_prompts: tuple[int, ...] = (64, 512)
    alora: tuple[tuple[int, float], ...] = ((4096, 15), (16384, 60))
    alora_suffix: int = 50
    alora_rounds: int = 3
    updates: int = 6


# What a dry run computes a second is a thousandth of a GPU's, so its numbers are the least that go through everything.
TINY_SHAPE = Shape(1, 32, 32, 2, 1, 16, 64)
TINY = Plan(
    families=("qwen3",),
    check_prompts=1,
    check_tokens=2,
    kernel_tests=("tests/kernels/test_lora_tiles.py",),
    dtype="float32",
    kv_tokens=512,
    max_batch_tokens=32,
    max_model_len=64,
    max_running=2,
    context=12,
    warm_up=1,
    steps=1,
    forwards=1,
    rounds=2,
    batches=(1, 2),
    decode_goals=((1, 6.0),),
    rank=4,
    wide_rank=8,
    tier=2,
    lora=(LoraCase(0, 4, 1, 99.5), LoraCase(2, 4, 2, 87)),
    prefill=(8, 16),
    prefill_rounds=2,
    loads=2,
    beside_batch=1,
    beside_steps=3,
    first_token_prompts=(8,),
    alora=((32, 15),),
    alora_suffix=5,
    alora_rounds=1,
    updates=2,
)

"""The sizes and repetitions of the report, on a GPU and in a dry run."""

from typing import NamedTuple

from tools.gpu_report.floors import Shape


class LoraCase(NamedTuple):
    """A decode batch whose rows use a number of adapters in turn."""

    adapters: int  # 0: none is used
    rank: int
    batch: int
    goal: float  # % of the base's speed


class Plan(NamedTuple):
    """Sizes and repetitions; the defaults are for a GPU."""

    # The checks of the output.
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    families: tuple[str, ...] = ("qwen3", "llama", "qwen2", "granite")
    check_prompts: int = 4
    check_tokens: int = 12
    kernel_tests: tuple[str, ...] = (
        "tests/kernels",
        "tests/runtime/gpu/test_device_sampler.py",
        *("--ignore=tests/kernels/cpu", "--ignore=tests/kernels/tune"),  # of a CPU, and of what needs none
    )
    # The measured engine.
    dtype: str = "bfloat16"
    kv_tokens: int = 160_000
    max_batch_tokens: int = 2048
    max_model_len: int = 17_408
    max_running: int = 128
    tier: int = 32  # adapters of `rank` that fill the device's adapter memory
    rank: int = 16  # of adapters outside `lora`
    wide_rank: int = 64
    # Decode steps.
    context: int = 1024  # tokens of each request in the middle of the timed steps
    warm_up: int = 6  # steps before the timed ones
    steps: int = 32
    forwards: int = 16  # repetitions of the forward pass alone
    rounds: int = 3
    batches: tuple[int, ...] = (1, 8, 32, 64, 128)
    decode_goals: tuple[tuple[int, float], ...] = ((1, 6.0), (32, 7.8), (128, 13.5))  # batch, milliseconds a step
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
    # Times to the first token.
    prefill: tuple[int, ...] = (512, 2048)  # prompt tokens
    prefill_rounds: int = 12
    first_token_prompts: tuple[int, ...] = (64, 512)  # prompt tokens, by working set
    alora: tuple[tuple[int, float], ...] = ((4096, 15), (16384, 60))  # conversation tokens, times as fast as LoRA
    alora_suffix: int = 50  # tokens after the conversation
    alora_rounds: int = 3
    # Loads and updates of adapters.
    loads: int = 20
    beside_batch: int = 32
    beside_steps: int = 120
    updates: int = 6


# A dry run computes a thousandth of a GPU's operations a second, so its sizes are the least that run every section.
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

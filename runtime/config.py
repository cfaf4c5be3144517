"""What an engine is started with."""

from typing import Literal

import msgspec

MIB = 1024 * 1024


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything an engine is started with; frozen, so that a running engine cannot drift from it.

    `model` is a directory with `config.json` and, unless `load_format` is "dummy", safetensors weights.
    `dtype` "auto" takes the dtype that the model's configuration names. Sizes are in bytes, tokens or
    sequences as their names say; `max_model_len` None takes the model's own limit.
    """

    model: str
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    load_format: Literal["safetensors", "dummy"] = "safetensors"
    max_model_len: int | None = None
    block_size: int = 16
    kv_cache_bytes: int = 512 * MIB
    host_kv_bytes: int = 0  # for blocks that are evicted from the cache; 0 keeps none
    prefix_cache: bool = True
    max_running: int = 64
    max_waiting: int = 1024
    # What decoding sequences wait for when a long prompt comes in. A prefill step of 256 tokens took 204 ms and one of
    # 512 took 457 ms (SmolLM2-135M, bfloat16, 2 cores): the shorter one costs no throughput.
    max_batch_tokens: int = 256
    adapter_bytes: int = 1024 * MIB
    host_adapter_bytes: int = 2048 * MIB
    max_lora_rank: int = 256
    threads: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a CUDA device if there is one
    kernels: Literal["auto", "reference", "triton"] = "auto"  # auto: triton on a CUDA device, else reference
    cuda_graphs: bool = True  # of decode steps, where there is a CUDA device
    overlap: bool = True  # the triton kernels' steps: the next one is laid out and launched while one runs

    def __post_init__(self) -> None:
        positive = (
            "block_size",
            "kv_cache_bytes",
            "max_running",
            "max_batch_tokens",
            "adapter_bytes",
            "host_adapter_bytes",
            "max_lora_rank",
        )
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("max_waiting", "host_kv_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)}")
        if self.max_batch_tokens < self.max_running:
            raise ValueError(
                f"max_batch_tokens ({self.max_batch_tokens}) must be at least max_running ({self.max_running}): "
                "each running sequence decodes one token a step"
            )
        if self.host_kv_bytes and not self.prefix_cache:
            raise ValueError("host_kv_bytes must be 0 without prefix_cache: nothing in host memory would be found")
        for name in ("max_model_len", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")

"""The model on its device: chunks of a step in, sampled tokens out."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from runtime.adapters.cut_layout import lay_out_part
from runtime.adapters.layout import LayOut, Layout, layout_adapter
from runtime.adapters.parts import BaseWeights
from runtime.config import CPU_SIZES, EngineConfig, Sizes, gib
from runtime.kv.cache import KvCache, bytes_per_block
from runtime.models.config import ModelConfig
from runtime.models.shards import Shard
from runtime.models.weights import open_checkpoint
from runtime.parallel.followers import Followers
from runtime.parallel.group import RankGroup
from runtime.sampler import Sampled
from runtime.scheduler import Chunk

_log = logging.getLogger(__name__)

Results = Callable[
    [], list[Sampled]
]  # blocks until a step is computed; one entry for each chunk that samples or scores


class ResidentAdapters(Protocol):
    """The adapters in device memory, of which a step uses some: the pool on rank 0, its mirror on the others."""

    @property
    def arena(self) -> Tensor:
        """All of the device's adapter memory, flat."""
        ...

    def lookup(self, digest: str) -> Any:
        """The weights of an adapter by site index, as its layout has them."""
        ...

    def placement(self, digest: str) -> tuple[Layout, int]:
        """An adapter's layout, and the element of `arena` at which its extent begins."""
        ...


class Runner(ABC):
    """The base model, or a rank's part of it, loaded on one device, with its K/V cache; subclasses compute steps.

    Raises ValueError that names the option, if model, memory and options do not fit together.
    """

    adapter_dtype: torch.dtype  # of both tiers of adapter memory
    adapter_layout: LayOut = staticmethod(layout_adapter)  # of an adapter in its extent
    packs_linears = True  # for oneDNN on a CPU
    reads_float16 = False  # weights of a float16 checkpoint as they are
    keeps_quantized = False  # weights of a quantised checkpoint, where the kernels have a layout for them
    kernels: str  # as `--kernels` names them
    weights_held: str  # how the base's weights are held: a dtype, or how they are quantised
    cpu_threads: int | None = None  # of a step on a CPU
    timings: Mapping[str, float] = {}  # milliseconds of each candidate for `kernels`, where they were measured
    sizes: Sizes

    def __init__(
        self, config: EngineConfig, device: torch.device, group: RankGroup | None = None, *, sized: bool = True
    ):
        """Without `sized`, the subclass calls `size` and `allocate_kv` once the weights are loaded."""
        directory = Path(config.model)
        self.model = ModelConfig.from_directory(directory)
        self.check_model()
        self.weight_dtype: torch.dtype = getattr(torch, self.model.dtype if config.dtype == "auto" else config.dtype)
        if self.weight_dtype == torch.float16 and not self.reads_float16:
            if config.dtype != "auto":
                raise ValueError("dtype (--dtype) float16 needs kernels (--kernels) compiled")
            self.weight_dtype = torch.bfloat16
        # Of K/V, and of activations where the kernels round them; float16 would overflow
        self.dtype = torch.float32 if self.weight_dtype == torch.float32 else torch.bfloat16
        self.device = device
        self.block_size = config.block_size
        self.followers = Followers()  # the processes of the other ranks, where this is rank 0
        self.group = group or RankGroup()
        self.block_bytes = bytes_per_block(Shard(self.model, self.group).model, config.block_size, self.dtype)
        self.num_host_blocks = config.host_kv_bytes // self.block_bytes
        if config.host_kv_bytes and not self.num_host_blocks:
            given = config.host_kv_bytes
            raise ValueError(f"host_kv_bytes must be 0 or at least {self.block_bytes}, one block; it is {given}")
        self._asked_length = config.max_model_len
        self.max_model_len = self._max_model_len(None)
        if sized:
            self.size(config.sizes(CPU_SIZES))
        self.model = self.model.up_to(self.max_model_len)
        if self.model.rope.long:
            _log.warning(
                "all contexts are computed with longrope's long factors, as max_model_len %d is over the %d tokens "
                "that the short ones are for",
                self.max_model_len,
                self.model.rope.original_max_position,
            )
        self.shard = Shard(self.model, self.group)
        self.part = self.shard.model  # the model as far as this rank has it
        self.checkpoint = open_checkpoint(
            self.model,
            directory,
            self.weight_dtype,
            config.load_format,
            device,
            shard=self.shard,
            pack=self.packs_linears,
            keep_quantized=self.keeps_quantized,
            bars=config.bars,
        )
        self.weights_held = self._held(str(self.weight_dtype).removeprefix("torch."))
        if sized:
            self.allocate_kv()

    def size(self, sizes: Sizes) -> None:
        """Fix the sizes, which say how long a request may be."""
        self.sizes = sizes
        self.num_blocks = sizes.kv_cache_bytes // self.block_bytes
        self.max_model_len = self._max_model_len((self.num_blocks - 1) * self.block_size)

    def allocate_kv(self) -> None:
        with self.allocating():
            self.kv = KvCache(self.part, self.num_blocks, self.block_size, self.dtype, self.device)

    @contextmanager
    def allocating(self) -> Iterator[None]:
        """Have an error that names the options, if there is too little memory for what is allocated inside."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            kv, adapters, _, tokens = self.sizes
            raise ValueError(
                f"the device has too little memory for {gib(kv)} of K/V, {gib(adapters)} of adapters and "
                f"steps of {tokens} tokens: lower --kv-cache-bytes, --adapter-bytes, --max-batch-tokens or "
                f"--gpu-memory-utilization ({str(error).splitlines()[0]})"
            ) from None
        except MemoryError as error:
            raise ValueError(
                f"{error}: lower --host-adapter-bytes or --host-kv-bytes, or raise the limit of locked memory "
                "(ulimit -l)"
            ) from None

    def check_model(self) -> None:  # noqa: B027 - most kernels serve all families
        """Raise ValueError, which names the field and the kernels that serve it, for a model that these cannot."""

    def _held(self, types: str) -> str:
        """What the weights are held in, and what the checkpoint was that they come from."""
        scheme = self.model.quantization
        return types if scheme is None else f"{types}; the checkpoint is {scheme.method}"

    def _max_model_len(self, capacity: int | None) -> int:
        """The configured limit; by default the model's, or the tokens that fit in the K/V cache if they are fewer.

        `capacity` is None as long as the size of the K/V cache is not known.
        """
        default = self.model.default_length
        limit = self._asked_length or (default if capacity is None else min(default, max(capacity, 1)))
        if limit > self.model.max_position:
            raise ValueError(f"max_model_len is {limit}, but the model takes at most {self.model.max_position} tokens")
        if capacity is not None and limit > capacity:
            raise ValueError(
                f"kv_cache_bytes holds {max(capacity, 0)} tokens, but one request may need {limit}: raise "
                "kv_cache_bytes or lower max_model_len"
            )
        return limit

    def _lay_out(self, layout: Callable[..., Any], base: BaseWeights) -> LayOut:
        """How `layout` lays adapters out for this rank; `base` has its weights."""
        return lay_out_part(layout, self.shard, base, self.checkpoint.whole)

    @abstractmethod
    def start(self, adapters: ResidentAdapters) -> None:
        """Prepare for steps that use the adapters of `adapters`; called once, before the first step."""

    @abstractmethod
    def prepare(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """Lay out the inputs of a step. Returns its chunks in the order of their rows."""

    @abstractmethod
    def compute(self) -> Tensor:
        """Compute the prepared step. Returns the logits of its rows, (n, vocab), whole on rank 0."""

    @abstractmethod
    def launch(self) -> tuple[Results, bool]:
        """Start to compute the step that was prepared; it writes the K/V of all its tokens.

        The second value says whether the next step may be prepared and launched before the results are read.
        """

    def close(self) -> None:
        """End threads of the runner's own, if it has any, and the other ranks."""
        self.followers.close()


def make_runner(config: EngineConfig) -> Runner:
    """Load the model on the device that `config` asks for. Raises ValueError that names the option to change.

    Each other rank is started, and loads its part of the model meanwhile.
    """
    size = config.tensor_parallel_size
    if size == 1:
        return load_part(config)
    _check_ranks(config)
    followers = Followers()
    try:
        followers.start(config)
        device = device_of(config, 0)
        runner = load_part(config, followers.meet(lambda: RankGroup.join(0, size, followers.store, device)))
    except BaseException:
        followers.close()
        raise
    runner.followers = followers
    if runner.shard.padding:
        _log.info("%d ranks of equal parts compute %s", size, runner.shard.padding)
    return runner


def load_part(config: EngineConfig, group: RankGroup | None = None) -> Runner:
    """Load a rank's part of the model."""
    runner = _make_runner(config, group or RankGroup())
    if runner.model.quantization is not None or config.quantization is not None:
        _log.info("the base's weights are held in %s", runner.weights_held)
    for note in () if runner.model.quantization is None else runner.model.quantization.notes:
        _log.info("of the checkpoint's quantization_config, %s", note)
    return runner


def device_of(config: EngineConfig, rank: int) -> torch.device:
    """The device of a rank. Raises ValueError if there is none."""
    if not _on_cuda(config):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device() if config.tensor_parallel_size == 1 else rank)


def _on_cuda(config: EngineConfig) -> bool:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device (--device) is cuda, and torch finds no CUDA device here")
    return config.device != "cpu" and torch.cuda.is_available()


def _check_ranks(config: EngineConfig) -> None:
    """Raise ValueError, before other processes are started, for what several ranks cannot do here."""
    size, option = config.tensor_parallel_size, "tensor_parallel_size (--tensor-parallel-size)"
    if config.quantization is not None:
        raise ValueError(
            f"{option} is {size}, and quantization (--quantization) {config.quantization} is made by kernels "
            "(--kernels) compiled, which compute on one rank: leave quantization out, or serve a checkpoint that is "
            "quantised"
        )
    if _on_cuda(config):
        found = torch.cuda.device_count()
        if found < size:
            raise ValueError(f"{option} is {size}, and torch finds {found} CUDA devices here")
        for name in ("kv_cache_bytes", "adapter_bytes"):
            if getattr(config, name) is None:
                raise ValueError(
                    f"{option} is {size}, and {name} (--{name.replace('_', '-')}) is not set: all ranks need the same "
                    "size, and do not choose one by their GPUs"
                )
    elif config.kernels == "compiled":
        raise ValueError(
            f"{option} is {size}, and kernels (--kernels) compiled compute on one rank, as they cannot add up what "
            "several have in the middle of a step: set kernels to torch or auto"
        )


def _make_runner(config: EngineConfig, group: RankGroup) -> Runner:
    on_cuda = _on_cuda(config)
    if config.kernels == "triton" or (config.kernels == "auto" and on_cuda):
        from runtime.gpu.card import Card
        from runtime.gpu.triton_runner import TritonRunner  # a machine without a GPU need not have Triton installed

        _refuse_quantization(config, "triton")
        device = device_of(config, group.rank)
        return TritonRunner(config, device, group, Card(device) if on_cuda else None)
    if on_cuda:
        raise ValueError(
            f"kernels (--kernels) {config.kernels} run on the CPU only: set device (--device) to cpu as well"
        )
    return _cpu_runner(config, group)


def _cpu_runner(config: EngineConfig, group: RankGroup) -> Runner:
    from runtime.cpu.choice import choose_kernels, threads_of  # these modules import this one
    from runtime.cpu.compiled_runner import CompiledRunner
    from runtime.cpu.torch_runner import TorchRunner

    kernels, timings = choose_kernels(config) if group.size == 1 else ("torch", {})
    if kernels == "torch":
        _refuse_quantization(config, kernels)
    runner = CompiledRunner(config) if kernels == "compiled" else TorchRunner(config, group)
    runner.cpu_threads = threads_of(config) if kernels == "compiled" else torch.get_num_threads()
    runner.timings = timings
    return runner


def _refuse_quantization(config: EngineConfig, kernels: str) -> None:
    if config.quantization is not None:
        raise ValueError(
            f"quantization (--quantization) {config.quantization} needs kernels (--kernels) compiled, not {kernels}"
        )

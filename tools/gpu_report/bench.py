"""The engine under measurement, its requests and its adapters."""

import json
import time
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from loadtests.random_adapter import adapter_config, tensor_shapes
from runtime.adapters.arena import aligned
from runtime.config import EngineConfig
from runtime.engine import Engine
from runtime.library import PreparedAdapter
from runtime.messages import AdapterState, Event, Failed, Generate, SamplingParams, Tokens
from tools.gpu_report.clock import Clock
from tools.gpu_report.floors import Floors
from tools.gpu_report.plan import Plan

BLOCK_SIZE = 16
SPARE_IN_HOST = 12  # adapters of the plan's rank that host memory holds in addition to twice those of the device
WIDTH = 2**-7  # the largest weight of an adapter, so small that every output stays finite


class Unsteady(RuntimeError):
    """A request failed, or a timed step did not return one token for each request."""


class NoEngine(RuntimeError):
    """There is no engine to measure."""


class Bench:
    """Owns the engine that all sections share, and every adapter in it."""

    def __init__(self, plan: Plan, floors: Floors, *, device: str, scratch: Path):
        self.plan, self.floors = plan, floors
        self.clock = Clock.of(0.0)  # the current section's
        self._device, self._scratch = device, scratch
        self._engine: Engine | None = None
        self._why_none = "the engine has not been started"
        self._adapters: dict[tuple[int, int], str] = {}
        self._tensors: dict[int, dict[str, torch.Tensor]] = {}
        self._random = torch.Generator().manual_seed(0)
        self._requests = 0
        self.contexts: list[list[int]] = []  # prompts that decode batches share, see decoding.contexts

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            raise NoEngine(self._why_none)
        return self._engine

    def start(self, **changes: Any) -> None:
        """Start the engine, with random weights of the plan's model shape; `changes` are options of it."""
        plan, floors = self.plan, self.floors
        (self._scratch / "config.json").write_text(json.dumps(floors.shape.config(plan.dtype)))
        each = aligned(floors.adapter_bytes(plan.rank))
        self._why_none = "the engine did not start"
        options: dict[str, Any] = {
            "dtype": plan.dtype,
            "device": self._device,
            "block_size": BLOCK_SIZE,
            "kv_cache_bytes": plan.kv_tokens * floors.kv_bytes,
            "max_model_len": plan.max_model_len,
            "max_batch_tokens": plan.max_batch_tokens,
            "max_running": plan.max_running,
            "adapter_bytes": plan.tier * each,
            "host_adapter_bytes": (2 * plan.tier + SPARE_IN_HOST) * each,
            "max_lora_rank": plan.wide_rank,
        }
        model = str(self._scratch)
        self._engine = Engine(EngineConfig(model=model, load_format="dummy", kernels="triton", **options | changes))

    def recover(self) -> None:
        """End all requests of the section before. If that section broke the engine, drop it and record the reason."""
        if self._engine is None:
            return
        try:
            self._engine.fail_all("engine_error", "")
            while self._engine.busy:
                self._engine.step()
            self._engine.check()
        except Exception as error:
            self._why_none = f"an earlier section broke the engine: {type(error).__name__}: {error}"
            self._engine = None

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()

    def prompt(self, tokens: int) -> list[int]:
        """New random tokens."""
        return torch.randint(3, self.floors.shape.vocab_size, (tokens,), generator=self._random).tolist()

    def submit(self, prompt: list[int], tokens: int, adapter: str | None = None, invocation_start: int = 0) -> str:
        self._requests += 1
        request_id = f"bench-{self._requests}"
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        self.engine.add_request(
            Generate(
                request_id=request_id,
                token_ids=prompt,
                params=params,
                adapter=adapter,
                invocation_start=invocation_start,
            )
        )
        return request_id

    def step(self) -> list[Event]:
        """Run a step, or wait if there is nothing to run. Raises OutOfTime, and Unsteady if a request fails."""
        self.clock.check()
        before, events = self.engine.steps, self.engine.step()
        for event in events:
            if isinstance(event, Failed):
                raise Unsteady(f"{event.request_id} failed: {event.code}: {event.message}")
        if self.engine.steps == before and not events:
            self.engine.wait(1.0)
        return events

    def first_token(self, prompt: list[int], adapter: str | None = None, invocation_start: int = 0) -> float:
        """Milliseconds from a request for one token to that token, without other requests."""
        started = time.perf_counter()
        self.submit(prompt, 1, adapter, invocation_start)
        while not any(isinstance(event, Tokens) for event in self.step()):
            pass
        milliseconds = 1e3 * (time.perf_counter() - started)
        self.finish()
        return milliseconds

    def finish(self) -> None:
        """Step until all requests have ended."""
        while self.engine.busy:
            self.step()

    def synchronize(self) -> None:
        if self.engine.runner.device.type == "cuda":
            torch.cuda.synchronize()

    def tensors(self, rank: int, number: int) -> dict[str, torch.Tensor]:
        """A PEFT state dict for all seven projections. Each number gives other bits in one tensor: another digest."""
        if rank not in self._tensors:
            shapes = tensor_shapes(self.floors.shape._asdict(), rank)
            dtype = getattr(torch, self.plan.dtype)
            self._tensors[rank] = {
                name: torch.empty(shape, dtype=dtype).uniform_(-WIDTH, WIDTH, generator=self._random)
                for name, shape in shapes.items()
            }
        own = dict(self._tensors[rank])
        name = min(own)
        own[name] = own[name].clone()
        own[name].flatten()[: 2 * 16] = torch.tensor([WIDTH * (number >> bit & 1) for bit in range(16)] * 2)
        return own

    def add(self, rank: int, number: int) -> str:
        """The digest of an adapter, which is registered if it is new."""
        key = (rank, number)
        if key not in self._adapters:
            self.clock.check()
            self._adapters[key] = self.add_tensors(self.tensors(rank, number), rank)
        return self._adapters[key]

    def add_tensors(self, tensors: dict[str, torch.Tensor], rank: int) -> str:
        return self.engine.add_adapter(tensors, adapter_config(rank))

    def prepare(self, tensors: dict[str, torch.Tensor], rank: int) -> "Future[PreparedAdapter]":
        """What `add_tensors` does, but in the background."""
        return self.engine.prepare_adapter(tensors, adapter_config(rank))

    def adapters(self, count: int, rank: int) -> list[str]:
        return [self.add(rank, number) for number in range(count)]

    def load(self, digests: Iterable[str], tier: str = "device") -> None:
        """Load adapters into a tier, and step until it holds all of them."""
        digests = list(digests)
        target = getattr(self.engine.adapters, tier)
        for digest in digests:
            self.engine.adapters.load(digest, tier)  # type: ignore[arg-type]
        while not all(target.holds(digest) for digest in digests):
            self.step()

    def unload(self, digests: Iterable[str]) -> None:
        """Evict adapters from the device; they stay in host memory."""
        for digest in digests:
            self.engine.adapters.unload("bench-unload", digest, "device")
        self.engine.step()

    def timed_load(self, digest: str) -> tuple[float, dict[str, float]]:
        """Milliseconds to load an adapter from host memory to the device, and the seconds of each stage."""
        started, stages = time.perf_counter(), {}
        self.engine.adapters.load(digest, "device")
        while not self.engine.adapters.device.holds(digest):
            for event in self.step():
                if isinstance(event, AdapterState) and event.digest == digest:
                    stages.update(event.seconds)
        return 1e3 * (time.perf_counter() - started), stages

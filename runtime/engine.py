"""The engine: tokens in, tokens out. One thread drives it, step by step."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from runtime.adapter_format.canonical import canonical_from_tensors
from runtime.adapters.errors import AdapterUnavailable
from runtime.adapters.pool import AdapterPool
from runtime.admission import RequestRefused, check_request
from runtime.chunk import Chunk
from runtime.config import EngineConfig
from runtime.kv.block_pool import BlockPool
from runtime.kv.block_tables import BlockTables
from runtime.kv.held_prefixes import PrefixHolds, as_generate
from runtime.kv.offload import HostKv
from runtime.kv.transfer import KvMover
from runtime.library import Completion, OwnAdapters, array_of, complete
from runtime.messages import (
    Event,
    Failed,
    Generate,
    HoldPrefix,
    PrefixHeld,
    Ready,
    SamplingParams,
    Stats,
    Tokens,
)
from runtime.model_runner import Results
from runtime.request import FinishReason, Request
from runtime.runners import make_runner
from runtime.sampler import Sampled
from runtime.scheduler import QueueFull, Scheduler
from runtime.stats import Tallies, introduction, snapshot


class Launched(NamedTuple):
    """A step under way: its chunks in row order, its results, and whether they may be asked for after the next."""

    chunks: list[Chunk]
    results: Results
    may_wait: bool


class Engine:
    """Serves one base model and the adapters registered with it.

    A service drives `add_request` and `step`; a program may call `generate`, which does both for its own prompts. One
    thread uses an engine; only adapters load on threads of their own.
    """

    def __init__(self, config: EngineConfig):
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.config = config
        self.runner = make_runner(config)
        runner = self.runner
        self.adapters = AdapterPool(
            runner.model,
            config.adapter_bytes,
            config.host_adapter_bytes,
            runner.adapter_dtype,
            runner.device,
            config.max_lora_rank,
        )
        runner.start(self.adapters)
        self.blocks = BlockPool(self.runner.num_blocks, config.prefix_cache)
        tables = BlockTables(self.blocks, config.block_size)
        self.host_kv = HostKv(tables, KvMover(self.runner.kv, self.runner.num_host_blocks, self.adapters.pacer))
        self.scheduler = Scheduler(
            tables,
            self.adapters,
            self.host_kv,
            max_running=config.max_running,
            max_waiting=config.max_waiting,
            max_batch_tokens=config.max_batch_tokens,
        )
        self.holds = PrefixHolds(self.blocks, block_size=config.block_size, longest=self.runner.max_model_len)
        self._under_way: Launched | None = None
        self.tallies = Tallies()
        self.requests: dict[str, Request] = {}
        self._own_adapters = OwnAdapters(self.runner.model)
        self._news: list[Event] = []  # what a step that fails has not told yet, and what commands have done
        self.steps = 0

    # ------------------------------------------------------------------ requests

    def add_request(self, command: Generate) -> None:
        """Queue a request. Raises RequestRefused, and leaves nothing behind then."""
        self._queue(command)

    def hold_prefix(self, command: HoldPrefix) -> None:
        """Queue a prefix to be computed and held. Raises RequestRefused, and leaves nothing behind then."""
        generate = as_generate(command)
        self._check(generate)
        self.holds.promise(command)
        try:
            self._queue(generate, command.prefix_id)
        except RequestRefused:
            self.holds.release(command.prefix_id)
            raise

    def _check(self, command: Generate) -> None:
        if command.request_id in self.requests:
            raise RequestRefused("duplicate_request", f"request {command.request_id} is running already")
        check_request(command, self.runner.max_model_len, self.runner.model.vocab_size)

    def _queue(self, command: Generate, prefix_id: str | None = None) -> None:
        self._check(command)
        eos = self.runner.model.eos_token_ids
        request = Request(command, max_tokens=self.runner.max_model_len, eos_token_ids=eos, prefix_id=prefix_id)
        try:
            self.scheduler.add(request)
        except QueueFull as error:
            raise RequestRefused("queue_full", str(error)) from None
        except AdapterUnavailable as error:
            raise RequestRefused("adapter_failed", str(error)) from None
        self.requests[command.request_id] = request

    def abort(self, request_id: str) -> None:
        """End a request and free what it holds; one that has ended already is none of our business."""
        request = self.requests.get(request_id)
        if request is not None:
            self.scheduler.remove(request)
            self._forget(request)

    def _forget(self, request: Request) -> None:
        """A request has ended without a result."""
        del self.requests[request.request_id]
        if request.prefix_id is not None:
            self.holds.release(request.prefix_id)

    def release_prefix(self, prefix_id: str) -> None:
        """Hold a prefix no longer; one that is still being computed fails."""
        request_id = self.holds.release(prefix_id)
        if request_id is not None:
            self.abort(request_id)
            message = "the prefix was released before it was computed"
            self._news.append(Failed(request_id=request_id, code="prefix_released", message=message))

    def drop_namespace(self, namespace: str | None) -> None:
        """Let nobody find K/V of an adapter, or of the base, that has been computed so far."""
        self.host_kv.drop(namespace, self.blocks.drop_namespace(namespace))
        self._news += self.holds.end_dropped("dropped")

    # ------------------------------------------------------------------ adapters

    def add_adapter(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> str:
        """Register an adapter from memory and return its digest, by which requests name it.

        `tensors` are a PEFT state dict, `config` its adapter_config as a dict. Raises InvalidAdapter, which names the
        tensor or the field.
        """
        arrays = {name: array_of(tensor) for name, tensor in tensors.items()}
        model, most, memory = self.runner.model, self.config.max_lora_rank, self.adapters.file_memory
        digest, file = canonical_from_tensors(arrays, config, model, max_rank=most, memory=memory.take)
        self.adapters.add(digest, file)
        self._own_adapters.add(digest, file.config)
        return digest

    def register_adapter(self, digest: str, source: Path | bytes) -> None:
        """Make a canonical adapter file known under its digest; again, if it was wanted: it has been brought."""
        self.adapters.register(digest, source)

    def retire_adapter(self, digest: str) -> None:
        """Forget an adapter: what runs on it finishes, then its memory goes. Its cached blocks go now."""
        self.adapters.retire(digest)
        self._own_adapters.remove(digest)
        self.scheduler.keep_apart(digest)
        self.host_kv.drop(digest, self.blocks.drop_namespace(digest))
        self._news += self.holds.end_dropped("adapter_retired")
        self.tallies.drop(digest)

    # ------------------------------------------------------------------ the step

    @property
    def busy(self) -> bool:
        """Whether there is any request to work on, or a step under way."""
        return bool(self.requests) or self._under_way is not None

    def step(self) -> list[Event]:
        """Compute one batch, if any request can run; returns what happened. Empty-handed steps are cheap."""
        self._news += [*self.adapters.poll(), *self.holds.expire()]
        self.host_kv.land()
        if not self.scheduler.may_go_ahead:
            self._take_in()
        chunks, rejected = self.scheduler.schedule()
        for request, error in rejected:
            self._forget(request)
            self._news.append(Failed(request_id=request.request_id, code="adapter_failed", message=str(error)))
        launched = self._launch(chunks) if chunks else None
        self._take_in()  # the step before, after which the device goes on at once
        self._under_way = launched
        if launched is not None and not launched.may_wait:
            self._take_in()
        events, self._news = self._news, []
        return events

    def _launch(self, chunks: Sequence[Chunk]) -> Launched:
        """Start to compute a step; its results are for `_take_in`."""
        ordered = self.runner.prepare(chunks)
        self.host_kv.settle(self.scheduler.written_blocks(chunks))
        self.runner.kv.copy(self.scheduler.tables.copies)
        self.scheduler.tables.copied()
        with self.adapters.pacer.computing():
            results, may_wait = self.runner.launch()
        self.scheduler.advance(ordered)
        self.steps += 1
        return Launched(ordered, results, may_wait)

    def _take_in(self) -> None:
        """Commit the step that is under way, if there is one."""
        step, self._under_way = self._under_way, None
        if step is not None:
            self._news += self._commit(step.chunks, step.results())

    def _commit(self, chunks: list[Chunk], sampled: list[Sampled]) -> list[Event]:
        """Take in what a step computed; one event for each request that got a token, or failed to get one."""
        events: list[Event] = []
        choices = iter(sampled)
        for chunk in chunks:
            choice = next(choices) if chunk.samples else None
            if self.requests.get(chunk.request.request_id) is not chunk.request:
                continue  # it has ended while this was under way
            if choice is not None and choice.token_id is None:
                events.append(self._fail_non_finite(chunk.request))
                continue
            request = chunk.request
            end = chunk.start + chunk.length
            reason = self.scheduler.commit(chunk, None if choice is None else choice.token_id)
            if choice is not None:
                events.append(self._emit(request, choice, reason, first=end == request.num_prompt))
            elif request.prefix_id is not None and end == len(request):
                events.append(self._hold(request))
        return events

    def _emit(self, request: Request, choice: Sampled, reason: FinishReason | None, *, first: bool) -> Tokens:
        assert choice.token_id is not None
        assert request.started_at is not None
        self.tallies.generated_tokens += 1
        if first:
            self.tallies.count_prompt(request)
        if reason is not None:
            del self.requests[request.request_id]
        stopped = reason == "stop"
        return Tokens(
            request_id=request.request_id,
            token_ids=[] if stopped else [choice.token_id],
            finish_reason=reason,
            stop_token=choice.token_id if stopped else None,
            logprobs=[choice.logprobs] if choice.logprobs and not stopped else None,
            cached_tokens=request.cached_tokens if first else None,
            queue_seconds=request.started_at - request.enqueued_at if first else None,
        )

    def _hold(self, request: Request) -> PrefixHeld | Failed:
        """A prefix has been computed: hold its blocks."""
        self.tallies.count_prompt(request)
        del self.requests[request.request_id]
        try:
            return self.holds.keep(request, self.scheduler.finish_prefix(request))
        except RequestRefused as refusal:
            return Failed(request_id=request.request_id, code=refusal.code, message=str(refusal))

    def _fail_non_finite(self, request: Request) -> Failed:
        """End a request whose logits are not finite, and let nobody find K/V of the same weights again."""
        self.abort(request.request_id)
        if request.adapter is not None:
            self.scheduler.keep_apart(request.adapter)
        self.drop_namespace(request.adapter)
        whose = "the base model" if request.adapter is None else f"adapter {request.adapter}"
        return Failed(
            request_id=request.request_id,
            code="non_finite_logits",
            message=f"{whose} gave an output that is not finite",
        )

    def fail_all(self, code: str, message: str) -> list[Event]:
        """End every request with the same reason."""
        self._under_way = None
        failed = list(self.requests)
        for request_id in failed:
            self.abort(request_id)
        return [Failed(request_id=request_id, code=code, message=message) for request_id in failed]

    # ------------------------------------------------------------------ as a library

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        adapters: str | Sequence[str | None] | None = None,
        invocation_starts: Sequence[int | None] | None = None,
    ) -> list[Completion]:
        """Complete token-id prompts together and return their outputs in order.

        `params` and `adapters` (digests from `add_adapter`, None for the base) are one for all or one for each prompt.
        `invocation_starts` are where adapters begin to apply; without one, an aLoRA adapter does so at the last of its
        invocations, and others do from the first token on. Raises RequestRefused for the first prompt that cannot run;
        the others are then dropped.
        """
        each_params = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        each_adapter = [adapters] * len(prompts) if adapters is None or isinstance(adapters, str) else list(adapters)
        each_start = [None] * len(prompts) if invocation_starts is None else list(invocation_starts)
        each = zip(prompts, each_params, each_adapter, each_start, strict=True)
        return complete(self, [self._own_adapters.command(f"generate-{i}", *one) for i, one in enumerate(each)])

    def wait(self, timeout: float) -> None:
        """Block until something has come that requests wait for, or `timeout` seconds pass: when no step can run."""
        if not self.host_kv.wait(timeout):
            self.adapters.wait(timeout)

    # ------------------------------------------------------------------ looking in

    def watch(self, on_arrival: Callable[[], None]) -> None:
        """Call `on_arrival`, from a thread, whenever something has come that a step has to take in."""
        self.adapters.watch(on_arrival)
        self.host_kv.watch(on_arrival)

    @property
    def ready(self) -> Ready:
        """What a client has to know of this engine."""
        return introduction(self)

    def stats(self) -> Stats:
        """A snapshot of the engine's state and of its counters since start."""
        return snapshot(self)

    def check(self) -> None:
        """Recount the invariants of everything the engine owns."""
        self.scheduler.check([*self.holds.held, *self.host_kv.held])
        self.host_kv.check()
        self.holds.check({s.prefix_id for s in self.requests.values() if s.prefix_id is not None})
        self.adapters.check()
        assert set(self.requests.values()) == {*self.scheduler.running, *self.scheduler.waiting}

    def close(self) -> None:
        self.host_kv.close()
        self.adapters.close()

"""The engine: tokens in, tokens out. One thread drives it, step by step."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from runtime.adapters.errors import AdapterUnavailable
from runtime.adapters.pool import AdapterPool
from runtime.config import EngineConfig
from runtime.cpu.choice import threads_of
from runtime.follower.steps import step_of
from runtime.grammar.grammars import Grammars
from runtime.kv.block_manager import BlockManager
from runtime.kv.block_pool import BlockPool
from runtime.kv.held_prefixes import HeldPrefixes, as_generate
from runtime.kv.log import KvLog
from runtime.kv.offload import Offload
from runtime.kv.transfer import BlockTransfer
from runtime.library import Completion, OwnAdapters, PreparedAdapter
from runtime.messages import (
    EngineCode,
    Event,
    Failed,
    Generate,
    HoldPrefix,
    PrefixHeld,
    RankStats,
    Ready,
    SamplingParams,
    Stats,
    Tokens,
)
from runtime.request import FinishReason, Request, RequestRefused, check_limits
from runtime.runner import Results, make_runner
from runtime.sampler import Sampled
from runtime.scheduler import Chunk, QueueFull, Rejected, Scheduler
from runtime.stats import Tallies, snapshot


class Launched(NamedTuple):
    """A step that was launched and whose results have not been committed."""

    chunks: list[Chunk]  # in the order of their rows
    results: Results
    may_wait: bool  # the next step may be launched before the results are read


class Engine:
    """Serves one base model and the adapters registered with it.

    A service calls `add_request` and `step`; a program may call `generate`, which does both for its own prompts. One
    thread uses an engine; only adapters load on threads of their own.
    """

    def __init__(self, config: EngineConfig):
        if config.threads is not None or config.tensor_parallel_size > 1:
            torch.set_num_threads(threads_of(config))
        self.config = config
        self.runner = runner = make_runner(config)
        with runner.allocating():
            self.adapters = AdapterPool(
                runner.model,
                runner.sizes.adapter_bytes,
                config.host_adapter_bytes,
                runner.adapter_dtype,
                runner.device,
                config.max_lora_rank,
                runner.adapter_layout,
            )
            transfer = BlockTransfer(runner.kv, runner.num_host_blocks, self.adapters.pacer, runner.followers)
        self.adapters.lead(runner.followers)
        runner.start(self.adapters)
        runner.followers.wait_until_ready()
        self.grammars = Grammars(Path(config.model), runner.model.vocab_size, runner.model.eos_token_ids)
        self._kv_log = KvLog(config.block_size) if config.kv_changes else None
        self.blocks = BlockPool(runner.num_blocks, config.prefix_cache, self._kv_log)
        block_manager = BlockManager(self.blocks, config.block_size)
        self.offload = Offload(block_manager, transfer, self._kv_log)
        self.scheduler = Scheduler(
            block_manager,
            self.adapters,
            self.offload,
            max_running=runner.sizes.max_running,
            max_waiting=config.max_waiting,
            max_batch_tokens=runner.sizes.max_batch_tokens,
        )
        self.prefixes = HeldPrefixes(self.blocks, block_size=config.block_size, longest=runner.max_model_len)
        self.tallies = Tallies()
        self.steps = 0  # that were launched
        self.completed_steps = 0  # whose results were committed
        self._own_adapters = OwnAdapters(runner.model, config, self.adapters)
        self._launched: Launched | None = None
        self._paused = False
        self._events: list[Event] = []  # to be returned by the next `step`

    def add_request(self, command: Generate) -> None:
        """Queue a request. Raises RequestRefused, and then changes nothing."""
        self._queue(command)

    def hold_prefix(self, command: HoldPrefix) -> None:
        """Queue a prefix to be computed and held. Raises RequestRefused, and then changes nothing."""
        generate = as_generate(command)
        self._check(generate)
        self.prefixes.reserve(command)
        try:
            self._queue(generate, command.prefix_id)
        except RequestRefused:
            self.prefixes.release(command.prefix_id)
            raise

    def _check(self, command: Generate) -> None:
        if command.request_id in self.requests:
            raise RequestRefused("duplicate_request", f"request {command.request_id} is running already")
        check_limits(command, self.runner.max_model_len, self.runner.model.vocab_size)

    def _queue(self, command: Generate, prefix_id: str | None = None) -> None:
        self._check(command)
        eos = self.runner.model.eos_token_ids
        grammar = command.params.grammar
        request = Request(
            command,
            max_tokens=self.runner.max_model_len,
            eos_token_ids=eos,
            prefix_id=prefix_id,
            constraint=None if grammar is None else self.grammars.constrain(grammar),
        )
        try:
            self.scheduler.add(request)
        except QueueFull as error:
            raise RequestRefused("queue_full", str(error)) from None
        except AdapterUnavailable as error:
            raise RequestRefused("adapter_failed", str(error)) from None

    def abort(self, request_id: str) -> None:
        """End a request and free all that it holds. A request that has ended already is ignored."""
        request = self.requests.get(request_id)
        if request is not None:
            self.scheduler.remove(request)
            self._release_prefix_of(request)

    def _release_prefix_of(self, request: Request) -> None:
        """The request ended before it had computed its prefix."""
        if request.prefix_id is not None:
            self.prefixes.release(request.prefix_id)

    def release_prefix(self, prefix_id: str) -> None:
        """Release a held prefix. If it is still being computed, its request fails."""
        request_id = self.prefixes.release(prefix_id)
        if request_id is not None:
            self.abort(request_id)
            message = "the prefix was released before it was computed"
            self._events.append(Failed(request_id=request_id, code="prefix_released", message=message))

    def drop_namespace(self, namespace: str | None) -> None:
        """Forget all K/V that were computed under an adapter, or by the base (None), until now."""
        self.offload.drop(namespace, self.blocks.drop_namespace(namespace))
        self._events += self.prefixes.end_dropped("dropped")

    def set_paused(self, paused: bool) -> None:
        """Let `step` compute nothing, or go on. Requests keep their blocks and adapters meanwhile, new ones queue."""
        if paused:
            self._commit_launched()
        self._paused = paused

    def add_adapter(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> str:
        """Register an adapter from memory and return its digest, by which requests name it.

        `tensors` are what PEFT's `get_peft_model_state_dict` returns, `config` is its configuration's `to_dict`. Raises
        InvalidAdapter, which names the tensor or the field.
        """
        return self._own_adapters.add(self._own_adapters.prepare(tensors, config))

    def prepare_adapter(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> "Future[PreparedAdapter]":
        """Do in the background what takes long of `add_adapter`; the tensors must not change before `add_prepared`."""
        return self._own_adapters.prepare_later(tensors, config)

    def add_prepared(self, prepared: PreparedAdapter) -> str:
        """Register an adapter that has been prepared and return its digest. Takes microseconds."""
        return self._own_adapters.add(prepared)

    def register_adapter(self, digest: str, source: Path | bytes) -> None:
        """Register the canonical file of an adapter under its digest; again, once a missing file is in its place."""
        self.adapters.register(digest, source)

    def retire_adapter(self, digest: str) -> None:
        """Forget an adapter and its K/V. Requests that have begun on it finish, then its memory is freed."""
        self.scheduler.keep_adapter(digest)
        self.adapters.retire(digest)
        self._own_adapters.remove(digest)
        self.scheduler.make_private(digest)
        self.offload.drop(digest, self.blocks.drop_namespace(digest))
        self._events += self.prefixes.end_dropped("adapter_retired")
        self.tallies.drop(digest)

    @property
    def requests(self) -> dict[str, Request]:
        """All requests that run or wait, by id."""
        return self.scheduler.requests

    @property
    def busy(self) -> bool:
        """Whether there is a request, or a launched step whose results are not committed."""
        return bool(self.requests) or self._launched is not None

    def step(self) -> list[Event]:
        """Compute one batch, if any request can run. Returns the events since the last step."""
        self._events += self.adapters.poll()
        self.offload.register_reloaded()
        if not self._paused:
            self._compute()
        events, self._events = self._events + (self._kv_log.take() if self._kv_log else []), []
        return events

    def _compute(self) -> None:
        """Launch the next step, and commit what was launched before it."""
        if not self.scheduler.can_schedule_ahead:
            self._commit_launched()
        chunks, rejected = self.scheduler.schedule()
        self._fail_rejected(rejected)
        launched = self._launch(chunks) if chunks else None
        self._commit_launched()  # the step before, while the device computes this one
        self._launched = launched
        if launched is not None and not launched.may_wait:
            self._commit_launched()

    def _fail_rejected(self, rejected: Rejected) -> None:
        for request, error in rejected:
            self._release_prefix_of(request)
            self._events.append(Failed(request_id=request.request_id, code=error.code, message=str(error)))

    def _launch(self, chunks: Sequence[Chunk]) -> Launched:
        """Start to compute a step, after the copies that have to precede it."""
        ordered = self.runner.prepare(chunks)
        self.offload.before_writing(self.scheduler.written_blocks(chunks))
        copies = self.scheduler.block_manager.copies
        if self.runner.followers:
            self.runner.followers.tell(step_of(ordered, copies, self.adapters, self.config.block_size))
        self.runner.kv.copy(copies)
        self.scheduler.block_manager.copied()
        with self.adapters.pacer.computing():
            results, may_wait = self.runner.launch()
        self.scheduler.advance(ordered)
        self.steps += 1
        return Launched(ordered, results, may_wait)

    def _commit_launched(self) -> None:
        """Wait for the results of the launched step, if there is one, and commit them."""
        step, self._launched = self._launched, None
        if step is not None:
            self._events += self._commit(step.chunks, step.results())
            self.completed_steps += 1

    def _commit(self, chunks: list[Chunk], sampled: list[Sampled]) -> list[Event]:
        """Commit the chunks of a step. Returns one event for each request that got a token, ended or is held."""
        events: list[Event] = []
        choices = iter(sampled)
        for chunk in chunks:
            request = chunk.request
            scored = len(chunk.scored)
            choice = next(choices) if chunk.samples or scored else None
            if request not in self.scheduler:
                continue  # it ended after the step was launched
            if choice is not None and (
                (chunk.samples and choice.token_id is None) or (scored and choice.prompt is None)
            ):
                events.append(self._fail_non_finite(request))
                continue
            if choice is not None and request.constraint is not None and request.constraint.failure is not None:
                self.abort(request.request_id)
                message = request.constraint.failure
                events.append(Failed(request_id=request.request_id, code="grammar_failed", message=message))
                continue
            if choice is not None and choice.prompt is not None:
                request.prompt_logprobs += choice.prompt
                request.unscored += scored
            end = chunk.start + chunk.length
            reason = self.scheduler.commit(chunk, None if choice is None else choice.token_id)
            if choice is not None and chunk.samples:
                events.append(self._tokens(request, choice, reason, first=end == request.num_prompt))
            elif reason is not None:
                events.append(self._only_prompt(request, reason))
            elif request.prefix_id is not None and end == len(request):
                events.append(self._hold(request))
        return events

    def _tokens(self, request: Request, choice: Sampled, reason: FinishReason | None, *, first: bool) -> Tokens:
        assert choice.token_id is not None
        self.tallies.generated_tokens += 1
        if first:
            self.tallies.count_prompt(request)
        stopped = reason == "stop"
        return Tokens(
            request_id=request.request_id,
            token_ids=[] if stopped else [choice.token_id],
            finish_reason=reason,
            stop_token=choice.token_id if stopped else None,
            logprobs=[choice.logprobs] if choice.logprobs and not stopped else None,
            stop_logprobs=choice.logprobs if stopped else None,
            prompt_logprobs=request.prompt_logprobs if first and request.params.prompt_logprobs is not None else None,
            **(request.first_event if first else {}),
        )

    def _only_prompt(self, request: Request, reason: FinishReason) -> Tokens:
        """The one event of a request that generates nothing."""
        self.tallies.count_prompt(request)
        return Tokens(
            request_id=request.request_id,
            token_ids=[],
            finish_reason=reason,
            prompt_logprobs=request.prompt_logprobs if request.params.prompt_logprobs is not None else None,
            **request.first_event,
        )

    def _hold(self, request: Request) -> PrefixHeld | Failed:
        """A prefix has been computed: end its request and hold its blocks."""
        self.tallies.count_prompt(request)
        try:
            return self.prefixes.hold(request, self.scheduler.finish_prefix(request))
        except RequestRefused as refusal:
            return Failed(request_id=request.request_id, code=refusal.code, message=str(refusal))

    def _fail_non_finite(self, request: Request) -> Failed:
        """End a request whose logits are not finite, and forget all K/V of the same weights."""
        self.abort(request.request_id)
        if request.adapter is not None:
            self.scheduler.make_private(request.adapter)
        self.drop_namespace(request.adapter)
        whose = "the base model" if request.adapter is None else f"adapter {request.adapter}"
        return Failed(
            request_id=request.request_id,
            code="non_finite_logits",
            message=f"{whose} gave an output that is not finite",
        )

    def fail_all(self, code: EngineCode, message: str) -> list[Event]:
        """End every request with the same reason."""
        self._launched = None
        failed = list(self.requests)
        for request_id in failed:
            self.abort(request_id)
        return [Failed(request_id=request_id, code=code, message=message) for request_id in failed]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        adapters: str | Sequence[str | None] | None = None,
        invocation_starts: Sequence[int | None] | None = None,
    ) -> list[Completion]:
        """Complete token-id prompts together and return their outputs in order.

        `params` and `adapters` (digests from `add_adapter`, None for the base) are one for all or one for each prompt.
        `invocation_starts` are the positions from which adapters apply; without one, an aLoRA adapter applies from the
        last of its invocations, and any other adapter from the first token. Raises RequestRefused for the first prompt
        that cannot run; the others are then dropped.
        """
        each_params = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        each_adapter = [adapters] * len(prompts) if adapters is None or isinstance(adapters, str) else list(adapters)
        each_start = [None] * len(prompts) if invocation_starts is None else list(invocation_starts)
        each = enumerate(zip(prompts, each_params, each_adapter, each_start, strict=True))
        commands = [self._own_adapters.command(f"generate-{index}", *one) for index, one in each]
        outputs = {command.request_id: Completion() for command in commands}
        try:
            for command in commands:
                self.add_request(command)
            while any(output.finish_reason is None for output in outputs.values()):
                self._step_for(outputs)
        finally:
            for request_id in outputs:
                self.abort(request_id)
        return list(outputs.values())

    def _step_for(self, outputs: Mapping[str, Completion]) -> None:
        """Do one step of `generate`; if no request can run, wait for what they need."""
        steps = self.steps
        for event in self.step():
            if isinstance(event, Failed):
                raise RequestRefused(event.code, event.message)
            if isinstance(event, Tokens):
                outputs[event.request_id].add(event)
        if self.steps == steps:
            for digest, reason in self.adapters.missing.items():
                self.adapters.fail(digest, reason)  # only the caller could fetch the file, and it waits for us
            self.wait(timeout=1.0)

    def wait(self, timeout: float) -> None:
        """Block until an adapter, K/V or a grammar that requests need is there, or `timeout` seconds pass."""
        if not self.grammars.wait(timeout) and not self.offload.wait(timeout):
            self.adapters.wait(timeout)

    def watch(self, on_arrival: Callable[[], None]) -> None:
        """Call `on_arrival`, from a thread, whenever something has ended that the next step has to take note of."""
        self.adapters.watch(on_arrival)
        self.grammars.watch(on_arrival)
        self.offload.watch(on_arrival)

    @property
    def ready(self) -> Ready:
        """The limits that a client has to know."""
        return Ready(
            max_model_len=self.runner.max_model_len,
            vocab_size=self.runner.model.vocab_size,
            block_size=self.config.block_size,
            num_blocks=self.runner.num_blocks,
            max_running=self.runner.sizes.max_running,
            max_batch_tokens=self.runner.sizes.max_batch_tokens,
            dtype=str(self.runner.dtype).removeprefix("torch."),
            adapter_bytes=self.adapters.device.capacity_bytes,
            kernels=self.runner.kernels,
            weights=self.runner.weights_held,
            timings=dict(self.runner.timings),
            device=str(self.runner.device),
            threads=self.runner.cpu_threads,
            num_host_blocks=self.runner.num_host_blocks,
            host_adapter_bytes=self.adapters.host.capacity_bytes,
        )

    def stats(self) -> Stats:
        """A snapshot of the engine's state, and its counters since start."""
        runner, ranks = self.runner, None
        if runner.followers:
            ranks = RankStats(summed_bytes=runner.group.bytes_sent, command_bytes=runner.followers.bytes_sent)
        return snapshot(self.scheduler, self.prefixes, self.tallies, self.steps, ranks)

    def check(self) -> None:
        """Recount the invariants of everything that the engine owns."""
        self.scheduler.check([*self.prefixes.held, *self.offload.held])
        self.offload.check()
        requests = self.requests.values()
        self.prefixes.check(request.prefix_id for request in requests if request.prefix_id is not None)
        self.adapters.check()

    def close(self) -> None:
        self.grammars.close()
        self.offload.close()
        self.adapters.close()
        self.runner.close()

"""The engine: tokens in, tokens out. One thread drives it, step by step."""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from runtime.adapter_format import canonical_from_tensors
from runtime.adapter_pool import AdapterPool
from runtime.adapter_unavailable import AdapterUnavailable
from runtime.admission import RequestRefused, check_request
from runtime.batch import build_batch
from runtime.block_pool import BlockPool
from runtime.config import EngineConfig
from runtime.messages import Event, Failed, Generate, Ready, SamplingParams, Stats, TokenLogprobs, Tokens
from runtime.model_runner import ModelRunner
from runtime.sampler import Sampled, sample
from runtime.scheduler import Chunk, QueueFull, Scheduler
from runtime.sequence import FinishReason, Sequence


class Completion(msgspec.Struct, kw_only=True):
    """What `Engine.generate` made of one prompt; `stop_token` is the token that ended it, not among `token_ids`."""

    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    logprobs: list[TokenLogprobs]
    cached_tokens: int = 0


def _array(tensor: Tensor) -> np.ndarray:
    """A tensor's values as numpy holds them: bfloat16, which it does not know, as its bits."""
    tensor = tensor.detach().cpu().contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


class Engine:
    """Serves one base model and the adapters registered with it.

    A service drives `add_request` and `step`; a program may call `generate`, which does both for its own prompts. One
    thread uses an engine; only adapters load on threads of their own.
    """

    def __init__(self, config: EngineConfig):
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.config = config
        self.runner = ModelRunner(config)
        self.adapters = AdapterPool(
            self.runner.model, config.adapter_bytes, config.host_adapter_bytes, torch.float32, self.runner.device
        )
        self.blocks = BlockPool(self.runner.num_blocks, config.prefix_cache)
        self.scheduler = Scheduler(
            self.blocks,
            self.adapters,
            block_size=config.block_size,
            max_running=config.max_running,
            max_waiting=config.max_waiting,
            max_batch_tokens=config.max_batch_tokens,
        )
        self.sequences: dict[str, Sequence] = {}
        self.steps = self.prompt_tokens = self.cached_tokens = self.generated_tokens = 0

    # ------------------------------------------------------------------ requests

    def add_request(self, request: Generate) -> None:
        """Queue a request. Raises RequestRefused, and leaves nothing behind then."""
        if request.request_id in self.sequences:
            raise RequestRefused("duplicate_request", f"request {request.request_id} is running already")
        check_request(request, self.runner.max_model_len, self.runner.model.vocab_size)
        eos = self.runner.model.eos_token_ids
        sequence = Sequence(request, max_tokens=self.runner.max_model_len, eos_token_ids=eos)
        try:
            self.scheduler.add(sequence)
        except QueueFull as error:
            raise RequestRefused("queue_full", str(error)) from None
        except AdapterUnavailable as error:
            raise RequestRefused("adapter_failed", str(error)) from None
        self.sequences[request.request_id] = sequence

    def abort(self, request_id: str) -> None:
        """End a request and free what it holds; one that has ended already is none of our business."""
        sequence = self.sequences.pop(request_id, None)
        if sequence is not None:
            self.scheduler.remove(sequence)

    # ------------------------------------------------------------------ adapters

    def add_adapter(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> str:
        """Register an adapter from memory and return its digest, by which requests name it.

        `tensors` are a PEFT state dict, `config` its adapter_config as a dict. Raises InvalidAdapter, which names the
        tensor or the field.
        """
        arrays = {name: _array(tensor) for name, tensor in tensors.items()}
        digest, file = canonical_from_tensors(arrays, config, self.runner.model, max_rank=self.config.max_lora_rank)
        self.register_adapter(digest, file)
        return digest

    def register_adapter(self, digest: str, source: Path | bytes) -> None:
        """Make a canonical adapter file known under its digest; again, if it was wanted: it has been brought."""
        self.adapters.register(digest, source)

    def retire_adapter(self, digest: str) -> None:
        """Forget an adapter: what runs on it finishes, then its memory goes. Its cached blocks go now."""
        self.adapters.retire(digest)
        self.blocks.drop_namespace(digest)

    # ------------------------------------------------------------------ the step

    @property
    def busy(self) -> bool:
        """Whether there is any request to work on."""
        return bool(self.sequences)

    def step(self) -> list[Event]:
        """Compute one batch, if any sequence can run; returns what happened. Empty-handed steps are cheap."""
        events: list[Event] = list(self.adapters.poll())
        chunks, rejected = self.scheduler.schedule()
        for sequence, error in rejected:
            del self.sequences[sequence.request_id]
            events.append(Failed(request_id=sequence.request_id, code="adapter_failed", message=str(error)))
        if chunks:
            runner = self.runner
            batch = build_batch(
                chunks, runner.model, self.config.block_size, self.adapters.lookup, runner.dtype, runner.device
            )
            logits = runner.forward(batch)
            events += self._commit(batch.chunks, sample(logits, batch.sampling))
            self.steps += 1
        return events

    def _commit(self, chunks: list[Chunk], sampled: list[Sampled]) -> list[Event]:
        """Take in what a step computed; one event for each sequence that got a token, or failed to get one."""
        events: list[Event] = []
        choices = iter(sampled)
        for chunk in chunks:
            choice = next(choices) if chunk.samples else None
            if choice is not None and choice.token_id is None:
                events.append(self._fail_non_finite(chunk.sequence))
                continue
            first = chunk.sequence.num_generated == 0
            reason = self.scheduler.commit(chunk, None if choice is None else choice.token_id)
            if choice is not None:
                events.append(self._emit(chunk.sequence, choice, reason, first))
        return events

    def _emit(self, sequence: Sequence, choice: Sampled, reason: FinishReason | None, first: bool) -> Tokens:
        assert choice.token_id is not None
        assert sequence.started_at is not None
        self.generated_tokens += 1
        if first:
            self.prompt_tokens += sequence.num_prompt
            self.cached_tokens += sequence.cached_tokens or 0
        if reason is not None:
            del self.sequences[sequence.request_id]
        stopped = reason == "stop"
        return Tokens(
            request_id=sequence.request_id,
            token_ids=[] if stopped else [choice.token_id],
            finish_reason=reason,
            stop_token=choice.token_id if stopped else None,
            logprobs=[choice.logprobs] if choice.logprobs and not stopped else None,
            cached_tokens=sequence.cached_tokens if first else None,
            queue_seconds=sequence.started_at - sequence.enqueued_at if first else None,
        )

    def _fail_non_finite(self, sequence: Sequence) -> Failed:
        """End a sequence whose logits are not finite, and let nobody find K/V of the same weights again."""
        self.abort(sequence.request_id)
        self.blocks.drop_namespace(sequence.adapter)
        whose = "the base model" if sequence.adapter is None else f"adapter {sequence.adapter}"
        return Failed(
            request_id=sequence.request_id,
            code="non_finite_logits",
            message=f"{whose} gave an output that is not finite",
        )

    def fail_all(self, code: str, message: str) -> list[Event]:
        """End every request with the same reason."""
        failed = list(self.sequences)
        for request_id in failed:
            self.abort(request_id)
        return [Failed(request_id=request_id, code=code, message=message) for request_id in failed]

    # ------------------------------------------------------------------ as a library

    def generate(
        self,
        prompts: Seq[Seq[int]],
        params: SamplingParams | Seq[SamplingParams],
        adapters: str | Seq[str | None] | None = None,
    ) -> list[Completion]:
        """Complete token-id prompts together and return their outputs in order.

        `params` and `adapters` (digests from `add_adapter`, None for the base) are one for all or one for each prompt.
        Raises RequestRefused for the first prompt that cannot run; the others are then dropped.
        """
        each_params = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        each_adapter = [adapters] * len(prompts) if adapters is None or isinstance(adapters, str) else list(adapters)
        outputs = {f"generate-{index}": Completion(token_ids=[], logprobs=[]) for index in range(len(prompts))}
        try:
            for request_id, token_ids, own, adapter in zip(outputs, prompts, each_params, each_adapter, strict=True):
                self.add_request(
                    Generate(request_id=request_id, token_ids=list(token_ids), params=own, adapter=adapter)
                )
            while any(output.finish_reason is None for output in outputs.values()):
                self._collect(outputs)
        finally:
            for request_id in outputs:
                self.abort(request_id)
        return list(outputs.values())

    def _collect(self, outputs: Mapping[str, Completion]) -> None:
        steps = self.steps
        for event in self.step():
            if isinstance(event, Failed):
                raise RequestRefused(event.code, event.message)
            if isinstance(event, Tokens):
                output = outputs[event.request_id]
                output.token_ids += event.token_ids
                output.logprobs += event.logprobs or []
                output.finish_reason, output.stop_token = event.finish_reason, event.stop_token
                output.cached_tokens += event.cached_tokens or 0
        if self.steps == steps:
            for digest, reason in self.adapters.wanted.items():
                self.adapters.fail(digest, reason)  # whoever could bring the file is waiting for us to return
            self.adapters.wait(timeout=1.0)

    # ------------------------------------------------------------------ looking in

    @property
    def ready(self) -> Ready:
        """What a client has to know of this engine."""
        return Ready(
            max_model_len=self.runner.max_model_len,
            vocab_size=self.runner.model.vocab_size,
            block_size=self.config.block_size,
            num_blocks=self.runner.num_blocks,
            max_batch_tokens=self.config.max_batch_tokens,
            dtype=str(self.runner.dtype).removeprefix("torch."),
            adapter_bytes=self.adapters.device.capacity_bytes,
        )

    def stats(self) -> Stats:
        """A snapshot of the engine's state and of its counters since start."""
        return Stats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            blocks_total=self.blocks.num_blocks - 1,
            blocks_used=self.blocks.used,
            blocks_cached=self.blocks.cached,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            generated_tokens=self.generated_tokens,
            preemptions=self.scheduler.preemptions,
            steps=self.steps,
            device=self.adapters.device.stats(),
            host=self.adapters.host.stats(),
            running_adapters=sorted({s.adapter for s in self.scheduler.running if s.adapter}),
            waiting_adapters=sorted({s.adapter for s in self.scheduler.waiting if s.adapter}),
        )

    def check(self) -> None:
        """Recount the invariants of everything the engine owns."""
        self.scheduler.check()
        self.adapters.check()
        assert set(self.sequences.values()) == {*self.scheduler.running, *self.scheduler.waiting}

    def close(self) -> None:
        self.adapters.close()

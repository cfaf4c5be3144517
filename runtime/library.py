"""The engine as a library: prompts in, completions out, with adapters that were added from memory."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import msgspec
import numpy as np
import torch
from torch import Tensor

from runtime.adapter_format.canonical import AdapterConfig, kv_is_base
from runtime.adapters.pool import AdapterPool
from runtime.admission import RequestRefused
from runtime.invocation import find_invocation
from runtime.messages import Event, Failed, Generate, SamplingParams, TokenLogprobs, Tokens
from runtime.models.config import ModelConfig
from runtime.request import FinishReason


class Completion(msgspec.Struct, kw_only=True):
    """What `Engine.generate` made of one prompt; `stop_token` is the token that ended it, not among `token_ids`."""

    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    logprobs: list[TokenLogprobs]
    cached_tokens: int = 0


def array_of(tensor: Tensor) -> np.ndarray:
    """A tensor's values as numpy holds them: bfloat16, which it does not know, as its bits."""
    tensor = tensor.detach().cpu().contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


class OwnAdapter(NamedTuple):
    """What a request must know of an adapter."""

    invocation_tokens: tuple[int, ...] | None
    kv_is_base: bool


class OwnAdapters:
    """What the adapters that were added from memory ask of requests, as a service knows it of its own."""

    def __init__(self, model: ModelConfig) -> None:
        self._model = model
        self._adapters: dict[str, OwnAdapter] = {}

    def add(self, digest: str, config: AdapterConfig) -> None:
        self._adapters[digest] = OwnAdapter(config.alora_invocation_tokens, kv_is_base(config.scales, self._model))

    def remove(self, digest: str) -> None:
        self._adapters.pop(digest, None)

    def command(
        self,
        request_id: str,
        prompt: Sequence[int],
        params: SamplingParams,
        adapter: str | None,
        invocation_start: int | None,
    ) -> Generate:
        """A request for one prompt. Raises RequestRefused when it lacks the invocation of an aLoRA adapter."""
        own = self._adapters.get(adapter or "", OwnAdapter(None, False))
        if invocation_start is None and own.invocation_tokens is not None:
            invocation_start = find_invocation(prompt, own.invocation_tokens)
            if invocation_start is None:
                message = f"the prompt lacks the invocation of adapter {adapter}, the tokens {[*own.invocation_tokens]}"
                raise RequestRefused("alora_invocation_missing", message)
        return Generate(
            request_id=request_id,
            token_ids=list(prompt),
            params=params,
            adapter=adapter,
            invocation_start=invocation_start or 0,
            kv_is_base=own.kv_is_base,
        )


class Driven(Protocol):
    """What is needed of an engine to run requests on it."""

    adapters: AdapterPool
    steps: int

    def add_request(self, command: Generate) -> None: ...
    def abort(self, request_id: str) -> None: ...
    def step(self) -> list[Event]: ...
    def wait(self, timeout: float) -> None: ...


def complete(engine: Driven, commands: Sequence[Generate]) -> list[Completion]:
    """Run requests to their end. Raises RequestRefused for the first that cannot run; the others are then dropped."""
    outputs = {command.request_id: Completion(token_ids=[], logprobs=[]) for command in commands}
    try:
        for command in commands:
            engine.add_request(command)
        while any(output.finish_reason is None for output in outputs.values()):
            _collect(engine, outputs)
    finally:
        for request_id in outputs:
            engine.abort(request_id)
    return list(outputs.values())


def _collect(engine: Driven, outputs: Mapping[str, Completion]) -> None:
    steps = engine.steps
    for event in engine.step():
        if isinstance(event, Failed):
            raise RequestRefused(event.code, event.message)
        if isinstance(event, Tokens):
            output = outputs[event.request_id]
            output.token_ids += event.token_ids
            output.logprobs += event.logprobs or []
            output.finish_reason, output.stop_token = event.finish_reason, event.stop_token
            output.cached_tokens += event.cached_tokens or 0
    if engine.steps == steps:
        for digest, reason in engine.adapters.missing.items():
            engine.adapters.fail(digest, reason)  # only the caller could fetch the file, and it waits for us
        engine.wait(timeout=1.0)

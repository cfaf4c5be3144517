"""The engine as a library: what `Engine.generate` returns, and the adapters that a program added from memory."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor

from runtime.adapter_format.base_tensors import base_tensors
from runtime.adapter_format.canonical import canonical_from_tensors, kv_is_base
from runtime.adapters.layout import AdapterLayout
from runtime.adapters.loader import Content
from runtime.adapters.pool import AdapterPool
from runtime.config import EngineConfig
from runtime.invocation import find_invocation
from runtime.messages import Generate, SamplingParams, TokenLogprobs, Tokens
from runtime.models.config import ModelConfig
from runtime.request import FinishReason, RequestRefused


class Completion(msgspec.Struct, kw_only=True):
    """The output of one prompt."""

    token_ids: list[int] = []
    finish_reason: FinishReason | None = None
    stop_token: int | None = None  # the token that ended the output; it is not among token_ids
    logprobs: list[TokenLogprobs] = []  # one entry for each token, if the request asked for them
    prompt_logprobs: list[TokenLogprobs] = []  # of the prompt's tokens, if the request asked for them
    cached_tokens: int = 0  # tokens of the prompt whose K/V were reused

    def add(self, tokens: Tokens) -> None:
        self.token_ids += tokens.token_ids
        self.logprobs += tokens.logprobs or []
        self.prompt_logprobs += tokens.prompt_logprobs or []
        self.finish_reason, self.stop_token = tokens.finish_reason, tokens.stop_token
        self.cached_tokens += tokens.cached_tokens or 0


def array_of(tensor: Tensor) -> np.ndarray[Any, Any]:
    """A tensor's values as a numpy array: bfloat16, which numpy does not know, as the uint16 of its bits."""
    tensor = tensor.detach().cpu().contiguous()
    array: np.ndarray[Any, Any] = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


def _recorded(tensors: Mapping[str, Tensor]) -> torch.cuda.Event | None:
    """On a CUDA device, an event after what the calling thread's stream has been asked to write to the tensors."""
    on_device = next((tensor for tensor in tensors.values() if tensor.is_cuda), None)
    if on_device is None:
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(on_device.device))
    return event


@contextmanager
def _after(written: torch.cuda.Event | None) -> Iterator[None]:
    """Copies from the device run after an event, on a stream of their own: steps do not wait for them."""
    if written is None:
        yield
        return
    stream = torch.cuda.Stream(written.device)
    with torch.cuda.stream(stream):
        stream.wait_event(written)
        yield


class OwnAdapter(NamedTuple):
    invocation_tokens: tuple[int, ...] | None  # of an aLoRA adapter
    kv_is_base: bool


class PreparedAdapter(NamedTuple):
    """An adapter's canonical file in memory, checked and laid out, with its digest."""

    digest: str
    content: Content
    own: OwnAdapter


class OwnAdapters:
    """The adapters that a program added, with what a request on them has to say; a service keeps records instead."""

    def __init__(self, model: ModelConfig, config: EngineConfig, pool: AdapterPool) -> None:
        self._model, self._config, self._pool = model, config, pool
        self._base_tensor = base_tensors(config)
        self._adapters: dict[str, OwnAdapter] = {}

    def prepare(
        self,
        tensors: Mapping[str, Tensor],
        config: Mapping[str, Any],
        pause: Callable[[], None] | None = None,
        *,
        copies: bool = False,
    ) -> PreparedAdapter:
        """Check, copy and hash an adapter; see `Engine.add_adapter`. Changes nothing: any thread may call it.

        If nobody changes the tensors, as they are `copies`, and they are on the engine's device, it is packed there.
        """
        loader = self._pool.loader
        digest, file = canonical_from_tensors(
            {name: array_of(tensor) for name, tensor in tensors.items()},
            config,
            self._model,
            max_rank=self._config.max_lora_rank,
            base_tensor=self._base_tensor,
            memory=loader.file_memory.take,
            pause=pause,
        )
        content = loader.content_of(file)
        own_device = {file_name: tensors[own] for file_name, own in file.names.items() if own in tensors}
        if copies and len(own_device) == len(file.names) and self._can_pack(content, own_device.values()):
            content = content._replace(on_device=own_device)
        shared = kv_is_base(file.header.tensors, self._model)
        own = OwnAdapter(file.config.alora_invocation_tokens, shared)
        return PreparedAdapter(digest, content, own)

    def _can_pack(self, content: Content, tensors: Iterable[Tensor]) -> bool:
        """Whether an adapter can be packed where its tensors are: on the device that it is loaded to."""
        device = self._pool.arena.device
        there = all(tensor.is_cuda and tensor.device == device for tensor in tensors)
        return there and isinstance(content.layout, AdapterLayout) and content.layout.can_pack_on_device()

    def prepare_later(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> "Future[PreparedAdapter]":
        """As `prepare`, in the background, between steps where the threads of both would share cores."""
        tensors, loader = dict(tensors), self._pool.loader
        written = _recorded(tensors)

        def prepare() -> PreparedAdapter:
            with _after(written):
                kept = tensors if written is None else {name: each.detach().clone() for name, each in tensors.items()}
                return self.prepare(kept, config, loader.pacer.pause, copies=written is not None)

        return loader.in_background(prepare)

    def add(self, prepared: PreparedAdapter) -> str:
        """Make an adapter known; returns its digest."""
        digest, content, own = prepared
        self._pool.register(digest, content)
        self._adapters[digest] = own
        return digest

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
        """The command for one prompt. Raises RequestRefused if the prompt lacks the invocation of an aLoRA adapter."""
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

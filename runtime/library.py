"""The engine as a library: what `Engine.generate` returns, and the adapters that a program added from memory."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor

from runtime.adapter_format.canonical import CanonicalFile, kv_is_base
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


class OwnAdapter(NamedTuple):
    invocation_tokens: tuple[int, ...] | None  # of an aLoRA adapter
    kv_is_base: bool


class OwnAdapters:
    """The adapters that a program added, with what a request on them has to say; a service keeps records instead."""

    def __init__(self, model: ModelConfig) -> None:
        self._model = model
        self._adapters: dict[str, OwnAdapter] = {}

    def add(self, digest: str, file: CanonicalFile) -> None:
        shared = kv_is_base(file.header.tensors, self._model)
        self._adapters[digest] = OwnAdapter(file.config.alora_invocation_tokens, shared)

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

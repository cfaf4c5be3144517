"""Text to token ids and back, and the model's own chat template."""

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerFast  # AutoTokenizer would import torch: 4 s and 270 MB

from service.openai.detokenizer import Detokenizer

LONG_TEXT = 10_000  # characters from which on encoding takes more than a few milliseconds


class TokenizerMissing(ValueError):
    """The model's directory has no tokenizer that can be used."""


class InvalidChat(ValueError):
    """The chat template refuses these messages; the message is its own."""


class Tokenizer:
    """The tokenizer of a model directory; its results are those of transformers for the same directory."""

    def __init__(self, directory: Path):
        if not (directory / "tokenizer.json").is_file():
            raise TokenizerMissing(f"{directory} has no tokenizer.json")
        self._tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
        # The backend is called directly: going through transformers sets its truncation at each call, and a second
        # thread that encodes at that moment would fail
        self._backend = self._tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()

    def encode(self, text: str) -> list[int]:
        """The ids of a prompt, with the special tokens that the tokenizer adds by itself (for many models: a BOS)."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        # encode_batch_fast lets other threads run meanwhile; encode does not
        found = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in found]

    def chat(self, messages: Sequence[Mapping[str, Any]], generation_prompt: bool = True) -> list[int]:
        """The ids of a conversation, by default up to where the assistant's answer begins. Raises InvalidChat."""
        if not self._tokenizer.chat_template:
            raise InvalidChat("the model has no chat template; use /v1/completions")
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generation_prompt
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:  # whatever a model's template may raise
            raise InvalidChat(f"the model's chat template refuses these messages: {error}") from None
        return self.encode_all([text], add_special_tokens=False)[0]

    async def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Like encode, for several prompts; long ones do not hold up the event loop."""
        return await _off_loop(sum(map(len, texts)), partial(self.encode_all, texts))

    async def encode_chat(self, messages: Sequence[Mapping[str, Any]], generation_prompt: bool = True) -> list[int]:
        """Like chat; long conversations do not hold up the event loop."""
        length = sum(len(str(message.get("content"))) for message in messages)
        return await _off_loop(length, partial(self.chat, messages, generation_prompt))

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of some tokens, special ones left out."""
        return self._backend.decode(list(token_ids), skip_special_tokens=True)

    def shown(self, token_ids: Sequence[int]) -> str:
        """The text of some tokens with the special ones: for a person to read."""
        return self._backend.decode(list(token_ids), skip_special_tokens=False)

    def token_text(self, token_id: int) -> str:
        """What one token alone looks like, special or not: for log-probabilities."""
        return self._backend.decode([token_id], skip_special_tokens=False)

    def detokenizer(self) -> Detokenizer:
        return Detokenizer(self.decode)


async def _off_loop(length: int, encode: Any) -> Any:
    if length < LONG_TEXT:
        return encode()
    return await asyncio.get_running_loop().run_in_executor(None, encode)

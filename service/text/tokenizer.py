"""Turns text into token ids and back, and applies the model's chat template."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jinja2
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast  # AutoTokenizer would import torch: 4 s and 270 MB

from service.text.detokenizer import Detokenizer
from service.text.token_bytes import TokenBytes
from service.tool_calls.syntax import SYNTAXES, Family, Syntax, family_of

LONG_TEXT = 10_000  # characters; encoding more than this takes longer than a few milliseconds

T = TypeVar("T")


class TokenizerMissing(ValueError):
    """The model's directory has no tokenizer.json."""


class InvalidChat(ValueError):
    """The model's chat template refuses the messages; the error's text is the template's."""


class Tokenizer:
    """The tokenizer of a model directory. Its results equal those of transformers for the same directory.

    It knows the model's chat template, and with it the syntax of tool calls.
    """

    def __init__(self, directory: Path, family: Family | None = None):
        if not (directory / "tokenizer.json").is_file():
            raise TokenizerMissing(f"{directory} has no tokenizer.json")
        self._tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
        # transformers sets the backend's truncation at each call, and a second thread that encodes at that moment
        # would fail; so the backend is called directly
        self._backend: Backend = self._tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        # Of tool calls; the template's if none is given
        self.family: Family = family or family_of(self.chat_template)
        self._bytes = TokenBytes(self._backend)
        self._special = {token.content for token in self._tokenizer.added_tokens_decoder.values() if token.special}

    def encode(self, text: str) -> list[int]:
        """Return a prompt's token ids, with the special tokens that the tokenizer adds (for many models: a BOS)."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        # encode_batch_fast releases the interpreter's lock; encode does not
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    @property
    def chat_template(self) -> str:
        """The model's chat template; empty if it has none."""
        template = self._tokenizer.chat_template
        return template if isinstance(template, str) else ""

    @property
    def syntax(self) -> Syntax:
        """How the model writes tool calls."""
        return SYNTAXES[self.family]

    def is_special(self, text: str) -> bool:
        """Whether a text is one special token."""
        return text in self._special

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[int]:
        """Return a conversation's token ids, by default with the header of the assistant's answer.

        Raises InvalidChat.
        """
        if not self._tokenizer.chat_template:
            raise InvalidChat("the model has no chat template; use /v1/completions")
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=generation_prompt
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:  # a template may raise any of these
            raise InvalidChat(f"the model's chat template refuses these messages: {error}") from None
        return self.encode_all([text], add_special_tokens=False)[0]

    async def encode_texts(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Encode several prompts; long ones on a thread, so that they do not block the event loop."""
        return await _off_loop(sum(map(len, texts)), partial(self.encode_all, texts, add_special_tokens))

    async def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[int]:
        """Do as `chat`; a long conversation on a thread, so that it does not block the event loop."""
        length = sum(len(str(message.get("content"))) for message in messages) + len(str(tools))
        return await _off_loop(length, partial(self.chat, messages, generation_prompt, tools))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of some tokens without the special ones."""
        return self._backend.decode(list(token_ids), skip_special_tokens=True)

    def shown(self, token_ids: Sequence[int]) -> str:
        """Return the text of some tokens with the special ones, for a person to read."""
        return self._backend.decode(list(token_ids), skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """Return what one token stands for, special or not, for log-probabilities."""
        return self._bytes.of(token_id)

    def detokenizer(self, *, special: bool = False) -> Detokenizer:
        """A detokenizer for one sequence; with `special`, the text has the special tokens too."""
        return Detokenizer(self.shown if special else self.decode)


async def _off_loop(length: int, encode: Callable[[], T]) -> T:
    if length < LONG_TEXT:
        return encode()
    return await asyncio.get_running_loop().run_in_executor(None, encode)

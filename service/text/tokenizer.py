"""Turns text into token ids and back."""

import asyncio
import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast  # AutoTokenizer would import torch: 4 s and 270 MB

from service.text.detokenizer import Detokenizer
from service.text.encoder import LONG_TEXT, TextEncoder
from service.text.token_bytes import TokenBytes

_log = logging.getLogger(__name__)


class TokenizerMissing(ValueError):
    """The model's directory has no tokenizer.json."""


class Tokenizer:
    """The tokenizer of a model directory. Its results equal those of transformers for the same directory."""

    def __init__(self, directory: Path):
        if not (directory / "tokenizer.json").is_file():
            raise TokenizerMissing(f"{directory} has no tokenizer.json")
        self._tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
        if getattr(self._tokenizer, "fix_mistral_regex", None) is False:  # transformers has found it, and says less
            mend = 'set "fix_mistral_regex": true in tokenizer_config.json'
            _log.warning(
                "%s has a tokenizer that splits text wrongly, as early ones of Mistral do: %s", directory, mend
            )
        # transformers sets the backend's truncation at each call, and a second thread that encodes at that moment
        # would fail; so the backend is called directly
        self._backend: Backend = self._tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._bytes = TokenBytes(self._backend)
        added = self._tokenizer.added_tokens_decoder.items()
        self.special = frozenset(token.content for _, token in added if token.special)  # which a text may leave out
        # The tokens that are no text to a grammar, by what they show: llguidance takes any <...> for one
        self.markers = {
            token.content: token_id
            for token_id, token in added
            if token.special or (token.content.startswith("<") and token.content.endswith(">"))
        }
        self.longest_token = max(map(len, self._backend.get_vocab()))  # in characters
        self._texts = TextEncoder(self.encode_all, self.longest_token)

    def encode(self, text: str) -> list[int]:
        """Return a prompt's token ids, with the special tokens that the tokenizer adds (for many models: a BOS)."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        # encode_batch_fast releases the interpreter's lock; encode does not
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    @property
    def chat_templates(self) -> dict[str, str]:
        """The model's chat templates by name; most models have one, the default."""
        templates = self._tokenizer.chat_template or {}
        return {"default": templates} if isinstance(templates, str) else dict(templates)

    @property
    def kind(self) -> str:
        """The class that transformers has for it."""
        return type(self._tokenizer).__name__

    @property
    def special_tokens(self) -> dict[str, str]:
        """The special tokens by the names that chat templates know: bos_token and the like."""
        return {name: str(token) for name, token in self._tokenizer.special_tokens_map.items()}

    @cached_property
    def joins_special(self) -> bool:
        """Whether special tokens are shown without spaces between them, as all but WordPiece's decoders have it.

        transformers takes `spaces_between_special_tokens`, and gives it no meaning for a fast tokenizer; vLLM leaves
        out the spaces that the decoder puts between two added tokens.
        """
        texts = sorted(self.special)[:2] * 2
        ids = [token_id for text in texts if (token_id := self.token_id(text)) is not None]
        return self.shown(ids) == "".join(texts)

    def is_special(self, text: str) -> bool:
        """Whether a text is one special token."""
        return text in self.special

    def token_id(self, text: str) -> int | None:
        """The id of the token that is a text as it is, special or not; None if there is none."""
        return self._backend.token_to_id(text)

    async def encode_texts(
        self, texts: Sequence[str], *, add_special_tokens: bool = True, most: int | None = None, last: bool = False
    ) -> list[list[int]]:
        """Encode several prompts as `TextEncoder.encode` does. Raises TooLong for one of more than `most` tokens."""
        return await self._texts.encode(texts, add_special_tokens, most, last=last)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of some tokens without the special ones."""
        return self._backend.decode(list(token_ids), skip_special_tokens=True)

    def shown(self, token_ids: Sequence[int]) -> str:
        """Return the text of some tokens with the special ones, for a person to read."""
        return self._backend.decode(list(token_ids), skip_special_tokens=False)

    async def shown_long(self, token_ids: Sequence[int]) -> str:
        """As `shown`, for any number of tokens: many are decoded on a thread."""
        if len(token_ids) < LONG_TEXT:
            return self.shown(token_ids)
        return await asyncio.to_thread(self.shown, token_ids)

    def token_bytes(self, token_id: int) -> bytes:
        """Return what one token stands for, special or not, for log-probabilities."""
        return self._bytes.of(token_id)

    def detokenizer(self, *, special: bool = False) -> Detokenizer:
        """A detokenizer for one sequence; with `special`, the text has the special tokens too."""
        return Detokenizer(self.shown if special else self.decode)

"""A prompt in its answer: its text, where each token begins in it, and its log-probabilities."""

from collections.abc import Sequence
from functools import cached_property

from msgspec.structs import replace

from runtime.messages import TokenLogprobs
from service.openai.schemas import PromptLogprob, PromptLogprobs
from service.text.tokenizer import Tokenizer


class EchoedPrompt:
    """One prompt; `given` is its text as the client sent it, None for token ids."""

    def __init__(self, token_ids: Sequence[int], given: str | None, tokenizer: Tokenizer):
        self.token_ids, self._given, self._tokenizer = token_ids, given, tokenizer
        self.scores: list[TokenLogprobs] = []  # of the tokens from the second on

    @property
    def text(self) -> str:
        return "".join(self._pieces) if self._given is None else self._given

    @property
    def offsets(self) -> list[int]:
        """Where each token begins in `text`; tokens that the tokenizer put before the text begin at 0."""
        added = max(sum(map(len, self._pieces)) - len(self.text), 0)
        offsets, offset = [], -added
        for piece in self._pieces:
            offsets.append(max(offset, 0))
            offset += len(piece)
        return offsets

    @cached_property
    def _pieces(self) -> list[str]:
        """The text that each token completes, special tokens included."""
        detokenizer = self._tokenizer.detokenizer(special=True)
        pieces = [detokenizer.push([token_id]) for token_id in self.token_ids]
        pieces[-1] += detokenizer.flush()
        return pieces

    def first(self, alternatives: int) -> list[TokenLogprobs]:
        """The scores with so many of their alternatives."""
        return [
            replace(each, top_ids=each.top_ids[:alternatives], top_logprobs=each.top_logprobs[:alternatives])
            for each in self.scores
        ]

    def logprobs(self, alternatives: int) -> PromptLogprobs:
        """The scores in vLLM's form: of each token and of the likeliest, by token id."""
        found: PromptLogprobs = [None]
        for token_id, each in zip(self.token_ids[1:], self.first(alternatives), strict=True):
            ranked = zip(each.top_ids, each.top_logprobs, range(1, alternatives + 1), strict=True)
            entries = {str(other): self._entry(other, logprob, rank) for other, logprob, rank in ranked}
            entries.setdefault(str(token_id), self._entry(token_id, each.logprob, each.rank or 1))
            found.append(entries)
        return found

    def _entry(self, token_id: int, logprob: float, rank: int) -> PromptLogprob:
        return PromptLogprob(logprob=logprob, rank=rank, decoded_token=self._tokenizer.shown([token_id]))

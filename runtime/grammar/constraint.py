"""Which tokens a request's grammar allows next."""

from collections.abc import Collection, Sequence
from concurrent.futures import Future

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray

from runtime.messages import EngineCode

WORD_BITS = 32  # tokens in one integer of a mask


class GrammarFailed(Exception):
    """A grammar cannot be compiled; the text says why."""

    code: EngineCode = "grammar_failed"


class Constraint:
    """One request's place in its grammar. The grammar is compiled on another thread, until `ready`.

    The place follows from the generated tokens alone, so a request may be preempted and go on.
    """

    def __init__(self, compiled: "Future[LLMatcher]", vocab_size: int, ends: Collection[int]) -> None:
        self.failure: str | None = None  # why the grammar cannot be followed any further
        self._compiled = compiled
        self._ends = ends  # the tokens that end a text
        self._matcher: LLMatcher | None = None
        self._followed = 0  # generated tokens that the matcher knows
        self._masked = -1  # and those that the mask was made for
        self._mask = np.zeros(-(-vocab_size // WORD_BITS), np.int32)  # a bit for each token, lowest first

    @property
    def ready(self) -> bool:
        """Whether the grammar is compiled. Raises GrammarFailed if that was not possible."""
        if self._matcher is None and self._compiled.done():
            self._matcher = self._compiled.result().deep_copy()
        return self._matcher is not None

    def allows(self, generated: Sequence[int], token_id: int) -> bool:
        """Whether a token may follow the tokens generated so far: what `allowed` says, for a hundredth of its time."""
        matcher = self._follow(generated)
        if matcher.is_error() or self._masked == len(generated):
            return bool(self.allowed(generated)[token_id])
        if token_id in self._ends:
            return matcher.is_accepting()
        forced = matcher.compute_ff_tokens()
        return token_id == forced[0] if forced else matcher.validate_tokens([token_id]) == 1

    def allowed(self, generated: Sequence[int]) -> NDArray[np.bool_]:
        """For each token whether it may follow; for at least one, and for all of them once there is a `failure`."""
        matcher = self._follow(generated)
        if self._masked != len(generated):
            self._masked = len(generated)
            if not matcher.is_error():
                matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
            if matcher.is_error():
                self.failure = f"the grammar cannot be followed any further: {reason(matcher)}"
                self._mask.fill(-1)
        return np.unpackbits(self._mask.view(np.uint8), bitorder="little").view(np.bool_)

    def _follow(self, generated: Sequence[int]) -> LLMatcher:
        """The matcher, after it has consumed what is new."""
        matcher = self._matcher
        assert matcher is not None, "the grammar is not compiled"
        if self._followed < len(generated):
            matcher.consume_tokens(list(generated[self._followed :]))
            self._followed = len(generated)
        return matcher


def reason(matcher: LLMatcher) -> str:
    """Why a matcher has failed, without the state that it appends."""
    return matcher.get_error().partition("\n<state>")[0].strip()

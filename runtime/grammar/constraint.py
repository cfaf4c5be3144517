"""Which tokens a request's grammar allows next."""

from collections.abc import Sequence
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

    def __init__(self, compiled: "Future[LLMatcher]", vocab_size: int) -> None:
        self.failure: str | None = None  # why the grammar cannot be followed any further
        self._compiled = compiled
        self._matcher: LLMatcher | None = None
        self._followed = -1  # generated tokens that the mask was made for
        self._mask = np.zeros(-(-vocab_size // WORD_BITS), np.int32)  # a bit for each token, lowest first

    @property
    def ready(self) -> bool:
        """Whether the grammar is compiled. Raises GrammarFailed if that was not possible."""
        if self._matcher is None and self._compiled.done():
            self._matcher = self._compiled.result().deep_copy()
        return self._matcher is not None

    def allows(self, generated: Sequence[int], token_id: int) -> bool:
        """Whether a token may follow the tokens generated so far."""
        self._follow(generated)
        return bool(self._mask[token_id // WORD_BITS] >> token_id % WORD_BITS & 1)

    def allowed(self, generated: Sequence[int]) -> NDArray[np.bool_]:
        """For each token whether it may follow; for at least one, and for all of them once there is a `failure`."""
        self._follow(generated)
        return np.unpackbits(self._mask.view(np.uint8), bitorder="little").view(np.bool_)

    def _follow(self, generated: Sequence[int]) -> None:
        """Make the mask that of the next token."""
        if self._followed == len(generated):
            return
        matcher = self._matcher
        assert matcher is not None, "the grammar is not compiled"
        matcher.consume_tokens(list(generated[max(self._followed, 0) :]))
        self._followed = len(generated)
        if not matcher.is_error():
            matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        if matcher.is_error():
            self.failure = f"the grammar cannot be followed any further: {matcher.get_error()}"
            self._mask.fill(-1)

"""Which tokens penalties change the logits of, and how often each was generated."""

from array import array
from collections.abc import Iterable


class TokenCounts:
    """Distinct tokens in the order in which they came, kept up to date at the cost of what is new.

    `ids` (int64) are the tokens; `counts` (int32) says how often each was generated, 0 where it comes from the `prompt`
    alone. What is generated begins at `start`. Both are buffers to look at, not to hold on to: they grow.
    """

    def __init__(self, prompt: Iterable[int], start: int) -> None:
        self.ids = array("q", dict.fromkeys(prompt))
        self.counts = array("i", [0]) * len(self.ids)
        self._places = {token_id: place for place, token_id in enumerate(self.ids)}
        self._counted = start

    def catch_up(self, token_ids: list[int]) -> None:
        """Count what a request, whose tokens only ever become more, has generated since the last call."""
        for token_id in token_ids[self._counted :]:
            place = self._places.setdefault(token_id, len(self.ids))
            if place == len(self.ids):
                self.ids.append(token_id)
                self.counts.append(0)
            self.counts[place] += 1
        self._counted = len(token_ids)

"""Where an aLoRA adapter begins to apply: at the last full match of its invocation among the prompt's tokens."""

from collections.abc import Sequence


def find_invocation(token_ids: Sequence[int], invocation_token_ids: Sequence[int]) -> int | None:
    """The index of the first token of the last match, None when there is none.

    PEFT's rule: matches are of whole token ids, side by side, and may overlap. The search (Knuth, Morris and Pratt's)
    runs from the end and takes linear time whatever an adapter's author has chosen for an invocation.
    """
    text, pattern = list(reversed(token_ids)), list(reversed(invocation_token_ids))
    if not pattern:
        return None
    borders = _borders(pattern)
    position = matched = 0
    while matched < len(pattern):
        if matched == 0:
            try:
                position = text.index(pattern[0], position)
            except ValueError:
                return None
        if position == len(text):
            return None
        if text[position] == pattern[matched]:
            position, matched = position + 1, matched + 1
        else:
            matched = borders[matched]  # and this token is tested again
    return len(text) - position


def _borders(pattern: Sequence[int]) -> list[int]:
    """For each number of matched tokens, how many of them are still matched where the next one differs."""
    borders = [0, 0]
    for token in pattern[1:]:
        border = borders[-1]
        while border and pattern[border] != token:
            border = borders[border]
        borders.append(border + (pattern[border] == token))
    return borders

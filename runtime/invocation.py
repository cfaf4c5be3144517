"""Where an aLoRA adapter begins to apply: at the last full match of its invocation in the prompt."""

from collections.abc import Sequence


def find_invocation(token_ids: Sequence[int], invocation_token_ids: Sequence[int]) -> int | None:
    """The index of the first token of the last match, None if there is none.

    PEFT's rule: a match is of whole, consecutive token ids, and matches may overlap. Tokens become characters of two
    strings that are reversed: `str.find` takes linear time on any input, `str.rfind` does not.
    """
    if not invocation_token_ids:
        return None
    letters = {token: chr(number) for number, token in enumerate(dict.fromkeys(invocation_token_ids), start=1)}
    text = "".join([letters.get(token, "\0") for token in reversed(token_ids)])
    place = text.find("".join([letters[token] for token in reversed(invocation_token_ids)]))
    return None if place < 0 else len(token_ids) - place - len(invocation_token_ids)

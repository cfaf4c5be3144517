"""What a grammar comes from, and why none can be made of it."""

from typing import Any, Literal

import msgspec

MAX_MESSAGE = 1000  # characters


class Source(msgspec.Struct, frozen=True):
    """Where a grammar comes from."""

    field: str
    kind: Literal["json_schema", "regex", "choice", "grammar", "structural_tag"]
    content: Any  # a JSON schema, a list of choices, a structural tag, or text


class InvalidGrammar(Exception):
    """No grammar can be made; the text names the place, the keyword where it is known, and what is wrong with it.

    The compiler shows the line of a fault; of a long one the text has the two ends.
    """

    def __init__(self, place: str, fault: str) -> None:
        super().__init__(f"{place}: {fault}")
        self.place = place.partition(" at ")[0]  # without the path inside a schema

    def __str__(self) -> str:
        text = super().__str__()
        return text if len(text) <= MAX_MESSAGE else f"{text[: MAX_MESSAGE // 2]} … {text[-MAX_MESSAGE // 2 :]}"

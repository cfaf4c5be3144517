"""How model families write tool calls, and which of them a chat template belongs to."""

from typing import Literal, NamedTuple

Family = Literal["hermes", "llama3_json", "mistral", "granite"]


class Syntax(NamedTuple):
    """The text around the JSON of calls: objects with a name and arguments, alone, one after another, or in a list."""

    begin: str  # empty: a call is the whole answer, which then begins with a brace
    end: str  # empty: calls last until the end of the answer
    arguments: str = "arguments"  # the key that chat templates show to the model


SYNTAXES: dict[Family, Syntax] = {
    "hermes": Syntax("<tool_call>", "</tool_call>"),  # Hermes, Qwen, SmolLM
    "llama3_json": Syntax("", "", "parameters"),
    "mistral": Syntax("[TOOL_CALLS]", ""),
    "granite": Syntax("<|tool_call|>", ""),
}
# What only the template of a family contains; the first that is found decides.
SIGNS: dict[str, Family] = {
    "[TOOL_CALLS]": "mistral",
    "<|tool_call|>": "granite",
    "<tool_call>": "hermes",
    "<|python_tag|>": "llama3_json",
    '"parameters":': "llama3_json",
}


def family_of(template: str) -> Family:
    """The family whose calls a chat template writes; hermes for a template that knows nothing of tools."""
    return next((family for sign, family in SIGNS.items() if sign in template), "hermes")

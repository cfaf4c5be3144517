"""The error of an adapter that cannot be applied exactly as PEFT would apply it."""

import re

MAX_SHOWN = 120  # characters

# What to do next. Each is a command, or begins with a verb.
SAVE_AGAIN = "save the adapter again with PEFT's save_pretrained"
CORRECT = "correct it in adapter_config.json"
CONVERT = "convert it: python -m service.convert SOURCE TARGET"
WITHOUT_COPIES = "save it with save_pretrained(..., save_embedding_layers=False)"
ITS_BASE = "serve it with the base that it was trained on"
MERGE = "train a plain LoRA, or merge this one into a base of its own (PEFT's merge_and_unload) and serve that"

_CONFIG_FIELD = re.compile(r"(?!weights$)\w+(?:\[.*\])?", re.DOTALL)


class InvalidAdapter(ValueError):
    """An adapter is refused. The message names the field and what was expected of it, and ends with what to do next."""

    field: str  # the tensor, the configuration's field or the file with the mistake
    step: str  # what to do next; by default what mends a field of the configuration, or a file

    def __init__(self, field: str, expectation: str, step: str = "") -> None:
        self.field = shown(field)
        self.step = step or (CORRECT if _CONFIG_FIELD.fullmatch(field) else SAVE_AGAIN)
        super().__init__(f"{self.field}: {expectation}; {self.step}")


def shown(value: object) -> str:
    """Return an untrusted value as text for an error message: printable, on one line, at most MAX_SHOWN characters."""
    text = value if isinstance(value, str) else repr(value)
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[: MAX_SHOWN + 1])
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…"

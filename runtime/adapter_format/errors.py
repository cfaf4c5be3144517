"""The error of an adapter that cannot be applied exactly as PEFT would apply it."""

MAX_SHOWN = 120  # characters


class InvalidAdapter(ValueError):
    """An adapter is refused. The message is one sentence that names the field and what was expected of it."""

    field: str  # the tensor, the configuration's field or the file with the mistake

    def __init__(self, field: str, expectation: str) -> None:
        self.field = shown(field)
        super().__init__(f"{self.field}: {expectation}")


def shown(value: object) -> str:
    """Return an untrusted value as text for an error message: printable, on one line, at most MAX_SHOWN characters."""
    text = value if isinstance(value, str) else repr(value)
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[: MAX_SHOWN + 1])
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…"

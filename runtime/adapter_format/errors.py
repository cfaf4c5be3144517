"""The error of an adapter that cannot be applied exactly as PEFT would apply it."""

MAX_SHOWN = 120


class InvalidAdapter(ValueError):
    """An adapter is refused; `field` is the tensor, the configuration's field or the file that is at fault.

    The message is one sentence that names the field and what was expected of it.
    """

    def __init__(self, field: str, expectation: str) -> None:
        self.field = shown(field)
        super().__init__(f"{self.field}: {expectation}")


def shown(value: object) -> str:
    """A stranger's value, printable on one line and short enough for an error message."""
    text = value if isinstance(value, str) else repr(value)
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[: MAX_SHOWN + 1])
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…"

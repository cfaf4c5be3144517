"""The two files of an adapter, as a client or a source sends them."""

from pathlib import Path
from typing import BinaryIO, NamedTuple

from runtime.adapter_format.errors import shown
from service.errors import RequestError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1 << 20


class Bundle(NamedTuple):
    """An adapter as its author wrote it. Nothing in it has been checked."""

    weights: Path
    config: bytes


class BundleFiles:
    """Writes the two files of a bundle as they arrive: no others, each once, each within its limit.

    Every method blocks and may raise RequestError.
    """

    def __init__(self, directory: Path, max_weights_bytes: int) -> None:
        self._directory = directory
        self._limits = {CONFIG: MAX_CONFIG_BYTES, WEIGHTS: max_weights_bytes}  # in bytes
        self._complete: set[str] = set()
        self._name = ""  # of the open file
        self._file: BinaryIO | None = None
        self._remaining = 0  # bytes that the open file may still get

    def begin(self, name: str, size: int = 0) -> None:
        """Open a file that its container calls `name`; `size` is its size in bytes, 0 if the container does not say."""
        if name not in self._limits:
            message = f"{shown(name)!r} is not expected: only {CONFIG} and {WEIGHTS} are"
            raise RequestError("unexpected_file", message, shown(name))
        if name in self._complete:
            raise RequestError("duplicate_file", f"{name} comes twice", name)
        if size > self._limits[name]:
            raise too_large(self._limits[name], name)
        self._name, self._remaining = name, self._limits[name]
        # closed by end(), or by close() after an error
        self._file = open(self._directory / name, "xb")  # noqa: SIM115

    def write(self, data: bytes | memoryview) -> None:
        assert self._file is not None
        self._remaining -= len(data)
        if self._remaining < 0:
            raise too_large(self._limits[self._name], self._name)
        self._file.write(data)

    def end(self) -> None:
        """Close the open file: it is complete."""
        self.close()
        self._complete.add(self._name)

    def close(self) -> None:
        """Close the open file, complete or not."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def bundle(self) -> Bundle:
        """Both files. Raises RequestError if one is missing or incomplete."""
        for name in self._limits:
            if name not in self._complete:
                raise RequestError("missing_file", f"the upload has no {name}, or it is cut off", name)
        return Bundle(self._directory / WEIGHTS, (self._directory / CONFIG).read_bytes())


def too_large(limit: int, name: str | None = None) -> RequestError:
    """The error for a body, or for a file in it, over its limit in bytes."""
    return RequestError("body_too_large", f"{name or 'the upload'} has more than {limit} bytes", name)

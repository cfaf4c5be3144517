"""The two files that make an adapter, as a stranger sends them."""

from pathlib import Path
from typing import BinaryIO, NamedTuple

from runtime.adapter_format.errors import shown
from service.errors import RequestError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1 << 20


class Bundle(NamedTuple):
    """An adapter as its owner wrote it: nothing in it has been checked."""

    weights: Path
    config: bytes


class BundleFiles:
    """The two files of a bundle while they arrive: no others, each once, each within its limit.

    Every method blocks and may raise RequestError.
    """

    def __init__(self, directory: Path, max_weights_bytes: int) -> None:
        self._directory = directory
        self._limits = {CONFIG: MAX_CONFIG_BYTES, WEIGHTS: max_weights_bytes}
        self._complete: set[str] = set()
        self._name = ""
        self._file: BinaryIO | None = None
        self._room = 0

    def begin(self, name: str, size: int = 0) -> None:
        """Start a file that its container calls `name` and, if it says so, has `size` bytes."""
        if name not in self._limits:
            message = f"{shown(name)!r} is not expected: only {CONFIG} and {WEIGHTS} are"
            raise RequestError("unexpected_file", message, shown(name))
        if name in self._complete:
            raise RequestError("duplicate_file", f"{name} comes twice", name)
        if size > self._limits[name]:
            raise too_large(self._limits[name], name)
        self._name, self._room = name, self._limits[name]
        # closed by end(), or by close() whatever happens
        self._file = open(self._directory / name, "xb")  # noqa: SIM115

    def write(self, data: bytes | memoryview) -> None:
        assert self._file is not None
        self._room -= len(data)
        if self._room < 0:
            raise too_large(self._limits[self._name], self._name)
        self._file.write(data)

    def end(self) -> None:
        self.close()
        self._complete.add(self._name)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def bundle(self) -> Bundle:
        """Both files, which must have come to their end."""
        for name in self._limits:
            if name not in self._complete:
                raise RequestError("missing_file", f"the upload has no {name}, or it is cut off", name)
        return Bundle(self._directory / WEIGHTS, (self._directory / CONFIG).read_bytes())


def too_large(limit: int, name: str | None = None) -> RequestError:
    """The error for a body, or a file in it, over its limit in bytes."""
    return RequestError("body_too_large", f"{name or 'the upload'} has more than {limit} bytes", name)

"""The files of an adapter, as a client or a source sends them."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import msgspec

from runtime.adapter_format.errors import InvalidAdapter, shown
from service.catalog.record import MAX_TEMPLATE_BYTES
from service.errors import RequestError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Either may bring a chat template; the first wins
TEMPLATE, TOKENIZER = "chat_template.jinja", "tokenizer_config.json"
REQUIRED, OPTIONAL = (CONFIG, WEIGHTS), (TEMPLATE, TOKENIZER)
# What training programs leave in place of the weights
_OTHER_WEIGHTS = re.compile(r"adapter_model.*\.(?:bin|pt|pth|safetensors|index\.json)|adapters\.(?:safetensors|npz)")
WITHOUT_TEMPLATE = "correct the file, or leave it out: the server's chat template then holds"
CONVERT = "python -m service.convert SOURCE TARGET"
MAX_NAMED = 100  # of the ignored files
# In bytes, of all but the weights
LIMITS = {CONFIG: 1 << 20, TEMPLATE: MAX_TEMPLATE_BYTES, TOKENIZER: 4 << 20}


class TemplateFile(NamedTuple):
    """A chat template, and the file that it is in."""

    file: str
    text: str


class Bundle(NamedTuple):
    """An adapter as its author wrote it. Nothing in it has been checked."""

    weights: Path
    config: bytes
    template: TemplateFile | None = None


class NamedTemplate(msgspec.Struct, frozen=True):
    name: str
    template: str


class TokenizerConfig(msgspec.Struct, frozen=True):
    """All that matters here of a tokenizer's configuration, which belongs to the base model."""

    chat_template: str | list[NamedTemplate] | None = None


class BundleFiles:
    """Writes the files of a bundle as they arrive: each once, each within its limit. Others are ignored.

    Every method blocks and may raise RequestError.
    """

    def __init__(self, directory: Path, max_weights_bytes: int) -> None:
        self._directory = directory
        self._limits = {**LIMITS, WEIGHTS: max_weights_bytes}  # in bytes
        self._complete: set[str] = set()
        self._ignored: list[str] = []
        self._name = ""  # of the open file
        self._file: BinaryIO | None = None  # None also for a file that is ignored
        self._remaining = 0  # bytes that the open file may still get

    def begin(self, name: str, size: int = 0) -> None:
        """Open a file that its container calls `name`; `size` is its size in bytes, 0 if the container does not say."""
        if name not in self._limits:
            self._ignored = [*self._ignored, shown(name)][:MAX_NAMED]
            return
        if name in self._complete:
            raise RequestError("duplicate_file", f"{name} comes twice", name)
        if size > self._limits[name]:
            raise too_large(self._limits[name], name)
        self._name, self._remaining = name, self._limits[name]
        # closed by end(), or by close() after an error
        self._file = open(self._directory / name, "xb")  # noqa: SIM115

    def write(self, data: bytes | memoryview) -> None:
        if self._file is None:
            return
        self._remaining -= len(data)
        if self._remaining < 0:
            raise too_large(self._limits[self._name], self._name)
        self._file.write(data)

    def end(self) -> None:
        """Close the open file: it is complete."""
        if self._file is not None:
            self.close()
            self._complete.add(self._name)

    def forget(self) -> None:
        """Remove the files that have come so far: those that count come from another folder."""
        for name in self._complete:
            (self._directory / name).unlink()
        self._complete.clear()

    def close(self) -> None:
        """Close the open file, complete or not."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def bundle(self) -> Bundle:
        """The files. Raises RequestError if one is missing or incomplete, InvalidAdapter as `bundle_in` does."""
        for name in REQUIRED:
            if name not in self._complete:
                raise RequestError("missing_file", f"the upload has no {name}{hint(name, self._ignored)}", name)
        return bundle_in(self._directory)


def hint(name: str, present: Iterable[str]) -> str:
    """What to do about a file that is missing, given the names of others that are there."""
    others = [other for other in present if _OTHER_WEIGHTS.fullmatch(other.rpartition("/")[2])]
    if name != WEIGHTS:
        return f": it stands beside {WEIGHTS} where PEFT's save_pretrained put that"
    has = f", it has {', '.join(others)}" if others else ""
    return f"{has}: {CONVERT} makes it of a .bin, of shards and of other programs' files"


def bundle_in(directory: Path) -> Bundle:
    """The bundle whose files are in a directory. Raises InvalidAdapter if the file of a template is none."""
    return Bundle(directory / WEIGHTS, (directory / CONFIG).read_bytes(), _template_in(directory))


def _template_in(directory: Path) -> TemplateFile | None:
    if (file := directory / TEMPLATE).exists():
        try:
            return TemplateFile(TEMPLATE, file.read_text("utf-8"))
        except UnicodeDecodeError:
            raise InvalidAdapter(TEMPLATE, "expected a Jinja template in UTF-8", WITHOUT_TEMPLATE) from None
    if not (file := directory / TOKENIZER).exists():
        return None
    try:
        found = msgspec.json.decode(file.read_bytes(), type=TokenizerConfig).chat_template
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        what = f"expected a tokenizer's configuration as JSON: {error}"
        raise InvalidAdapter(TOKENIZER, what, WITHOUT_TEMPLATE) from None
    if isinstance(found, list):
        named = {each.name: each.template for each in found}
        if "default" not in named:
            what = 'chat_template has several templates, expected one named "default"'
            raise InvalidAdapter(TOKENIZER, what, WITHOUT_TEMPLATE)
        found = named["default"]
    if not found:
        return None
    if len(found.encode(errors="replace")) > MAX_TEMPLATE_BYTES:
        raise InvalidAdapter(TOKENIZER, f"chat_template has more than {MAX_TEMPLATE_BYTES} bytes", WITHOUT_TEMPLATE)
    return TemplateFile(TOKENIZER, found)


def too_large(limit: int, name: str | None = None) -> RequestError:
    """The error for a body, or for a file in it, over its limit in bytes."""
    what = name or "the upload"
    advice = "" if name else " (--max-upload-bytes)"
    return RequestError("body_too_large", f"{what} has more than {limit} bytes{advice}", name)

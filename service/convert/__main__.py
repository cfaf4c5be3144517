"""python -m service.convert: turn what a training program left into a directory that can be uploaded."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from runtime.adapter_format.errors import InvalidAdapter
from runtime.conversion.conversion import convert
from service.logs import set_up, shows_bars
from service.text.tokenizer import Tokenizer, TokenizerMissing

PURPOSE = """\
Turn an adapter into the two files that an upload takes: from a pickle (.bin), from shards, from mlx-lm, from a
vision-language model's language part, from an aLoRA with an invocation string. It says what it did, and refuses what it
cannot convert exactly."""


def main(argv: Sequence[str] | None = None) -> None:
    """Convert, or exit with a sentence."""
    parser = argparse.ArgumentParser(prog="python -m service.convert", description=PURPOSE)
    parser.add_argument("source", type=Path, help="directory of the adapter")
    parser.add_argument("target", type=Path, help="directory that does not exist yet")
    parser.add_argument("--tokenizer", type=Path, help="directory of the base model, for an aLoRA's invocation string")
    options = parser.parse_args(argv)
    set_up("info")
    try:
        for sentence in convert(options.source, options.target, _tokenize(options.tokenizer), bars=shows_bars()):
            print(sentence)
    except (InvalidAdapter, TokenizerMissing, OSError) as error:
        sys.exit(f"rootstock: nothing was written: {error}")


def _tokenize(directory: Path | None) -> Callable[[str], Sequence[int]] | None:
    if directory is None:
        return None
    tokenizer = Tokenizer(directory)
    return lambda text: tokenizer.encode_all([text], add_special_tokens=False)[0]


if __name__ == "__main__":
    main()

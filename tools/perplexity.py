"""Perplexity of a model under the compiled CPU kernels, on a text: what quantising its weights costs.

usage: python -m tools.perplexity MODEL_DIRECTORY TEXT [OPTION=VALUE...]      options of EngineConfig: quantization=int8

The text is cut into windows of 512 tokens, each without what came before it; a window's first token is not counted.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch
from tokenizers import Tokenizer

from runtime.config import EngineConfig
from runtime.cpu.compiled_runner import CompiledRunner
from runtime.engine import Engine
from runtime.messages import Generate, SamplingParams
from runtime.request import Request
from runtime.scheduler import Chunk

WINDOW, STEP = 512, 128  # tokens


def log_probabilities(engine: Engine, tokens: Sequence[int]) -> Iterator[float]:
    """Natural logarithms of the probability of each token but the first, in one window."""
    runner = engine.runner
    assert isinstance(runner, CompiledRunner), "this needs the compiled CPU kernels"
    request = Request(Generate(request_id="window", token_ids=list(tokens), params=SamplingParams()), max_tokens=WINDOW)
    request.blocks = list(range(1, 1 + -(-WINDOW // engine.config.block_size)))
    for start in range(0, len(tokens), STEP):
        length = min(STEP, len(tokens) - start)
        runner.prepare([Chunk(request, start, length, samples=False)])
        rows = np.arange(length, dtype=np.int32)  # all of them, where a request has only its last
        step = runner.prepared.struct
        step.logits, step.logit_rows = length, rows.ctypes.data
        runner.decoder.forward(step)
        following = torch.tensor(tokens[start + 1 : start + 1 + length])
        logits = runner.decoder.logits[: len(following)].log_softmax(-1)
        yield from logits.gather(1, following[:, None])[:, 0].tolist()


def main(model: str, text: str, options: dict[str, str]) -> None:
    """Print the perplexity of a text."""
    sizes = {"max_running": STEP, "max_batch_tokens": STEP, "max_model_len": WINDOW}
    engine = Engine(
        msgspec.convert({"model": model, "kernels": "compiled", **sizes, **options}, EngineConfig, strict=False)
    )
    tokens = Tokenizer.from_file(str(Path(model) / "tokenizer.json")).encode(text).ids
    found = [
        value
        for start in range(0, len(tokens) - 1, WINDOW)
        for value in log_probabilities(engine, tokens[start : start + WINDOW])
    ]
    engine.close()
    print(f"{options or 'as stored'}: perplexity {math.exp(-sum(found) / len(found)):.3f} over {len(found)} tokens")


if __name__ == "__main__":
    if len(sys.argv) < 3 or any("=" not in option for option in sys.argv[3:]):
        sys.exit(__doc__)
    main(sys.argv[1], Path(sys.argv[2]).read_text(), dict(option.split("=", 1) for option in sys.argv[3:]))

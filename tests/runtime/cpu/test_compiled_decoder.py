"""The compiled decoder against transformers and against the decoder in PyTorch, for models of every family."""

import pytest
import torch

from runtime.config import MIB, EngineConfig
from runtime.engine import Engine
from runtime.messages import SamplingParams
from tests.runtime.gpu.test_triton_models import adapter
from tests.runtime.models.families import FAMILIES, write_checkpoint
from tests.runtime.tiny_engine import prompt

TOLERANCE = 1e-4  # of the decoder in PyTorch against transformers
TOP = 5
PARAMS = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True, logprobs=TOP)


def start(directory, **options):
    sizes = {"kv_cache_bytes": MIB, "adapter_bytes": MIB, "host_adapter_bytes": MIB, "max_lora_rank": 8}
    limits = {"max_model_len": 64, "max_running": 4, "max_batch_tokens": 24, "threads": 1}
    return Engine(EngineConfig(model=str(directory), device="cpu", **sizes, **limits, **options))


def logits_of(model, tokens):
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].float()


@pytest.mark.parametrize("name", FAMILIES)
def test_log_probabilities_are_those_of_transformers_and_with_adapters_those_of_pytorch(tmp_path, name):
    """Prompts longer than a step, decode steps, an adapter of all modules beside the base."""
    model = write_checkpoint(name, tmp_path)
    prompts = [[token % 131 for token in prompt(length, length)] for length in (41, 5)]
    found = {}
    for kernels in ("compiled", "torch"):
        engine = start(tmp_path, kernels=kernels, dtype="float32")
        digest = engine.add_adapter(*adapter(engine.runner.model.sites()))
        found[kernels] = engine.generate([*prompts, *prompts], PARAMS, [None, None, digest, digest])
        engine.check()
        engine.close()
    for ours, theirs in zip(found["compiled"], found["torch"], strict=True):
        assert ours.token_ids == theirs.token_ids
        for one, other in zip(ours.logprobs, theirs.logprobs, strict=True):
            assert one.top_logprobs == pytest.approx(other.top_logprobs, abs=TOLERANCE)
    for tokens, ours in zip(prompts, found["compiled"], strict=False):
        logits = logits_of(model, tokens + ours.token_ids)[len(tokens) - 1 : -1].log_softmax(-1)
        for row, one in zip(logits, ours.logprobs, strict=True):
            assert one.top_logprobs == pytest.approx(row[one.top_ids].tolist(), abs=TOLERANCE)


def error_of(model, directory, **options):
    """The sum of the differences of log-probabilities to a model of transformers in float32."""
    engine = start(directory, **options)
    tokens = [token % 131 for token in prompt(41, 2)]
    (ours,) = engine.generate([tokens], PARAMS)
    engine.close()
    logits = logits_of(model, tokens + ours.token_ids)[len(tokens) - 1 : -1].log_softmax(-1)
    return sum(
        abs(logprob - float(row[token]))
        for row, one in zip(logits, ours.logprobs, strict=True)
        for token, logprob in zip(one.top_ids, one.top_logprobs, strict=True)
    )


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_bfloat16_is_closer_to_float32_than_pytorchs_bfloat16(tmp_path, name):
    model = write_checkpoint(name, tmp_path)
    ours, theirs = (error_of(model, tmp_path, kernels=one, dtype="bfloat16") for one in ("compiled", "torch"))
    assert ours <= theirs


def test_weights_of_float16_are_not_rounded_to_bfloat16(tmp_path):
    model = write_checkpoint("llama", tmp_path).half()
    model.save_pretrained(tmp_path)
    as_stored, rounded = (
        error_of(model.float(), tmp_path, kernels="compiled", dtype=one) for one in ("auto", "bfloat16")
    )
    assert as_stored < rounded / 2

"""Engines on a tiny model with random weights, adapters for it, and requests run to their end."""

import contextlib
import json

import torch

from runtime.config import MIB, EngineConfig
from runtime.engine import Engine
from runtime.messages import Failed, SamplingParams, Tokens
from tests.runtime.tiny_model import TINY

BLOCK_BYTES = 2 * 16 * 2 * 2 * 8 * 4  # layers, tokens, K and V, heads, head_dim, float32
GREEDY = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)


@contextlib.contextmanager
def engines(directory):
    """Starts engines on the tiny model, and checks each at the end of the test: nothing may be left held."""
    (directory / "config.json").write_text(json.dumps(TINY))
    started = []

    def start(blocks=200, **options):
        options = {
            "kv_cache_bytes": blocks * BLOCK_BYTES,
            "adapter_bytes": MIB,
            "host_adapter_bytes": MIB,
            "max_model_len": 128,
            "threads": 1,
        } | options
        started.append(Engine(EngineConfig(model=str(directory), load_format="dummy", **options)))
        return started[-1]

    yield start
    for engine in started:
        engine.check()
        assert engine.blocks.used == 0
        engine.close()


def adapter_tensors(seed=0, scale=0.3, modules=("self_attn.q_proj", "self_attn.v_proj")):
    shapes = {"q_proj": (32, 32), "v_proj": (32, 16), "down_proj": (64, 32)}
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(2):
        for module in modules:
            inner, outer = shapes[module.split(".")[-1]]
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(4, inner, generator=generator) * scale
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(outer, 4, generator=generator) * scale
    return tensors


ADAPTER_CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "bias": "none"}


def prompt(length, seed=0):
    return torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def run(engine, *requests):
    """Step until the requests have ended; {request id: (tokens, how it ended)}."""
    for request in requests:
        engine.add_request(request)
    outputs = {request_id: ([], None) for request_id in engine.requests}
    while engine.busy:
        for event in engine.step():
            if isinstance(event, Tokens):
                tokens, _ = outputs[event.request_id]
                outputs[event.request_id] = (tokens + event.token_ids, event.finish_reason)
            elif isinstance(event, Failed):
                outputs[event.request_id] = (outputs[event.request_id][0], event.code)
        engine.check()
    return outputs

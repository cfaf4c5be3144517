"""Mixes and lists of adapters over HTTP, on the real engine in float32, against transformers and PEFT."""

import json
import math
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx
import peft
import pytest
import torch
import transformers

from tests.oracle import logits_of_output
from tests.service.live_server import LiveServer, fake_settings, live_server
from tests.service.tiny_model import write_tiny_model

ENGINE = (sys.executable, "-m", "runtime.process")
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
INVOCATION = [4, 5]
CONFIGS: dict[str, dict[str, Any]] = {
    "all": {"r": 4, "lora_alpha": 8, "target_modules": LINEAR},
    "some": {"r": 6, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "attention": {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "k_proj", "o_proj"]},
    "begins": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "alora_invocation_tokens": INVOCATION},
}
MIXES: dict[str, dict[str, float]] = {
    "two": {"all": 0.7, "some": 0.3},
    "negative": {"all": 1.5, "some": -0.8},
    # Not rank-stabilised first: PEFT would scale the sum as its first part is scaled, by the root of all ranks
    "three": {"all": 0.25, "some": -1.0, "attention": 2.0},
    "one": {"all": -0.6},
}
PROMPT = list(range(7, 40))
TOKENS = 8


class Peft(NamedTuple):
    """The adapters under PEFT, and a server that has them under the same names."""

    model: peft.PeftModel
    live: LiveServer


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peft]:
    directory, data = write_tiny_model(tmp_path_factory.mktemp("model")), tmp_path_factory.mktemp("data")
    torch.manual_seed(1)
    config = json.loads((directory / "config.json").read_text())
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config, initializer_range=0.15)).eval()
    base.save_pretrained(data / "weights")
    (data / "weights" / "model.safetensors").rename(directory / "model.safetensors")
    model: peft.PeftModel | None = None
    for name, options in CONFIGS.items():
        lora = peft.LoraConfig(task_type="CAUSAL_LM", **options)
        if model is None:
            model = peft.get_peft_model(base, lora, adapter_name=name)
        else:
            model.add_adapter(name, lora)
    assert model is not None
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.eval().save_pretrained(data / "saved", save_embedding_layers=False)
    options = {"kv_cache_bytes": 4 << 20, "adapter_bytes": 4 << 20, "host_adapter_bytes": 4 << 20, "max_lora_rank": 16}
    with live_server(fake_settings(directory, data, engine_command=ENGINE, **options)) as live:
        for name in CONFIGS:
            paths = [data / "saved" / name / file for file in ("adapter_config.json", "adapter_model.safetensors")]
            files = {path.name: (path.name, path.read_bytes()) for path in paths}
            assert live.client.put(f"/adapters/{name}", files=files).status_code == 201
        yield Peft(model, live)


def complete(live: LiveServer, prompt: Any = PROMPT, **body: Any) -> httpx.Response:
    options = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "skip_special_tokens": False}
    response = live.complete(prompt, **options, logprobs=5, return_tokens_as_token_ids=True, **body)
    assert response.status_code == 200, response.text
    return response


def agree(
    model: torch.nn.Module, response: httpx.Response, choice: int = 0, prompt: Any = None, **options: Any
) -> bool:
    """Whether a model gives the tokens of a choice and their log-probabilities, up to rounding in float32."""
    logprobs = response.json()["choices"][choice]["logprobs"]
    tokens = [int(token.removeprefix("token_id:")) for token in logprobs["tokens"]]
    assert len(tokens) == TOKENS
    logits = logits_of_output(model, prompt or PROMPT, tokens, **options)
    if logits.argmax(-1).tolist() != tokens:
        return False
    expected = logits.log_softmax(-1)
    for row, top in zip(expected, logprobs["top_logprobs"], strict=True):
        for token, logprob in top.items():
            if not math.isclose(row[int(token.removeprefix("token_id:"))].item(), logprob, abs_tol=2e-4):
                return False
    return True


def mixed(model: peft.PeftModel, weights: dict[str, float]) -> peft.PeftModel:
    """PEFT's own sum of adapters: concatenated, so that it is exact."""
    model.add_weighted_adapter(list(weights), list(weights.values()), "mix", combination_type="cat")
    model.set_adapter("mix")
    return model


@pytest.mark.parametrize("weights", MIXES.values(), ids=MIXES)
def test_a_mix_is_the_weighted_adapter_of_peft(both: Peft, weights: dict[str, float]) -> None:
    response = complete(both.live, adapters=weights)
    try:
        assert agree(mixed(both.model, weights), response)
    finally:
        both.model.set_adapter("all")
        both.model.delete_adapter("mix")
    assert not agree(both.model, response)


def test_a_mix_is_the_model_that_the_sum_of_the_deltas_is_merged_into(both: Peft) -> None:
    """A plain sum in float32 over each module's weight, which knows nothing of low rank."""
    weights = MIXES["negative"]
    response = complete(both.live, adapters=weights)
    layers = [module for module in both.model.modules() if isinstance(module, peft.tuners.lora.Linear)]
    before = [layer.get_base_layer().weight.detach().clone() for layer in layers]
    with torch.no_grad(), both.model.disable_adapter():
        for layer in layers:
            for name in weights.keys() & layer.lora_A.keys():
                layer.get_base_layer().weight += weights[name] * layer.get_delta_weight(name)
        try:
            assert agree(both.model, response)
        finally:
            for layer, weight in zip(layers, before, strict=True):
                layer.get_base_layer().weight.copy_(weight)
        assert not agree(both.model, response)


def test_a_list_gives_each_prompt_its_own_adapter(both: Peft) -> None:
    prompts = [PROMPT, PROMPT[3:], PROMPT, PROMPT + INVOCATION + PROMPT[:5]]
    response = complete(both.live, prompts, lora_path=["all", None, "some", "begins"])
    for choice, (prompt, name) in enumerate(zip(prompts, ("all", None, "some", "begins"), strict=True)):
        if name is None:
            with both.model.disable_adapter():
                assert agree(both.model, response, choice, prompt)
        else:
            both.model.set_adapter(name)
            options = {"invocation_start": len(PROMPT)} if name == "begins" else {}
            assert agree(both.model, response, choice, prompt, **options), name
    assert response.headers["x-alora-activation"] == f"-, -, -, {len(PROMPT)}"


def test_the_k_v_of_a_mix_are_its_own(both: Peft) -> None:
    def cached(weights: dict[str, float], prompt: list[int]) -> int:
        return int(complete(both.live, prompt, adapters=weights).headers["x-cached-tokens"])

    prompt = PROMPT[::-1]
    assert cached({"all": 0.4, "some": 0.6}, prompt) == 0
    assert cached({"some": 0.6, "all": 0.4}, prompt) >= 32
    assert cached({"all": 0.4, "some": 0.5}, prompt) == 0
    assert cached({"some": 0.4, "all": 0.6}, prompt) == 0

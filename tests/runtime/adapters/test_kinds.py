"""What adapters change besides LoRA, in engines, exactly as PEFT applies it, in fp32: batches, caches, evictions."""

import json

import peft
import pytest
import torch
import transformers

from runtime.adapter_format.canonical import canonicalise
from runtime.adapter_format.errors import InvalidAdapter
from runtime.config import MIB, EngineConfig
from runtime.engine import Engine
from runtime.messages import SamplingParams
from runtime.models.config import ModelConfig
from runtime.request import RequestRefused
from tests.oracle import logits_of_output
from tests.runtime.tiny_engine import prompt

# PEFT warns of merging, of ties and of base configurations that it cannot find
pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore:::peft")]

VOCABULARY = 90
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = [40, 3, 71]
SOME = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
KINDS = {
    "plain": SOME,
    "bias lora_only": SOME | {"bias": "lora_only"},
    "bias all": SOME | {"bias": "all"},
    "bias all and lora_bias": SOME | {"bias": "all", "lora_bias": True},
    "tokens": SOME | {"trainable_token_indices": IDS},
    "embed_tokens": SOME | {"modules_to_save": ["embed_tokens"]},
    "lm_head": {"target_modules": ["o_proj"], "layers_to_transform": [1], "modules_to_save": ["lm_head"]},
    "both": SOME | {"modules_to_save": ["embed_tokens", "lm_head"]},
    "norms": SOME | {"modules_to_save": ["norm", "layernorm"]},
    "the last norm": {"target_modules": ["o_proj"], "layers_to_transform": [1], "modules_to_save": ["model.norm"]},
    "projections": {"target_modules": ["q_proj"], "modules_to_save": ["k_proj", "mlp"]},
    "dora": {"target_modules": LINEAR, "use_dora": True},
    "dora of some, rslora, biases": SOME | {"use_dora": True, "use_rslora": True, "bias": "all"},
    "dora, tokens and norms": SOME | {"use_dora": True, "trainable_token_indices": IDS, "modules_to_save": ["norm"]},
    "ia3": peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "ia3 of outputs": peft.IA3Config(
        target_modules=r".*\.(q_proj|o_proj|gate_proj)", feedforward_modules="none", modules_to_save=["norm"]
    ),
}
UNTIED = KINDS | {
    "dora of the vocabulary": {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "use_dora": True},
    "tokens of both": SOME | {"trainable_token_indices": {"embed_tokens": IDS, "lm_head": [2, 71]}},
    "tokens of the head": SOME | {"trainable_token_indices": {"lm_head": [2, 71]}},
}
TIED = {name: KINDS[name] for name in ("plain", "tokens", "embed_tokens", "lm_head", "dora", "bias all", "ia3")} | {
    "tied copies": SOME | {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "different tokens": SOME | {"trainable_token_indices": {"embed_tokens": IDS, "lm_head": [2, 71]}},
    "the same tokens": SOME | {"trainable_token_indices": {"embed_tokens": IDS, "lm_head": IDS}},
}
SHARES_KV = ("lm_head", "the last norm")
SCORE = SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=5)
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
BLOCK_BYTES = 2 * 16 * 2 * 2 * 8 * 4


class Bases:
    """A base, its checkpoint, and for each kind a model of PEFT with an adapter, on a base of its own."""

    def __init__(self, directory, tied):
        self.directory, self.tied = directory, tied
        self.kinds = TIED if tied else UNTIED
        base = self.base()
        base.save_pretrained(directory)
        self.models = {None: base} | {name: self.adapted(options) for name, options in self.kinds.items()}

    def base(self):
        torch.manual_seed(3)
        config = transformers.Qwen2Config(**SHAPE, tie_word_embeddings=self.tied)
        base = transformers.Qwen2ForCausalLM(config).eval()
        with torch.no_grad():
            for name, parameter in base.named_parameters():
                if name.endswith(("bias", "norm.weight")):
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        return base

    def adapted(self, options):
        config = options
        if not isinstance(config, peft.IA3Config):
            config = peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **options)
        model = peft.get_peft_model(self.base(), config).eval()
        torch.manual_seed(4)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.15)
        return model

    def adapter(self, name):
        model = self.models[name]
        tensors = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
        return tensors, model.peft_config["default"].to_dict()

    def logits(self, name, tokens):
        """What each token but the first is chosen by."""
        return logits_of_output(self.models[name], tokens[:1], tokens[1:])


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def bases(request, tmp_path_factory):
    return Bases(tmp_path_factory.mktemp("base"), request.param)


def engine_of(bases, kernels, **options):
    options = {"adapter_bytes": 4 * MIB, "host_adapter_bytes": 4 * MIB, "max_model_len": 128, "threads": 1} | options
    options = {"kv_cache_bytes": 400 * BLOCK_BYTES, "device": "cpu", "max_batch_tokens": 96} | options
    return Engine(EngineConfig(model=str(bases.directory), kernels=kernels, **options))


@pytest.fixture(scope="module", params=["compiled", "torch"])
def engine(request, bases):
    engine = engine_of(bases, request.param)
    engine.digests = {None: None} | {name: engine.add_adapter(*bases.adapter(name)) for name in bases.kinds}
    yield engine
    engine.check()
    engine.close()


def text(seed, length=30):
    """A prompt with every token whose rows are replaced."""
    tokens = [token % VOCABULARY for token in prompt(length, seed)]
    return [*tokens[:9], *IDS, 2, *tokens[9:]]


def assert_right(bases, name, tokens, found):
    judged = bases.logits(name, tokens).log_softmax(-1)
    for row, token, entry in zip(judged, tokens[1:], found, strict=True):
        values, ids = row.topk(len(entry.top_ids))
        assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4), name
        assert entry.top_logprobs == pytest.approx(values.tolist(), abs=1e-4), name
        assert entry.top_ids == ids.tolist(), name


def test_every_kind_is_exact_in_one_batch_with_the_others(bases, engine):
    names = [*bases.kinds, None]
    prompts = [text(seed) for seed, _ in enumerate(names)]
    found = engine.generate(prompts, SCORE, [engine.digests[name] for name in names])
    for name, tokens, completion in zip(names, prompts, found, strict=True):
        assert_right(bases, name, tokens, completion.prompt_logprobs)


def test_decoding_is_exact_too(bases, engine):
    names = [*bases.kinds, None]
    prompts = [text(50 + seed) for seed, _ in enumerate(names)]
    found = engine.generate(prompts, GREEDY, [engine.digests[name] for name in names])
    for name, tokens, completion in zip(names, prompts, found, strict=True):
        judged = bases.logits(name, tokens + completion.token_ids)[len(tokens) - 1 :]
        assert judged.argmax(-1).tolist() == completion.token_ids, name


def test_rows_keep_their_bits_beside_all_other_kinds(bases, engine):
    """The compiled kernels' promise; torch's products depend on the shape of a batch."""
    names = [None, *bases.kinds]
    prompts = [text(80 + seed, 12) for seed, _ in enumerate(names)]
    together = engine.generate(prompts, SCORE, [engine.digests[name] for name in names])
    exact = engine.runner.kernels.startswith("compiled")
    for name, tokens, completion in zip(names, prompts, together, strict=True):
        [alone] = engine.generate([tokens], SCORE, engine.digests[name])
        pairs = zip(completion.prompt_logprobs, alone.prompt_logprobs, strict=True)
        assert all(
            one.logprob == (other.logprob if exact else pytest.approx(other.logprob, abs=1e-4)) for one, other in pairs
        ), name


def test_kv_is_shared_with_the_base_only_where_nothing_before_it_changed(bases, engine):
    for seed, name in enumerate(bases.kinds):
        tokens = text(100 + seed, 60)
        for adapter in (name, name, None):
            engine.generate([tokens], GREEDY, engine.digests[adapter])
        again, of_base = (engine.generate([tokens], GREEDY, engine.digests[each])[0] for each in (name, None))
        assert again.cached_tokens >= 48, name
        for one, adapter in ((again, name), (of_base, None)):
            judged = bases.logits(adapter, tokens + one.token_ids)[len(tokens) - 1 :]
            assert judged.argmax(-1).tolist() == one.token_ids, name
        fresh = text(200 + seed, 60)
        engine.generate([fresh], GREEDY, engine.digests[name])
        reused = engine.generate([fresh], GREEDY)[0].cached_tokens
        assert (reused >= 48) is (name in SHARES_KV), name


def test_a_file_and_tensors_make_one_canonical_adapter(bases, engine, tmp_path):
    model = ModelConfig.from_directory(bases.directory)
    for name, digest in engine.digests.items():
        if name is None:
            continue
        saved = tmp_path / name
        bases.models[name].save_pretrained(saved, save_embedding_layers=False)
        config = (saved / "adapter_config.json").read_bytes()
        weights, target = saved / "adapter_model.safetensors", tmp_path / "canonical"
        summary = canonicalise(weights, config, model, target, max_rank=8)
        assert summary.digest == digest, name
        assert summary.kv_is_base is (name in SHARES_KV), name
        assert summary.warnings == [], name


@pytest.mark.parametrize("kernels", ["compiled", "torch"])
def test_evictions_and_preemptions_change_nothing(bases, kernels):
    engine = engine_of(bases, kernels)
    sizes = {name: engine.add_adapter(*bases.adapter(name)) for name in bases.kinds}
    largest = max(adapter.size for adapter in map(engine.adapters._adapters.__getitem__, sizes.values()))
    engine.close()
    engine = engine_of(
        bases, kernels, adapter_bytes=2 * largest, host_adapter_bytes=3 * largest, kv_cache_bytes=16 * BLOCK_BYTES
    )
    digests = {name: engine.add_adapter(*bases.adapter(name)) for name in bases.kinds}
    names = [*bases.kinds, *bases.kinds]
    prompts = [text(300 + seed) for seed, _ in enumerate(names)]
    found = engine.generate(prompts, GREEDY, [digests[name] for name in names])
    assert engine.adapters.device.evictions > 0
    for name, tokens, completion in zip(names, prompts, found, strict=True):
        judged = bases.logits(name, tokens + completion.token_ids)[len(tokens) - 1 :]
        assert judged.argmax(-1).tolist() == completion.token_ids, name
    engine.check()
    engine.close()


@pytest.mark.parametrize("kernels", ["compiled", "torch"])
def test_files_in_16_bits_and_of_several_dtypes_are_exact(bases, kernels):
    engine = engine_of(bases, kernels)
    for seed, name in enumerate(("embed_tokens", "lm_head", "dora", "tokens", "ia3")):
        model = bases.adapted(bases.kinds[name])
        halves = torch.float16 if seed % 2 else torch.bfloat16
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(parameter.to(halves))
        tensors = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
        own = {key: tensor if "lora_B" in key else tensor.to(halves) for key, tensor in tensors.items()}
        digest = engine.add_adapter(own, model.peft_config["default"].to_dict())
        tokens = text(400 + seed)
        [completion] = engine.generate([tokens], SCORE, digest)
        judged = logits_of_output(model, tokens[:1], tokens[1:]).log_softmax(-1)
        for row, token, entry in zip(judged, tokens[1:], completion.prompt_logprobs, strict=True):
            assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4), name
    engine.close()


def test_gains_follow_a_base_in_int8(bases):
    """DoRA's lengths are those of the weights that are multiplied: the dequantised ones."""
    engine = engine_of(bases, "compiled", quantization="int8")
    digest, plain = (engine.add_adapter(*bases.adapter(name)) for name in ("dora", "plain"))
    base = engine.runner.decoder.base
    tensors, _ = bases.adapter("dora")
    for module in ("model.layers.1.self_attn.k_proj", "model.layers.0.mlp.down_proj"):
        a, b = (tensors[f"base_model.model.{module}.lora_{each}.weight"].numpy() for each in "AB")
        weight = bases.models[None].get_submodule(module).weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127  # one group: fewer than 128 inputs
        exact = ((weight / scale).round() * scale + 1.5 * torch.from_numpy(b @ a)).norm(dim=1)
        lengths = torch.from_numpy(base.lengths(module, a, b, 1.5, lambda: None))
        torch.testing.assert_close(lengths, exact, atol=1e-5, rtol=1e-5)
    tokens = text(7)
    found = [engine.generate([tokens], SCORE, each)[0].prompt_logprobs for each in (digest, plain)]
    judged = bases.logits("dora", tokens).log_softmax(-1)
    error, other = (
        [abs(e.logprob - float(r[t])) for r, t, e in zip(judged, tokens[1:], each, strict=True)] for each in found
    )
    assert max(error) < 0.1 < max(other)
    engine.close()


def test_a_row_without_length_is_refused_by_name(bases):
    engine = engine_of(bases, "compiled")
    tensors, config = bases.adapter("dora")
    module = "model.layers.0.self_attn.q_proj"
    weight = bases.models[None].get_submodule(module).weight.detach()
    name = f"base_model.model.{module}.lora_"
    tensors = dict(tensors)
    tensors[f"{name}A.weight"] = torch.zeros(4, 32)
    tensors[f"{name}A.weight"][0] = weight[5]
    tensors[f"{name}B.weight"] = torch.zeros(32, 4)
    tensors[f"{name}B.weight"][5, 0] = -1.0
    digest = engine.add_adapter(tensors, config | {"lora_alpha": 4})
    with pytest.raises(RequestRefused, match="lora_magnitude_vector: divides by a row of zeros"):
        engine.generate([text(8)], GREEDY, digest)
    engine.close()


def test_triton_scales_and_shifts_exactly_and_refuses_weights_of_an_adapters_own(bases):
    engine = engine_of(bases, "triton")
    names = []
    for name in bases.kinds:
        _, config = bases.adapter(name)
        if config.get("modules_to_save") or config.get("trainable_token_indices"):
            with pytest.raises(InvalidAdapter, match=r"the triton kernels lack; set kernels \(--kernels\)"):
                engine.add_adapter(*bases.adapter(name))
        else:
            names.append(name)
    digests = [*(engine.add_adapter(*bases.adapter(name)) for name in names), None]
    prompts = [text(seed, 12) for seed, _ in enumerate(digests)]
    found = engine.generate(prompts, SCORE, digests)
    for name, tokens, completion in zip([*names, None], prompts, found, strict=True):
        assert_right(bases, name, tokens, completion.prompt_logprobs)
    engine.check()
    engine.close()


def test_a_configuration_survives_json(bases):
    """PEFT writes sets and tuples as lists; the state dict's config is what its file says."""
    _, config = bases.adapter("tokens")
    assert json.loads(json.dumps(config, default=sorted))["trainable_token_indices"] == IDS
